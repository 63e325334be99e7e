"""What an artifact answered on one device, kept so that another device's answers can be held against it.

``answers.npz`` holds ``logits`` float32 ``[windows, scored, vocab]`` of the golden windows, and where evaluation windows were scored
too, per token ``choice`` int32 and ``nll`` float64 ``[windows, scored]``: the first choice, and the negative log-likelihood of the
right token in nats. Without evaluation windows these two are of the golden ones.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path

import numpy as np

from device_tests.errors import DeviceTestError
from device_tests.token_statistics import log_softmax, mean_estimate, perplexity, perplexity_change
from device_tests.vectors import write_arrays


@dataclass(frozen=True)
class Answers:
    """See the module; ``evaluated``: ``choice`` and ``nll`` are of evaluation windows."""

    logits: np.ndarray
    choice: np.ndarray
    nll: np.ndarray
    evaluated: bool


@dataclass(frozen=True)
class Agreement:
    """The same artifact on two devices. ``max_abs_diff`` and ``bit_equal`` (share of rows of logits) are on golden tokens.

    ``top1`` is the share of equal first choices and ``perplexity_change`` a fraction, over ``tokens`` tokens of ``windows``
    windows that both scored; ``perplexity`` is the second device's there.
    """

    max_abs_diff: float
    bit_equal: float
    golden_tokens: int
    top1: float
    perplexity: float
    perplexity_change: float
    perplexity_change_stderr: float
    tokens: int
    windows: int


class Choices:
    """Notes the first choice of every row of logits that passes by."""

    def __init__(self) -> None:
        self.rows: list[int] = []

    def of(self, answers: Iterable[np.ndarray]) -> Iterable[np.ndarray]:
        """The same rows of logits ``[vocab]``."""
        for logits in answers:
            self.rows.append(int(logits.argmax()))
            yield logits


def golden_answers(logits: np.ndarray, windows: np.ndarray, prompt_tokens: int) -> Answers:
    """From logits ``[windows, scored, vocab]`` after ``prompt_tokens`` tokens of golden ``windows`` int ``[windows, length]``."""
    targets = windows[:, prompt_tokens : prompt_tokens + logits.shape[1], None].astype(np.int64)
    nll = -np.take_along_axis(log_softmax(logits), targets, axis=-1)[..., 0]
    return Answers(logits, logits.argmax(axis=-1).astype(np.int32), nll, evaluated=False)


def agreement(reference: Answers, other: Answers) -> Agreement:
    """Hold ``other`` against ``reference``, over the windows that both have. DeviceTestError when they are of other texts."""
    if reference.logits.shape != other.logits.shape or reference.choice.shape[1:] != other.choice.shape[1:]:
        raise DeviceTestError("answers to different golden vectors; test both devices again with the same ones")
    windows = min(len(reference.choice), len(other.choice))
    change = perplexity_change(other.nll[:windows], reference.nll[:windows])
    equal = (reference.logits.view(np.uint32) == other.logits.view(np.uint32)).all(axis=-1)
    return Agreement(
        max_abs_diff=float(np.abs(reference.logits - other.logits).max()),
        bit_equal=float(equal.mean()),
        golden_tokens=int(equal.size),
        top1=mean_estimate(reference.choice[:windows] == other.choice[:windows]).value,
        perplexity=perplexity(other.nll[:windows]).value,
        perplexity_change=change.value,
        perplexity_change_stderr=change.stderr,
        tokens=int(other.choice[:windows].size),
        windows=windows,
    )


def write_answers(path: Path, answers: Answers) -> None:
    """Whole or not at all. DeviceTestError where it cannot be written."""
    write_arrays(path, "--answers", {field.name: getattr(answers, field.name) for field in fields(Answers)}, compressed=True)


def read_answers(path: Path) -> Answers:
    """What ``write_answers`` wrote; no pickle is opened."""
    with np.load(path, allow_pickle=False) as found:
        return Answers(found["logits"], found["choice"], found["nll"], bool(found["evaluated"]))
