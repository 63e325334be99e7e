"""Proof that an exported graph computes what PyTorch computes: logits in every phase of use, and greedy text."""

import inspect
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnxruntime
import torch
from transformers import PreTrainedModel

from exporters.onnx_session import empty_past, run_tokens, shared_buffer_logits

DECODE_STEPS = 8
PARITY_WINDOWS = 4
GREEDY_PROMPTS = 4
LOGITS_BYTES = 2**28  # of one call, fp32


@dataclass(frozen=True)
class Difference:
    """Largest absolute difference of logits in one phase, and where it was."""

    phase: str
    window: int
    position: int
    max_abs_diff: float


@dataclass(frozen=True)
class GreedyMismatch:
    """The first token at which two greedy continuations part."""

    prompt: int
    position: int
    expected: int
    got: int


def parity(model: PreTrainedModel, session: onnxruntime.InferenceSession, windows: np.ndarray) -> list[Difference]:
    """The worst difference per phase (prefill, decode, chunk, padded) over some of ``windows`` int ``[n, tokens]``."""
    found = []
    chosen = windows[:PARITY_WINDOWS]
    references = [_reference(model, window) for window in chosen]
    for index, (window, expected) in enumerate(zip(chosen, references, strict=True)):
        for phase, start, logits in _phases(session, window):
            found.append(_difference(phase, index, start, logits, expected[start : start + len(logits)]))
    second = 1 % len(chosen)  # with a single window, the batch is that window twice, cut to two lengths
    found += _padded(session, chosen[[0, second]], [references[0], references[second]])
    phases = dict.fromkeys(difference.phase for difference in found)
    return [max((d for d in found if d.phase == phase), key=lambda d: _rank(d.max_abs_diff)) for phase in phases]


def parity_beyond(model: PreTrainedModel, session: onnxruntime.InferenceSession, tokens: np.ndarray) -> Difference:
    """The worst difference at the end of ``tokens`` int ``[n]``, which are more than a sliding window holds.

    The prompt goes in one piece where its logits fit ``LOGITS_BYTES``, else in several; the last tokens go one by one.
    """
    options = {"logits_to_keep": 2 * DECODE_STEPS} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens.astype(np.int64))[None], use_cache=False, **options).logits[0].numpy()
    expected = expected[-2 * DECODE_STEPS :]
    piece = max(2 * DECODE_STEPS, LOGITS_BYTES // (4 * expected.shape[1]))
    prompt, past, got = len(tokens) - DECODE_STEPS, empty_past(session, 1), []
    edges = [*range(0, prompt, piece), *range(prompt, len(tokens) + 1)]
    for start, end in zip(edges, edges[1:], strict=False):
        logits, past = run_tokens(session, tokens[None, start:end], past)
        got.append(logits[0, -2 * DECODE_STEPS :])
    return _difference("beyond_window", 0, len(tokens) - len(expected), np.concatenate(got)[-len(expected) :], expected)


def greedy_mismatch(
    model: PreTrainedModel, session: onnxruntime.InferenceSession, windows: np.ndarray, tokens: int
) -> GreedyMismatch | None:
    """Continue some windows' first halves greedily for ``tokens`` tokens in both, the session with one shared buffer."""
    for index, window in enumerate(windows[:GREEDY_PROMPTS]):
        prompt = window[: len(window) // 2]
        expected = _greedy_reference(model, prompt, tokens)
        got = greedy_shared(session, prompt, tokens)
        for position, (right, ours) in enumerate(zip(expected, got, strict=True)):
            if right != ours:
                return GreedyMismatch(index, position, right, ours)
    return None


def greedy_shared(session: onnxruntime.InferenceSession, prompt: np.ndarray, tokens: int) -> list[int]:
    """Greedy continuation with past and present in one buffer."""
    chosen: list[int] = []

    def chunks() -> Iterator[np.ndarray]:
        yield prompt
        while len(chosen) < tokens:
            yield np.array(chosen[-1:])

    for logits in shared_buffer_logits(session, chunks(), len(prompt) + tokens):
        chosen.append(int(logits[-1].argmax()))
        if len(chosen) == tokens:
            break
    return chosen


def _reference(model: PreTrainedModel, window: np.ndarray) -> np.ndarray:
    """PyTorch's logits ``[tokens, vocab]``, computed without a cache."""
    with torch.no_grad():
        return model(torch.from_numpy(window.astype(np.int64))[None], use_cache=False).logits[0].numpy()


def _phases(session: onnxruntime.InferenceSession, window: np.ndarray) -> Iterator[tuple[str, int, np.ndarray]]:
    """Prompt, single tokens on its cache, and the rest as one chunk on that: ``(phase, first position, logits [seq, vocab])``."""
    prompt = len(window) // 2
    logits, past = run_tokens(session, window[None, :prompt], empty_past(session, 1))
    yield "prefill", 0, logits[0]
    first_of_chunk = min(prompt + DECODE_STEPS, len(window) - 2)
    for position in range(prompt, first_of_chunk):
        logits, past = run_tokens(session, window[None, position : position + 1], past)
        yield "decode", position, logits[0]
    logits, _ = run_tokens(session, window[None, first_of_chunk:], past)
    yield "chunk", first_of_chunk, logits[0]


def _padded(session: onnxruntime.InferenceSession, windows: np.ndarray, references: list[np.ndarray]) -> Iterator[Difference]:
    """Two rows of different lengths padded on the right, then one decode step of both."""
    lengths = np.array([windows.shape[1] - 1, windows.shape[1] // 2])
    mask = (np.arange(lengths[0])[None] < lengths[:, None]).astype(np.int64)  # [2, longest]
    logits, past = run_tokens(session, windows[:, : lengths[0]] * mask, empty_past(session, 2), mask)
    step_mask = np.concatenate([mask, np.ones((2, 1), np.int64)], axis=1)
    step, _ = run_tokens(session, windows[[0, 1], lengths][:, None], past, step_mask)
    for row, length in enumerate(lengths):
        yield _difference("padded_prefill", row, 0, logits[row, :length], references[row][:length])
        yield _difference("padded_decode", row, length, step[row], references[row][length : length + 1])


def _difference(phase: str, window: int, start: int, got: np.ndarray, expected: np.ndarray) -> Difference:
    apart = np.abs(got - expected).max(axis=-1)  # [seq]
    worst = int(np.argmax(np.where(np.isnan(apart), np.inf, apart)))
    return Difference(phase, window, int(start) + worst, float(apart[worst]))


def _rank(value: float) -> float:
    """NaN is the worst difference, not one that compares as false."""
    return float("inf") if np.isnan(value) else value


def _greedy_reference(model: PreTrainedModel, prompt: np.ndarray, tokens: int) -> list[int]:
    chosen: list[int] = []
    feed, past = torch.from_numpy(prompt.astype(np.int64))[None], None
    with torch.no_grad():
        while len(chosen) < tokens:
            output = model(feed, past_key_values=past, use_cache=True)
            past = output.past_key_values
            feed = output.logits[:, -1:].argmax(-1)  # [1, 1]
            chosen.append(int(feed))
    return chosen
