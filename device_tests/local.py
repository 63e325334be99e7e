"""This machine as a device: a fresh process per artifact and runtime, so that memory is one model's and a crash is one row.

Runs must not overlap: two at once would time each other. The caller starts them one after the other.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from device_tests.artifact import read_json
from device_tests.gates import Gates
from device_tests.result import DeviceRecord

PACKAGE_ROOT = Path(__file__).resolve().parent.parent
THREAD_VARIABLES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


@dataclass(frozen=True)
class LocalRun:
    """One process: which runtime, how, and how long it may take (seconds). ``tokens``: the .npz for every scored token."""

    runtime: str
    threads: int = 1
    gates: Gates = Gates()
    quality: bool = False
    tokens: Path | None = None
    timing: bool = True
    decode_tokens: int | None = None
    timeout_s: float = 1800.0


def run_local(sidecar: Path, golden: Path, run: LocalRun) -> dict[str, Any]:
    """The child's result. However the child ends, a dict comes back; ``device.failures`` says how when it wrote none."""
    with tempfile.TemporaryDirectory(prefix="device-test-") as folder:
        work = Path(folder)
        (work / "gates.json").write_text(json.dumps(asdict(run.gates)), encoding="utf-8")
        command = child_command(sidecar, golden, run, work)
        with (work / "stderr").open("wb") as stderr:
            try:
                code: int | None = subprocess.run(
                    command, cwd=work, env=child_environment(run.threads), stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
                    timeout=run.timeout_s, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = None
        if code in (0, 1) and (work / "result.json").is_file():
            return read_json(work / "result.json", "the child's result")
        return failed_result(sidecar, run, how_it_ended(code, work / "stderr", run.timeout_s))


def child_command(sidecar: Path, golden: Path, run: LocalRun, work: Path) -> list[str]:
    """The command line of the child, whose working directory is ``work``."""
    command = [sys.executable, "-m", "device_tests", "--artifact", str(Path(sidecar).resolve()), "--runtime", run.runtime]
    command += ["--golden", str(Path(golden).resolve()), "--threads", str(run.threads)]
    command += ["--gates", str(work / "gates.json"), "--out", str(work / "result.json")]
    command += ["--quality"] if run.quality else []
    command += [] if run.tokens is None else ["--tokens", str(Path(run.tokens).resolve())]
    command += [] if run.timing else ["--no-timing"]
    return command + ([] if run.decode_tokens is None else ["--decode-tokens", str(run.decode_tokens)])


def child_environment(threads: int) -> dict[str, str]:
    """Ours, with this package importable and numpy held to as many threads as the runtime."""
    path = [str(PACKAGE_ROOT)] + [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **{name: str(threads) for name in THREAD_VARIABLES}}


def how_it_ended(code: int | None, stderr: Path, timeout_s: float) -> str:
    """One line for a child that left no result."""
    lines = [line.strip() for line in stderr.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    last = lines[-1] if lines else "it said nothing"
    if code is None:
        return f"stopped after {timeout_s:g} s without a result (last words: {last})"
    if code < 0:
        return f"died by signal {signal.Signals(-code).name} (last words: {last})"
    if code == 2:
        return last
    return f"ended with exit code {code} and without a result (last words: {last})"


def failed_result(sidecar: Path, run: LocalRun, failure: str) -> dict[str, Any]:
    """A result of the usual shape with nothing measured."""
    try:
        record = json.loads(Path(sidecar).read_text(encoding="utf-8"))
        name, sha256 = str(record["name"]), str(record["sha256"])
    except (OSError, ValueError, KeyError, TypeError):  # the failure itself says what is wrong with the sidecar
        name, sha256 = Path(sidecar).stem, None
    device = DeviceRecord(
        device="local",
        isa=platform.machine(),
        runtime=run.runtime,
        runtime_version=None,
        threads=run.threads,
        failures=[f"{name} in {run.runtime} on local: {failure}"],
    )
    return {"artifact": name, "sha256": sha256, "device": asdict(device), "quality": None}
