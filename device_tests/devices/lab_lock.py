"""The pins of the emulated ARM64 machine: every Debian package and every wheel by name, version and SHA-256."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from device_tests.artifact import read_json
from device_tests.errors import DeviceTestError

LOCK = Path(__file__).with_name("arm64.lock.json")


@dataclass(frozen=True)
class Package:
    """A Debian package. ``architecture`` is arm64 or all for what lies in the root folder, amd64 for the emulator itself."""

    name: str
    architecture: str
    version: str
    sha256: str

    @property
    def deb(self) -> str:
        """The name under which its file is kept between builds."""
        return f"{self.name}_{self.architecture}_{self.sha256[:16]}.deb"


@dataclass(frozen=True)
class Wheel:
    """A Python wheel for aarch64, or one that fits every machine."""

    name: str
    version: str
    file: str
    sha256: str


@dataclass(frozen=True)
class Lock:
    """What the machine is built from. ``release`` is the code name of the Debian release."""

    release: str
    packages: tuple[Package, ...]
    wheels: tuple[Wheel, ...]


def read_lock(path: Path = LOCK) -> Lock:
    """The pins in ``path``. DeviceTestError where it is none or lacks something."""
    record = read_json(path, "the lock file of the emulated ARM64 machine")
    try:
        packages = tuple(Package(**package) for package in record["packages"])
        wheels = tuple(Wheel(**wheel) for wheel in record["wheels"])
        lock = Lock(str(record["release"]), packages, wheels)
    except (KeyError, TypeError) as error:
        raise DeviceTestError(f"{path}: not a lock file ({error}); write it anew with --update-lock") from error
    pins = [*lock.packages, *lock.wheels]
    broken = [pin.name for pin in pins if not _is_sha256(pin.sha256)]
    if broken or not packages or not wheels:
        raise DeviceTestError(f"{path}: no SHA-256 for {', '.join(broken) or 'anything'}; write it anew with --update-lock")
    return lock


def write_lock(lock: Lock, path: Path = LOCK) -> None:
    """Write whole or not at all, in an order that makes two locks comparable."""
    record = {
        "release": lock.release,
        "packages": [asdict(package) for package in sorted(lock.packages, key=lambda package: (package.architecture, package.name))],
        "wheels": [asdict(wheel) for wheel in sorted(lock.wheels, key=lambda wheel: wheel.name)],
    }
    draft = path.with_name(path.name + ".draft")
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, path)


def _is_sha256(text: object) -> bool:
    return isinstance(text, str) and len(text) == 64 and set(text) <= set("0123456789abcdef")
