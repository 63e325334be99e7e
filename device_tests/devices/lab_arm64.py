"""How Python is started on the emulated ARM64 processor, and what it finds there about that processor.

A runtime chooses kernels by what the kernel's files say: XNNPACK, and with it LiteRT and tflite-runtime, silently falls back to
plain kernels where /sys/devices/system/cpu is missing, while ONNX Runtime crashes at import when it reads an x86 machine's caches
there. So the root folder gets the few files that a real board has, for as long as a run lasts.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from device_tests.board import ARM_PARTS
from device_tests.devices import DeviceUnavailable
from device_tests.devices.job import THREAD_VARIABLES, how_it_ended
from device_tests.devices.lab import SITE, Lab
from device_tests.devices.lab_enter import Entry
from device_tests.devices.local import PACKAGE_ROOT, child_environment

PYTHON = "/usr/bin/python3.11"
CODE = "/mnt/code"
START_S = 120.0  # an emulated Python starts in less than a second on an idle machine
CPUINFO = """processor\t: {number}
Features\t: {flags}
CPU implementer\t: 0x41
CPU architecture: 8
CPU variant\t: 0x0
CPU part\t: {part:#05x}
CPU revision\t: 0

"""


@dataclass(frozen=True)
class Arm64:
    """A processor by qemu's name, in a lab's root folder."""

    lab: Lab
    cpu: str

    @property
    def emulator(self) -> str:
        return str(self.lab.emulator("aarch64"))

    def known(self) -> list[str]:
        """Every processor that the emulator has."""
        # a heading of two words, then the names; the emulator ends with exit code 1 after them
        return subprocess.run([self.emulator, "-cpu", "help"], capture_output=True, text=True, check=False).stdout.split()[2:]

    def python(self, words: list[str], threads: int, binds: Iterable[tuple[str, str]] = (), files: dict[str, str] | None = None) -> Entry:
        """``python3 words...`` with this package and the runtimes importable."""
        environment = {"PATH": "/usr/bin:/bin", "HOME": "/tmp", "LANG": "C.UTF-8", "PYTHONPATH": f"{CODE}:/{SITE}"}
        environment.update({"PYTHONDONTWRITEBYTECODE": "1", **{variable: str(threads) for variable in THREAD_VARIABLES}})
        return Entry(
            root=str(self.lab.root),
            command=[self.emulator, "-cpu", self.cpu, PYTHON, *words],
            environment=environment,
            binds=[(str(PACKAGE_ROOT / "device_tests"), f"{CODE}/device_tests"), *binds],
            files=files or {},
            program=self.emulator,
        )

    def board(self) -> dict[str, Any]:
        """What ``device_tests.board`` says there. DeviceUnavailable when the machine cannot be entered or its Python not started."""
        return board_of(self.python(["-m", "device_tests.board"], 1).words())


def files_of(cpu: str, flags: list[str]) -> dict[str, str]:
    """The kernel's files about a processor of that name and those instruction sets, as many as this machine has."""
    cores = os.cpu_count() or 1
    listed = "0" if cores == 1 else f"0-{cores - 1}"
    part = {name.lower(): part for part, name in ARM_PARTS.items()}.get(cpu, 0)  # 0: its kind is not known, its flags are
    cpuinfo = "".join(CPUINFO.format(number=number, flags=" ".join(flags), part=part) for number in range(cores))
    return {"/proc/cpuinfo": cpuinfo, **{f"/sys/devices/system/cpu/{name}": f"{listed}\n" for name in ("possible", "present", "online")}}


def board_of(command: list[str]) -> dict[str, Any]:
    """What ``command`` prints, which runs ``device_tests.board`` on an emulated processor. DeviceUnavailable when it cannot."""
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
