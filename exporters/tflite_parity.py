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
from exporters.tflite_signatures import DECODE, copy_with, signatures_of, usual_prefill
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
    """``logits`` [sequences, steps + 1, vocab]; ``delegated`` is how many pieces of the decode graph XNNPACK took over.

    ``short_cache`` are the logits where no more of the cache was fed than holds tokens; None where that was not asked for.
    """

    logits: np.ndarray
    delegated: int
    short_cache: np.ndarray | None = None


@dataclass(frozen=True)
class Parity:
    """Largest difference of logits to PyTorch's, of prompts and of decode steps, with the whole cache fed and with a short one."""

    max_abs_diff_prompt: float
    max_abs_diff_decode: float
    xnnpack_delegates: int

    @classmethod
    def worst(cls, found: list["Parity"]) -> "Parity":
        """Of several."""
        prompt, decode = (max(getattr(one, name) for one in found) for name in ("max_abs_diff_prompt", "max_abs_diff_decode"))
        return cls(prompt, decode, min(one.xnnpack_delegates for one in found))


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


def replay(
    model: Path, runtime: str, feeds: Feeds, prefill: str | None = None, accelerated: bool = True, short_cache: bool = False
) -> Replayed:
    """Feed ``feeds`` through ``model`` in a fresh process of ``runtime`` (litert or tflite); GateError where it cannot run.

    Prompts go through the signature ``prefill``, None: the one of usual length. ``accelerated`` also asks that XNNPACK takes part.
    """
    with tempfile.TemporaryDirectory() as folder:
        signatures = signatures_of(model)
        wanted = (DECODE, prefill or usual_prefill(signatures))
        # Each further signature would take the weights' size in memory once more.
        file = copy_with(model, wanted, Path(folder) / model.name) if len(signatures) > len(wanted) else model
        inputs, outputs = Path(folder) / "feeds.npz", Path(folder) / "logits.npz"
        np.savez(inputs, tokens=feeds.tokens, prompt_tokens=feeds.prompt_tokens)
        command = [sys.executable, "-m", "exporters.tflite_replay", "--runtime", runtime, "--model", str(file)]
        command += ["--short-cache"] if short_cache else []
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
            replayed = Replayed(result["logits"], int(result["delegated"]), result["short_cache"] if short_cache else None)
    check_alive(replayed.logits, f"{model.name} in {RUNTIMES[runtime]}")
    if accelerated:
        check_accelerated(replayed.delegated, f"{model.name} in {RUNTIMES[runtime]}")
    return replayed


def check_accelerated(pieces: int, what: str) -> None:
    """GateError where XNNPACK took over no piece of the graph: plain kernels are several times slower."""
    if not pieces:
        raise GateError(f"{what}: XNNPACK took over no operator, so it would run several times slower")


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


def check_parity(model: Path, prefill: str, feeds: Feeds, expected: np.ndarray, limit: float) -> dict[str, Parity]:
    """Compare logits with ``expected`` [sequences, steps + 1, vocab] in each runtime, prompts fed through the signature ``prefill``.

    GateError where they differ by more than ``limit``, with the whole cache fed or with no more of it than holds tokens.
    """
    measured = {}
    for runtime in RUNTIMES:
        found = replay(model, runtime, feeds, prefill, short_cache=True)
        worst = np.zeros(expected.shape[:2])  # [sequences, steps + 1]
        for logits, cache in ((found.logits, ""), (found.short_cache, " with a short cache")):
            difference = np.abs(logits - expected).max(-1)
            if not difference.max() <= limit:
                sequence, row = np.unravel_index(difference.argmax(), difference.shape)
                phase = f"decode step {row} behind" if row else ""
                raise GateError(
                    f"{model.name} in {RUNTIMES[runtime]} differs from PyTorch by {difference.max():.2e} (limit {limit:.0e}) after"
                    f" {phase} a prompt of {feeds.prompt_tokens[sequence]} tokens through {prefill}{cache}; raise tflite.max_abs_diff only"
                    " if that is small for this model's logits"
                )
            worst = np.maximum(worst, difference)
        measured[runtime] = Parity(float(worst[:, 0].max()), float(worst[:, 1:].max()), found.delegated)
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


def check_agreement_in(
    path: Path, runtime: str, feeds: Feeds, parent: np.ndarray, advice: str = "", prefill: str | None = None
) -> TextAgreement:
    """Replay in ``runtime`` and compare with the ``parent``'s logits; GateError for dead or unrelated ones, with ``advice``.

    Prompts must be equally long; they go through the signature ``prefill``, None: the one of usual length.
    """
    logits = replay(path, runtime, feeds, prefill).logits
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


def check_all_lengths(path: Path, runtime: str, feeds: Feeds, parent: np.ndarray, advice: str = "") -> TextAgreement:
    """As ``check_agreement_in``, through every signature that takes prompts; the one that agrees least."""
    signatures = [name for name in signatures_of(path) if name != DECODE]
    return max((check_agreement_in(path, runtime, feeds, parent, advice, name) for name in signatures), key=lambda found: found.kl)
