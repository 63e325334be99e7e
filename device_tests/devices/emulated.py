"""Processors that this machine does not have, emulated: ``arm64[?cpu=cortex-a72]`` and ``avx2``. Numbers are right, times mean nothing.

``arm64`` runs the aarch64 wheels in the root folder of ``lab``, with nothing of this machine in sight but the job's files: ONNX
Runtime crashes at import when it reads an x86 machine's caches from /sys. ``avx2`` runs this very Python environment on a processor
without AVX-512 and VNNI (Intel Haswell), whose int8 kernels add up pairs of products in 16 bits and saturate.

Nothing is shared between runs: several threads may call ``run`` at once.
"""

from __future__ import annotations

import json
import platform
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from device_tests.devices import DeviceUnavailable
from device_tests.devices.job import THREAD_VARIABLES, Job, Places, arguments, failed_result, how_it_ended
from device_tests.devices.lab import SITE, WORK, Lab, lab_at
from device_tests.devices.lab_enter import Entry
from device_tests.devices.local import PACKAGE_ROOT, child_environment, run_here
from device_tests.errors import DeviceTestError

DEFAULT_CPU = "cortex-a76"  # of the Raspberry Pi 5, and close to the large cores of most phones
AVX2_CPU = "Haswell"
ARM64_PYTHON = "/usr/bin/python3.11"
CODE, ARTIFACT, GOLDEN, JOB = "/mnt/code", "/mnt/artifact", "/mnt/golden", "/mnt/job"  # where a job's files lie in the root folder
START_S = 120.0
Command = Callable[[Job, Path], list[str]]  # what starts a job, its work folder given


class Emulated:
    """An emulated processor. ``board`` is what a process on it says of it."""

    emulated = True
    threads = None

    def __init__(self, name: str, isa: str, board: dict[str, Any], command: Command) -> None:
        self.name, self.board, self._isa, self._command = name, board, isa, command
        self.missing: dict[str, str] = {}

    def run(self, job: Job) -> dict[str, Any]:
        """The job's result, without times. A process that died by a signal is a failed result that names it."""
        for path in (job.sidecar, job.golden):
            if not path.exists():
                return failed_result(job, self.name, self._isa, f"{path}: no such file or folder; give the bundle's own")
        untimed = replace(job, run=replace(job.run, timing=False))
        return run_here(untimed, self.name, self._isa, lambda work: self._command(untimed, work))


@contextmanager
def open_at(address: str, tell: Callable[[str, str], None], work: Path = WORK) -> Iterator[Emulated]:
    """The emulated processor, with the folder that it needs built under ``work`` if it is not there."""
    kind, cpu = parse(address)
    lab = lab_at(work, tell)
    yield open_arm64(lab, cpu) if kind == "arm64" else open_avx2(lab)


def parse(address: str) -> tuple[str, str]:
    """Kind and processor of an address. DeviceTestError says what is right."""
    found = re.fullmatch(r"(?P<kind>arm64|avx2)(\?cpu=(?P<cpu>[A-Za-z0-9.-]+))?", address)
    if found is None or (found["kind"] == "avx2" and found["cpu"]):
        raise DeviceTestError(f"device {address}: not an emulated one; give arm64, arm64?cpu=cortex-a72 or avx2")
    return found["kind"], found["cpu"] or (DEFAULT_CPU if found["kind"] == "arm64" else AVX2_CPU)


def open_arm64(lab: Lab, cpu: str) -> Emulated:
    """An ARM64 processor by qemu's name for it."""
    emulator = str(lab.emulator("aarch64"))
    # a heading of two words and the names; the emulator ends with exit code 1 after it
    known = subprocess.run([emulator, "-cpu", "help"], capture_output=True, text=True, check=False).stdout.split()[2:]
    if cpu not in known:
        raise DeviceTestError(f"device arm64?cpu={cpu}: the emulator has no such processor; give one of {', '.join(known)}")
    name = f"arm64-{cpu}"

    def entry(words: list[str], threads: int, binds: list[tuple[str, str]]) -> list[str]:
        return Entry(
            root=str(lab.root),
            command=[emulator, "-cpu", cpu, ARM64_PYTHON, *words],
            environment={
                "PATH": "/usr/bin:/bin",
                "HOME": "/tmp",
                "LANG": "C.UTF-8",
                "PYTHONPATH": f"{CODE}:/{SITE}",
                "PYTHONDONTWRITEBYTECODE": "1",
                **{variable: str(threads) for variable in THREAD_VARIABLES},
            },
            binds=[(str(PACKAGE_ROOT / "device_tests"), f"{CODE}/device_tests"), *binds],
            program=emulator,
        ).words()

    def command(job: Job, work: Path) -> list[str]:
        binds = [(str(job.sidecar.resolve().parent), ARTIFACT), (str(job.golden.resolve()), GOLDEN), (str(work), JOB)]
        words = arguments(job, Places(f"{ARTIFACT}/{job.sidecar.name}", GOLDEN, JOB), name)
        return entry(["-m", "device_tests", *words], job.run.threads, binds)

    return Emulated(name, "aarch64", board_of(entry(["-m", "device_tests.board"], 1, [])), command)


def open_avx2(lab: Lab) -> Emulated:
    """An x86-64 processor with AVX2 and nothing newer, for this Python environment."""
    # setpriv: the emulator must not outlive who started it
    start = ["setpriv", "--pdeathsig", "KILL", str(lab.emulator("x86_64")), "-cpu", AVX2_CPU, sys.executable]

    def command(job: Job, work: Path) -> list[str]:
        places = Places(str(job.sidecar.resolve()), str(job.golden.resolve()), str(work))
        return [*start, "-m", "device_tests", *arguments(job, places, "avx2")]

    return Emulated("avx2", platform.machine(), board_of([*start, "-m", "device_tests.board"]), command)


def board_of(command: list[str]) -> dict[str, Any]:
    """What ``device_tests.board`` says there. DeviceUnavailable when the emulated processor cannot be started."""
    try:
        done = subprocess.run(
            command, env=child_environment(1), stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=START_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DeviceUnavailable(f"the emulated processor did not start within {START_S:g} s; run again when less is running") from error
    except OSError as error:
        raise DeviceUnavailable(f"{error.filename} cannot be run ({error.strerror}); install it") from error
    if done.returncode != 0:
        raise DeviceUnavailable(how_it_ended(done.returncode, done.stderr, START_S))
    return json.loads(done.stdout)
