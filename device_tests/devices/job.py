"""A job for a device: one artifact in one runtime. Every device runs it by the same command line in a fresh process."""

from __future__ import annotations

import json
import signal
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from device_tests.gates import Gates
from device_tests.result import DeviceRecord

GATES, RESULT, TOKENS, ANSWERS = "gates.json", "result.json", "tokens.npz", "answers.npz"
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class Run:
    """How an artifact is run, and how long it may take (seconds). None leaves a number to ``python -m device_tests``.

    ``tokens`` is a file of this machine for every scored token, ``answers`` one for what devices are compared by;
    ``windows`` bounds the evaluation windows that are scored.
    """

    runtime: str
    threads: int = 1
    gates: Gates = Gates()
    quality: bool = False
    windows: int | None = None
    tokens: Path | None = None
    answers: Path | None = None
    timing: bool = True
    prompts: tuple[int, ...] = ()
    decode_tokens: int | None = None
    timeout_s: float = 1800.0


@dataclass(frozen=True)
class Job:
    """An artifact by the JSON beside it, the folder of golden vectors, and how to run it. Paths are of this machine."""

    sidecar: Path
    golden: Path
    run: Run

    def with_threads(self, threads: int | None) -> Job:
        """The same job with another number of threads; None changes nothing."""
        return self if threads is None else replace(self, run=replace(self.run, threads=threads))


@dataclass(frozen=True)
class Places:
    """Where a job's files lie for the process that runs it. ``work`` holds the gates and takes the results."""

    artifact: str
    golden: str
    work: str


def arguments(job: Job, places: Places, device: str) -> list[str]:
    """What follows ``python -m device_tests`` on the device."""
    run = job.run
    given = ["--artifact", places.artifact, "--golden", places.golden, "--runtime", run.runtime, "--threads", str(run.threads)]
    given += ["--device", device, "--gates", f"{places.work}/{GATES}", "--out", f"{places.work}/{RESULT}"]
    given += ["--quality"] if run.quality else []
    given += [] if run.windows is None else ["--windows", str(run.windows)]
    given += [] if run.tokens is None else ["--tokens", f"{places.work}/{TOKENS}"]
    given += [] if run.answers is None else ["--answers", f"{places.work}/{ANSWERS}"]
    given += [] if run.timing else ["--no-timing"]
    given += [word for tokens in run.prompts for word in ("--prompt-tokens", str(tokens))]
    return given + ([] if run.decode_tokens is None else ["--decode-tokens", str(run.decode_tokens)])


def gates_json(run: Run) -> str:
    """The text of the gates' file."""
    return json.dumps(asdict(run.gates))


def files_of(job: Job) -> list[Path]:
    """What has to lie together on the device: the artifact's JSON and every file that it names."""
    record = json.loads(job.sidecar.read_text(encoding="utf-8"))
    return [job.sidecar, *(job.sidecar.parent / file["path"] for file in record["files"])]


def how_it_ended(code: int | None, stderr: str, timeout_s: float) -> str:
    """One line for a process that left no result; ``code`` None: it was stopped, below 0 or above 128: by a signal."""
    lines = [line.strip() for line in stderr.splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if code is None:
        return f"stopped after {timeout_s:g} s without a result (last words: {last})"
    number = -code if code < 0 else code - 128 if code > 128 else 0
    if number in set(signal.Signals):
        return f"died by signal {signal.Signals(number).name} (last words: {last})"
    if code == 2:
        return last
    return f"ended with exit code {code} and without a result (last words: {last})"


def failed_result(job: Job, device: str, isa: str | None, failure: str) -> dict[str, Any]:
    """A result of the usual shape with nothing measured."""
    try:
        record = json.loads(job.sidecar.read_text(encoding="utf-8"))
        name, sha256 = str(record["name"]), str(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # the failure itself says what is wrong with the sidecar
        name, sha256 = job.sidecar.stem, None
    measured = DeviceRecord(
        device=device,
        isa=isa,
        runtime=job.run.runtime,
        runtime_version=None,
        threads=job.run.threads,
        failures=[f"{name} in {job.run.runtime} on {device}: {failure}"],
    )
    return {"artifact": name, "sha256": sha256, "device": asdict(measured), "quality": None}
