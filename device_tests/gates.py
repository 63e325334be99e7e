"""Numbers against limits. A number that is missing, NaN or infinite never passes.

Golden vectors hold some dozens of tokens: one token more or less moves top-1 by a per cent. So where only they were replayed,
top-1 and KL fail when they miss the limit by more than three standard errors; a full quality pass is judged to the letter.
A limit of 1.0 on top-1 allows nothing either way.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path

from device_tests.artifact import read_json
from device_tests.errors import DeviceTestError
from device_tests.quality import Quality
from device_tests.replay import Replay

ALLOWED_ERRORS = 3.0


@dataclass(frozen=True)
class Gates:
    """Limits of one artifact; None is not judged. ``perplexity_change`` a fraction, ``top1`` a share, ``kl`` nats per token."""

    perplexity_change: float | None = None
    top1: float | None = None
    kl: float | None = None
    max_abs_diff: float | None = None


def read_gates(path: Path) -> Gates:
    """Gates from a JSON object with those keys. DeviceTestError for another key or a value that is no number."""
    record = read_json(path, 'gates such as {"top1": 0.99}')
    known = [field.name for field in fields(Gates)]
    for key, value in record.items():
        if key not in known:
            raise DeviceTestError(f"{path}: unknown gate {key}; give some of {', '.join(known)}")
        if value is not None and (isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value)):
            raise DeviceTestError(f"{path}: gate {key} is {value!r}; give a number or null")
    return Gates(**record)


def judge(gates: Gates, replay: Replay, quality: Quality | None) -> list[str]:
    """One line per missed limit: the number, the limit, where it was worst. Empty when all hold."""
    failures = []
    if gates.max_abs_diff is not None and not replay.max_abs_diff <= gates.max_abs_diff:
        failures.append(f"max_abs_diff {replay.max_abs_diff:.3g} exceeds {gates.max_abs_diff:.3g} (worst: golden {replay.worst})")
    if quality is None:
        return failures + _judge_golden(gates, replay)
    change = quality.perplexity_change
    if gates.perplexity_change is not None and not change.value <= gates.perplexity_change:
        found = f"perplexity_change {change.value:+.3%} (standard error {change.stderr:.3%})"
        failures.append(f"{found} exceeds {gates.perplexity_change:+.3%} (worst: window {quality.worst_window})")
    elif not math.isfinite(change.value):
        failures.append(f"perplexity_change is {change.value} (worst: window {quality.worst_window})")
    if gates.top1 is not None and not quality.top1.value >= gates.top1:
        failures.append(f"top1 {quality.top1.value:.4f} is below {gates.top1:.4f} (worst: {quality.worst})")
    if gates.kl is not None and not quality.kl.value <= gates.kl:
        failures.append(f"kl {quality.kl.value:.3g} exceeds {gates.kl:.3g} (worst: {quality.worst})")
    return failures


def _judge_golden(gates: Gates, replay: Replay) -> list[str]:
    failures = []
    if gates.top1 is not None:
        allowance = ALLOWED_ERRORS * math.sqrt(gates.top1 * (1 - gates.top1) / replay.tokens)
        if not replay.top1 >= gates.top1 - allowance:
            lowest = f"{gates.top1:.4f} less {allowance:.4f} for {replay.tokens} tokens"
            failures.append(f"top1 {replay.top1:.4f} is below {lowest} (worst: golden {replay.worst})")
    if gates.kl is not None:
        allowance = ALLOWED_ERRORS * replay.kl.stderr if math.isfinite(replay.kl.stderr) else 0.0
        if not replay.kl.value <= gates.kl + allowance:
            highest = f"{gates.kl:.3g} plus {allowance:.3g} for {replay.tokens} tokens"
            failures.append(f"kl {replay.kl.value:.3g} exceeds {highest} (worst: golden {replay.worst})")
    return failures
