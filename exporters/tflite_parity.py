"""Runs TFLite files in both runtimes, each in a fresh process, and compares logits: with PyTorch, or with another file."""

import os
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from exporters.tflite_logit_range import log_softmax
from exporters.tflite_replay import RUNTIMES
from models.errors import GateError

REPLAY_SECONDS = 1800
LEAST_TOP1, LARGEST_KL = 0.5, 0.1  # outside both the file is broken, whatever the recipe's gates say; flat logits miss only top-1


@dataclass(frozen=True)
class Feeds:
    """Token sequences [sequences, length] and how many tokens of each are its prompt [sequences]."""

    tokens: np.ndarray
    prompt_tokens: np.ndarray

    @property
    def steps(self) -> int:
        """Tokens fed one by one after each prompt."""
        return self.tokens.shape[1] - int(self.prompt_tokens.max())


@dataclass(frozen=True)
class Replayed:
    """``logits`` [sequences, steps + 1, vocab]; ``delegated`` is how many pieces of the prefill graph XNNPACK took over."""

    logits: np.ndarray
    delegated: int


@dataclass(frozen=True)
class Agreement:
    """Logits of a quantised file against those of its float parent, over all rows: KL(parent||file) in nats."""

    rows: int
    max_abs_diff: float
    kl: float
    top1: float


@dataclass(frozen=True)
class TextAgreement(Agreement):
    """With the change of perplexity on the tokens that were fed, a fraction, and its standard error."""

    perplexity_change: float
    perplexity_change_error: float


def prompt_feeds(windows: np.ndarray, prefill_tokens: int, context_tokens: int, steps: int) -> Feeds:
    """Prompts shorter than, equal to and longer than one chunk, as far as the context allows, each followed by ``steps`` tokens."""
    room = context_tokens - steps
    lengths = sorted({min(length, room) for length in ((prefill_tokens + 1) // 2, prefill_tokens, 2 * prefill_tokens + 3)})
    length = max(lengths) + steps
    stream = windows.reshape(-1)
    stream = np.tile(stream, -(-length * len(lengths) // len(stream)))
    return Feeds(stream[: length * len(lengths)].reshape(len(lengths), length), np.array(lengths, np.int32))


def replay(model: Path, runtime: str, feeds: Feeds, accelerated: bool = True) -> Replayed:
    """Feed ``feeds`` through ``model`` in a fresh process of ``runtime`` (litert or tflite); GateError where it cannot run.

    ``accelerated`` also asks that XNNPACK takes part.
    """
    with tempfile.TemporaryDirectory() as folder:
        inputs, outputs = Path(folder) / "feeds.npz", Path(folder) / "logits.npz"
        np.savez(inputs, tokens=feeds.tokens, prompt_tokens=feeds.prompt_tokens)
        command = [sys.executable, "-m", "exporters.tflite_replay", "--runtime", runtime, "--model", str(model)]
        done = subprocess.run(
            [*command, "--feeds", str(inputs), "--out", str(outputs)],
            capture_output=True,
            text=True,
            timeout=REPLAY_SECONDS,
            cwd=Path(__file__).parents[1],
            env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "2"},
        )
        if done.returncode:
            said = (done.stderr.strip().splitlines() or ["nothing said"])[-1]
            raise GateError(f"{model.name} does not run in {RUNTIMES[runtime]}: exit code {done.returncode}, {said}")
        with np.load(outputs) as result:
            replayed = Replayed(result["logits"], int(result["delegated"]))
    check_alive(replayed.logits, f"{model.name} in {RUNTIMES[runtime]}")
    if accelerated and not replayed.delegated:
        raise GateError(f"{model.name} in {RUNTIMES[runtime]}: XNNPACK took over no operator, so it would run several times slower")
    return replayed


def check_alive(logits: np.ndarray, what: str) -> None:
    """GateError naming what is wrong with dead logits [sequences, rows, vocab]: NaN, all zero, flat, or blind to the text."""
    if not np.isfinite(logits).all():
        raise GateError(f"{what}: logits are not finite")
    if not logits.any():
        raise GateError(f"{what}: logits are all zero")
    if (np.ptp(logits, axis=-1) == 0).any():
        raise GateError(f"{what}: a row of logits is constant")
    rows = logits.reshape(-1, logits.shape[-1])
    if len(rows) > 1 and (rows == rows[0]).all():
        raise GateError(f"{what}: logits do not depend on the text")


def check_parity(model: Path, feeds: Feeds, expected: np.ndarray, limit: float) -> dict[str, dict[str, float]]:
    """Largest difference of logits to ``expected`` [sequences, steps + 1, vocab] in each runtime, of prompts and of decode steps."""
    measured = {}
    for runtime in RUNTIMES:
        found = replay(model, runtime, feeds)
        difference = np.abs(found.logits - expected).max(-1)  # [sequences, steps + 1]
        if not difference.max() <= limit:
            sequence, row = np.unravel_index(difference.argmax(), difference.shape)
            phase = f"decode step {row} behind" if row else ""
            raise GateError(
                f"{model.name} in {RUNTIMES[runtime]} differs from PyTorch by {difference.max():.2e} (limit {limit:.0e}) after"
                f" {phase} a prompt of {feeds.prompt_tokens[sequence]} tokens; raise tflite.max_abs_diff only if that is small"
                " for this model's logits"
            )
        measured[runtime] = {
            "max_abs_diff_prompt": float(difference[:, 0].max()),
            "max_abs_diff_decode": float(difference[:, 1:].max()),
            "xnnpack_delegates": found.delegated,
        }
    return measured


def agreement(logits: np.ndarray, parent: np.ndarray) -> Agreement:
    """Compare logits [sequences, rows, vocab] with those of the float parent."""
    expected, found = log_softmax(parent), log_softmax(logits)
    return Agreement(
        rows=int(np.prod(logits.shape[:-1])),
        max_abs_diff=float(np.abs(logits - parent).max()),
        kl=float((np.exp(expected) * (expected - found)).sum(-1).mean()),
        top1=float((logits.argmax(-1) == parent.argmax(-1)).mean()),
    )


def check_agreement_in(path: Path, runtime: str, feeds: Feeds, parent: np.ndarray, advice: str = "") -> TextAgreement:
    """Replay in ``runtime`` and compare with the ``parent``'s logits; GateError for dead or unrelated ones, with ``advice``.

    Prompts must be equally long.
    """
    logits = replay(path, runtime, feeds).logits
    found = agreement(logits, parent)
    if found.top1 < LEAST_TOP1 and not found.kl < LARGEST_KL:
        raise GateError(
            f"{path.name} in {RUNTIMES[runtime]} agrees with the float file on {found.top1:.1%} of {found.rows} tokens"
            f" (least {LEAST_TOP1:.0%}), KL {found.kl:.3f} (limit {LARGEST_KL}){advice and '; ' + advice}"
        )
    following = feeds.tokens[:, int(feeds.prompt_tokens[0]) :, None].astype(np.int64)  # [sequences, steps, 1]
    right = [np.take_along_axis(log_softmax(rows[:, :-1].astype(np.float64)), following, -1) for rows in (parent, logits)]
    change = right[0] - right[1]  # of the loss, per token
    error = float(change.std() / np.sqrt(change.size)) * float(np.exp(change.mean()))
    return TextAgreement(**asdict(found), perplexity_change=float(np.expm1(change.mean())), perplexity_change_error=error)
