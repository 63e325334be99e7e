"""Processors that this machine does not have, emulated: ``arm64[?cpu=cortex-a72]`` and ``avx2``. Numbers are right, times mean nothing.

``arm64`` runs the aarch64 wheels in the root folder of ``lab``, with nothing of this machine in sight but the job's files.
``avx2`` runs this very Python environment on a processor without AVX-512 and VNNI (Intel's Haswell), where ONNX Runtime's kernels
for unsigned times signed int8 add pairs of products in 16 bits and saturate.

Runs share nothing: several threads may call ``run`` at once. A killed run takes its emulator and its mounts with it.
"""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

from device_tests.devices import WORK
from device_tests.devices.job import Job, Places, arguments, failed_result
from device_tests.devices.lab import Lab, lab_at
from device_tests.devices.lab_arm64 import Arm64, board_of, files_of
from device_tests.devices.local import run_here
from device_tests.errors import DeviceTestError

ARM64_CPU = "cortex-a76"  # of the Raspberry Pi 5, and close to the large cores of most phones
# without what only an operating system sees, which the emulator has not and says so at every start
AVX2_CPU = "Haswell-noTSX,-pcid,-x2apic,-tsc-deadline,-invpcid"
ARTIFACT, GOLDEN, JOB = "/mnt/artifact", "/mnt/golden", "/mnt/job"  # where a job's files lie in the root folder
# numpy asks the processor itself, /proc/cpuinfo is this machine's: Linux's names and numpy's
FLAGS = {"sse4_2": "SSE42", "avx": "AVX", "f16c": "F16C", "fma": "FMA3", "avx2": "AVX2", "avx512f": "AVX512F", "avx512_vnni": "AVX512_CLX"}
AVX2_BOARD = f"""import json
from numpy.core._multiarray_umath import __cpu_features__ as found
from device_tests.board import condition, describe
print(json.dumps({{**describe(), **condition(), "cpu_flags": [flag for flag, name in {FLAGS!r}.items() if found[name]]}}))"""
Command = Callable[[Job, Path], list[str]]  # what starts a job, its work folder given


class Emulated:
    """An emulated processor. ``board`` is what a process on it says of it."""

    emulated = True
    threads = None

    def __init__(self, name: str, board: dict[str, Any], command: Command) -> None:
        self.name, self.board, self._command = name, board, command
        self.missing: dict[str, str] = {}

    def run(self, job: Job) -> dict[str, Any]:
        """The job's result, without times. A process that died by a signal is a failed result that names it."""
        for path in (job.sidecar, job.golden):
            if not path.exists():
                return failed_result(job, self.name, self.board["isa"], f"{path}: no such file or folder; give those of a bundle")
        untimed = replace(job, run=replace(job.run, timing=False))
        return run_here(untimed, self.name, self.board["isa"], lambda work: self._command(untimed, work))


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
    return found["kind"], found["cpu"] or (ARM64_CPU if found["kind"] == "arm64" else AVX2_CPU)


def open_arm64(lab: Lab, cpu: str) -> Emulated:
    """An ARM64 processor by the emulator's name for it. DeviceTestError for an unknown one."""
    machine = Arm64(lab, cpu)
    known = machine.known()
    if cpu not in known:
        raise DeviceTestError(f"device arm64?cpu={cpu}: the emulator has no such processor; give one of {', '.join(known)}")
    name, board = f"arm64-{cpu}", machine.board()
    files = files_of(cpu, board["cpu_flags"])

    def command(job: Job, work: Path) -> list[str]:
        binds = [(str(job.sidecar.resolve().parent), ARTIFACT), (str(job.golden.resolve()), GOLDEN), (str(work), JOB)]
        words = arguments(job, Places(f"{ARTIFACT}/{job.sidecar.name}", GOLDEN, JOB), name)
        return machine.python(["-m", "device_tests", *words], job.run.threads, binds, files).words()

    return Emulated(name, board, command)


def open_avx2(lab: Lab) -> Emulated:
    """An x86-64 processor with AVX2 and nothing newer, for this Python environment."""
    # setpriv: the emulator must not outlive who started it
    start = ["setpriv", "--pdeathsig", "KILL", str(lab.emulator(platform.machine())), "-cpu", AVX2_CPU, sys.executable]

    def command(job: Job, work: Path) -> list[str]:
        places = Places(str(job.sidecar.resolve()), str(job.golden.resolve()), str(work))
        return [*start, "-m", "device_tests", *arguments(job, places, "avx2")]

    return Emulated("avx2", board_of([*start, "-c", AVX2_BOARD]), command)
