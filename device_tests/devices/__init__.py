"""The machines that artifacts are tested on, driven from the one that builds. Python and its standard library only.

``local`` is this machine, ``arm64`` an emulated one, ``ssh://`` a board, ``adb://`` a phone. ``open_device`` gives each of them as
the same thing: something that takes a job and gives back a result.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

from device_tests.devices.job import Job
from device_tests.errors import DeviceTestError

Tell = Callable[[str, str], None]
# how an address begins -> the module that opens it, imported when it is wanted
DRIVERS = {
    "local": "device_tests.devices.local",
    "arm64": "device_tests.devices.emulated",
    "avx2": "device_tests.devices.emulated",
    "ssh": "device_tests.devices.ssh",
    "adb": "device_tests.devices.adb",
}
EMULATED = ("arm64", "avx2")
WORK = Path(".pocketlm")
FORMS = (
    "local, arm64, arm64?cpu=cortex-a72, avx2, ssh://user@host[:port][?threads=4] or "
    "adb://serial?benchmark_model=PATH&onnxruntime_perf_test=PATH"
)


class Device(Protocol):
    """An open device. ``board`` is what ``device_tests.board`` says of it, None where that cannot be asked.

    ``emulated``: numbers are right there, times mean nothing. ``threads`` overrides the jobs' number, None leaves it. ``missing``
    are the runtimes that cannot be had there, with the reason. ``board["bandwidth_gb_s"]`` maps thread counts, as text, to GB/s.
    """

    name: str
    emulated: bool
    threads: int | None
    board: dict[str, Any] | None
    missing: dict[str, str]

    def run(self, job: Job) -> dict[str, Any]:
        """The job's result, whatever became of it. DeviceTestError only when the device itself is lost."""


class DeviceUnavailable(DeviceTestError):
    """The device cannot be used, or was lost: nothing is known of the artifacts there. Exit code 2."""


def check_address(address: str) -> None:
    """DeviceTestError for an address that says nothing, before anything is opened."""
    driver_of(address).parse(address)


@contextmanager
def open_device(address: str, tell: Tell, work: Path = WORK) -> Iterator[Device]:
    """Open the device at ``address`` and leave nothing behind on it. DeviceUnavailable says why it cannot be used.

    ``work`` is the folder in which emulated machines are built and kept.
    """
    kept = (work,) if scheme_of(address) in EMULATED else ()
    opened: AbstractContextManager[Device] = driver_of(address).open_at(address, tell, *kept)
    with opened as device:
        yield device


def scheme_of(address: str) -> str:
    """How the address begins."""
    return address.split("://")[0].split("?")[0]


def driver_of(address: str) -> ModuleType:
    """The module that knows addresses of this kind. DeviceTestError where there is none."""
    if scheme_of(address) not in DRIVERS:
        raise DeviceTestError(f"device {address}: no such kind; give {FORMS}")
    return import_module(DRIVERS[scheme_of(address)])
