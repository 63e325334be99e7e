"""How near a quantised graph stays to the fp32 graph: teacher-forced, both in ONNX Runtime, on text that calibrated nothing."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from scipy.special import log_softmax

from exporters.onnx_session import empty_past, open_session, run_tokens
from models.errors import GateError

COMPARED_WINDOWS = 8


@dataclass(frozen=True)
class Agreement:
    """Against the fp32 graph, teacher-forced: share of equal first choices, mean KL in nats, change of perplexity (fraction)."""

    top1: float
    kl: float
    perplexity_change: float
    tokens: int


def compare(reference: Path, quantised: Path, windows: np.ndarray, artifact: str) -> Agreement:
    """Both graphs on ``windows`` int ``[n, tokens]``. GateError, naming ``artifact``, for logits that are NaN, all zero or constant."""
    sessions = [open_session(path) for path in (reference, quantised)]

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for window in windows:
            expected, got = (run_tokens(session, window[None], empty_past(session, 1))[0][0, :-1] for session in sessions)
            require_live(got, artifact)
            yield logprob(expected), logprob(got)

    return agreement_of(pairs(), windows)


def compare_hybrid(reference: Path, decode: Path, prompt: Path, windows: np.ndarray, artifact: str) -> Agreement:
    """As ``compare``, with the first half of each window through the graph ``prompt``, and judged from its last token on.

    ``prompt`` gives the cache and the last token's logits, ``decode`` goes on from there. GateError where it gives more of them.
    """
    expected_by, got_by, fed_by = (open_session(path) for path in (reference, decode, prompt))
    half = windows.shape[1] // 2

    def pairs() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for window in windows:
            expected = run_tokens(expected_by, window[None], empty_past(expected_by, 1))[0][0, half - 1 : -1]
            last, past = run_tokens(fed_by, window[None, :half], empty_past(fed_by, 1))
            require_last_alone(last, artifact)
            got = np.concatenate([last[0], run_tokens(got_by, window[None, half:], past)[0][0, :-1]])
            require_live(got, artifact)
            yield logprob(expected), logprob(got)

    return agreement_of(pairs(), windows[:, half - 1 :])


def require_last_alone(logits: np.ndarray, artifact: str) -> None:
    """GateError where a prompt graph's ``logits`` ``[1, tokens, vocab]`` are of more than its last token: time and memory for nothing."""
    if logits.shape[1] != 1:
        raise GateError(f"{artifact}, prompt graph: it gives logits of {logits.shape[1]} tokens of a prompt, limit 1, the last")


def agreement_of(pairs: Iterable[tuple[np.ndarray, np.ndarray]], windows: np.ndarray) -> Agreement:
    """``pairs``: per window the log-probabilities ``[tokens - 1, vocab]`` expected and got of what follows each token but the last."""
    top1, divergence, losses = [], [], [[], []]
    for window, (expected, got) in zip(windows, pairs, strict=True):
        top1.append(expected.argmax(-1) == got.argmax(-1))
        divergence.append((np.exp(expected) * (expected - got)).sum(-1))
        for loss, logs in zip(losses, (expected, got), strict=True):
            loss.append(-logs[np.arange(len(logs)), window[1:]])
    change = np.exp(np.mean(losses[1]) - np.mean(losses[0])) - 1
    return Agreement(float(np.mean(top1)), float(np.mean(divergence)), float(change), int(np.size(top1)))


def logprob(logits: np.ndarray) -> np.ndarray:
    """float64 log-probabilities of ``logits`` ``[..., vocab]``."""
    return log_softmax(logits.astype(np.float64), axis=-1)


def require_live(logits: np.ndarray, artifact: str) -> None:
    """GateError for logits ``[seq, vocab]`` that a broken kernel or a broken scale would give without raising."""
    if not np.isfinite(logits).all():
        raise GateError(f"{artifact}: logits hold NaN or infinity; calibrate on more windows or another text")
    flat = np.flatnonzero(np.ptp(logits, axis=-1) == 0)
    if len(flat):
        raise GateError(f"{artifact}: logits at position {flat[0]} are all {logits[flat[0], 0]:g}; calibrate on more windows")
