"""The same artifacts on every device: run, compare with this machine, judge. One failure is one row; the others still run."""

from __future__ import annotations

import math
import os
import platform
import tempfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from device_tests.answers import Agreement, agreement, read_answers
from device_tests.artifact import read_json
from device_tests.devices import WORK, Device, DeviceUnavailable, Tell, check_address, open_device
from device_tests.devices.job import Job, failed_result
from device_tests.devices.local import run_local
from device_tests.devices.rounds import merged
from device_tests.errors import DeviceTestError
from device_tests.gates import ALLOWED_ERRORS

LOCAL = "local"


@dataclass(frozen=True)
class Limits:
    """What the same artifact may differ by from this machine: ``top1`` a share, ``perplexity_change`` a fraction either way.

    A few windows do not tell a per cent from two, so that a number fails when it misses its limit by more than three standard
    errors: as on golden vectors, see ``device_tests.gates``.
    """

    top1: float = 0.99
    perplexity_change: float = 0.001


@dataclass(frozen=True)
class Plan:
    """Where and how. ``rounds`` are fresh processes that time an artifact, of which medians are taken.

    ``emulated_windows`` bounds the evaluation windows on emulated devices, which are slow; None: golden vectors only. ``work`` is
    where emulated machines are kept.
    """

    devices: tuple[str, ...] = (LOCAL,)
    rounds: int = 1
    emulated_windows: int | None = None
    limits: Limits = Limits()
    work: Path = WORK

    def runs(self, jobs: int) -> int:
        """How many runs so many jobs are where no device is missing: rounds are for real devices, which are timed."""
        timed = sum(address == LOCAL or "://" in address for address in self.devices)
        return jobs * (len(self.devices) + timed * (self.rounds - 1))


@dataclass
class Outcome:
    """``results`` in the order of devices and jobs, ``boards`` by device, ``skipped`` what was left out and why.

    An entry of ``skipped`` without a ``runtime`` is a whole device that was out of reach.
    """

    results: list[dict[str, Any]] = field(default_factory=list)
    boards: dict[str, dict[str, Any] | None] = field(default_factory=dict)
    skipped: list[dict[str, Any]] = field(default_factory=list)


def run_everywhere(jobs: list[Job], plan: Plan, tell: Tell, ran: Callable[[], None] = lambda: None) -> Outcome:
    """Every job on every device. A device that cannot be used, or is lost, is in ``skipped`` with the reason.

    ``ran`` is called after each of the plan's runs, from several threads on an emulated device. DeviceTestError, before anything
    runs, for an address that is a person's mistake.
    """
    outcome = Outcome()
    for address in plan.devices:
        check_address(address)
    with tempfile.TemporaryDirectory(prefix="answers-") as folder:
        expected = {job: Path(folder) / f"{place}.npz" for place, job in enumerate(jobs)}
        for address in sorted(plan.devices, key=lambda address: address != LOCAL):  # this machine first: the others are held against it
            try:
                with open_device(address, tell, plan.work) as device:
                    outcome.boards[device.name] = device.board
                    run_on(device, jobs, plan, expected, outcome, tell, ran)
            except DeviceUnavailable as error:
                reason = " ".join(str(error).split())
                outcome.skipped.append({"device": address, "runtime": None, "reason": reason})
                tell(address, f"skipped: {reason}")
    return outcome


def run_on(
    device: Device, jobs: list[Job], plan: Plan, expected: dict[Job, Path], outcome: Outcome, tell: Tell, ran: Callable[[], None]
) -> None:
    """All jobs on one open device; results are kept as they come, so that a device that is lost loses only what was not done."""
    wanted = [job for job in jobs if job.run.runtime not in device.missing]
    for runtime in dict.fromkeys(job.run.runtime for job in jobs if job not in wanted):
        outcome.skipped.append({"device": device.name, "runtime": runtime, "reason": device.missing[runtime]})
        tell(device.name, f"{runtime} skipped: {device.missing[runtime]}")

    def once(job: Job) -> dict[str, Any]:
        result = judged(device, job, plan, expected[job], tell)
        ran()
        return result

    if device.emulated:  # nothing is timed there, so nothing is disturbed
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as pool:
            outcome.results += pool.map(once, wanted)
        return
    first = len(outcome.results)
    for job in wanted:
        outcome.results.append(once(job))
    rounds = [[result] for result in outcome.results[first:]]
    for number in range(1, plan.rounds):  # one round after the other, so that a slow minute does not hit one artifact alone
        tell(device.name, f"timing round {number + 1} of {plan.rounds}")
        for place, job in enumerate(wanted):
            if rounds[place][0]["device"]["decode_tokens_per_s"]:
                rounds[place].append(told_of(device, device.run(timing_only(job).with_threads(device.threads)), job))
            ran()
    outcome.results[first:] = [merged(results) for results in rounds]


def timing_only(job: Job) -> Job:
    """The same run for its times alone."""
    return replace(job, run=replace(job.run, quality=False, windows=None, tokens=None, answers=None))


def judged(device: Device, job: Job, plan: Plan, expected: Path, tell: Tell) -> dict[str, Any]:
    """One job's result with what it differs by from this machine."""
    name = f"{job.sidecar.stem} in {job.run.runtime} on {device.name}"
    tell(name, "runs")
    with tempfile.TemporaryDirectory(prefix="answers-") as folder:
        here = device.name == LOCAL
        answers = expected if here else Path(folder) / "answers.npz"
        run = replace(job.run, answers=answers)
        if device.emulated:
            run = replace(run, quality=False, windows=plan.emulated_windows if job.run.quality else None, timing=False)
        try:
            result = device.run(replace(job, run=run).with_threads(device.threads))
        except DeviceUnavailable:
            raise
        except DeviceTestError as error:
            result = failed_result(job, device.name, None, " ".join(str(error).split()))
        result = told_of(device, result, job)
        if not here and answers.is_file():
            compare_with_here(result, job, plan, (expected, answers))
    tell(name, "passed" if result["device"]["passed"] else "FAILED")
    return result


def told_of(device: Device, result: dict[str, Any], job: Job) -> dict[str, Any]:
    """The same result with what only this side knows: emulation, and the share of the board's memory bandwidth that was used."""
    measured = result["device"]
    measured["emulated"] = device.emulated
    read = read_json(job.sidecar, "the artifact's JSON").get("bytes_read_per_token")
    bandwidths = (device.board or {}).get("bandwidth_gb_s") or {}
    bandwidth = bandwidths.get(str(measured["threads"]))
    rate = measured["decode_tokens_per_s"]
    achieved = read * rate / 1e9 if read and rate else None
    measured["bytes_read_per_token"], measured["read_gb_s"], measured["bandwidth_gb_s"] = read, achieved, bandwidth
    measured["bandwidth_share"] = achieved / bandwidth if achieved and bandwidth else None
    return result


def compare_with_here(result: dict[str, Any], job: Job, plan: Plan, files: tuple[Path, Path]) -> None:
    """Put the agreement with this machine's answers into the result, and a failure where it misses a limit."""
    expected, answers = files
    if not expected.is_file():  # this machine is not among the devices, or failed there before it answered
        run_local(job.sidecar, job.golden, replace(job.run, answers=expected, timing=False))
    if not expected.is_file():
        result["device"]["notes"].append(f"not compared: the artifact gives no answers on this machine ({platform.machine()})")
        return
    found = agreement(read_answers(expected), read_answers(answers))
    device = result["device"]
    device["against_local"] = {**asdict(found), "local_isa": platform.machine()}
    name = f"{result['artifact']} in {device['runtime']} on {device['device']}"
    device["failures"] += [f"{name}: {line}" for line in missed(found, plan.limits)]
    device["passed"] = not device["failures"]


def missed(found: Agreement, limits: Limits) -> list[str]:
    """One line per limit that the agreement misses."""
    lines, over = [], f"against the same artifact on this machine, over {found.tokens} tokens,"
    allowance = ALLOWED_ERRORS * math.sqrt(limits.top1 * (1 - limits.top1) / found.tokens)
    if not found.top1 >= limits.top1 - allowance:
        lines.append(f"top1 {found.top1:.4f} {over} is below {limits.top1:.4f} less {allowance:.4f}")
    error = found.perplexity_change_stderr if math.isfinite(found.perplexity_change_stderr) else 0.0
    if not abs(found.perplexity_change) <= limits.perplexity_change + ALLOWED_ERRORS * error:
        limit = f"{limits.perplexity_change:.3%} and {ALLOWED_ERRORS:g} standard errors of {error:.3%}"
        lines.append(f"perplexity {found.perplexity_change:+.3%} {over} exceeds {limit} either way")
    return lines
