"""This machine as a device: a fresh process per artifact and runtime, so that memory is one model's and a crash is one row.

Runs must not overlap: two at once would time each other. The caller starts them one after the other.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from device_tests.artifact import read_json
from device_tests.board import describe
from device_tests.devices.job import (
    ANSWERS,
    GATES,
    RESULT,
    THREAD_VARIABLES,
    TOKENS,
    Job,
    Places,
    Run,
    arguments,
    failed_result,
    gates_json,
    how_it_ended,
)
from device_tests.errors import DeviceTestError

PACKAGE_ROOT = Path(__file__).resolve().parent.parent.parent


class Local:
    """This machine."""

    name = "local"
    emulated = False
    threads = None

    def __init__(self) -> None:
        self.board: dict[str, Any] = {**describe(), "bandwidth_gb_s": {}}
        self.missing: dict[str, str] = {}

    def run(self, job: Job) -> dict[str, Any]:
        """See ``run_local``. The memory bandwidth for a number of threads is measured before the first run that times with it."""
        threads = job.run.threads
        if job.run.timing and str(threads) not in self.board["bandwidth_gb_s"]:
            self.board["bandwidth_gb_s"][str(threads)] = bandwidth_here(threads)
        return run_local(job.sidecar, job.golden, job.run)


def bandwidth_here(threads: int) -> float | None:
    """GB/s that this machine reads from memory, measured in a fresh process; None where that failed."""
    command = [sys.executable, "-m", "device_tests.bandwidth", "--threads", str(threads)]
    done = subprocess.run(command, env=child_environment(threads), capture_output=True, text=True, check=False)
    return json.loads(done.stdout)["gb_s"] if done.returncode == 0 else None


def parse(address: str) -> None:
    """DeviceTestError unless the address is this machine's, which has nothing to say."""
    if address != Local.name:
        raise DeviceTestError(f"device {address}: this machine takes no settings; give local")


@contextmanager
def open_at(address: str, tell: Callable[[str, str], None]) -> Iterator[Local]:
    """This machine; there is nothing to open and nothing to leave behind."""
    yield Local()


def run_local(sidecar: Path, golden: Path, run: Run) -> dict[str, Any]:
    """The child's result. However the child ends, a dict comes back; ``device.failures`` says how when it wrote none."""
    job = Job(Path(sidecar), Path(golden), run)

    def command(work: Path) -> list[str]:
        places = Places(str(job.sidecar.resolve()), str(job.golden.resolve()), str(work))
        return [sys.executable, "-m", "device_tests", *arguments(job, places, "local")]

    return run_here(job, "local", platform.machine(), command)


def run_here(job: Job, device: str, isa: str, command: Callable[[Path], list[str]]) -> dict[str, Any]:
    """Run a job by a process of this machine; ``command`` gives its words, its work folder given."""
    run = job.run
    with tempfile.TemporaryDirectory(prefix="device-test-") as folder:
        work = Path(folder)
        (work / GATES).write_text(gates_json(run), encoding="utf-8")
        with (work / "stderr").open("wb") as stderr:
            try:
                code: int | None = subprocess.run(
                    command(work), cwd=work, env=child_environment(run.threads), stdin=subprocess.DEVNULL, stdout=stderr, stderr=stderr,
                    timeout=run.timeout_s, check=False,
                ).returncode  # fmt: skip
            except subprocess.TimeoutExpired:
                code = None
        for name, wanted in ((TOKENS, run.tokens), (ANSWERS, run.answers)):
            if wanted is not None and (work / name).is_file():
                shutil.copyfile(work / name, wanted)
        if code in (0, 1) and (work / RESULT).is_file():
            return read_json(work / RESULT, "the child's result")
        words = (work / "stderr").read_text(encoding="utf-8", errors="replace")
        return failed_result(job, device, isa, how_it_ended(code, words, run.timeout_s))


def child_environment(threads: int) -> dict[str, str]:
    """Ours, with this package importable and numpy held to as many threads as the runtime."""
    path = [str(PACKAGE_ROOT)] + [part for part in os.environ.get("PYTHONPATH", "").split(os.pathsep) if part]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path), **{name: str(threads) for name in THREAD_VARIABLES}}
