"""The wheels that a board can be given: every version pinned, every file with its SHA-256, for all Pythons that have one.

The pins are in ``ssh_wheels.lock.json``; ``python -m device_tests.devices.ssh_wheels_update`` writes it from the versions that are
installed here. Reference for the names: the binary distribution format and the platform tags manylinux_x_y of Python packaging.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from device_tests.artifact import sha256_of
from device_tests.devices import DeviceUnavailable
from device_tests.sessions import RUNTIMES

LOCK = Path(__file__).with_name("ssh_wheels.lock.json")
CACHE = Path(".pocketlm") / "wheels"
OLDEST_GLIBC = 17  # glibc 2.17: older than every wheel wants
MANYLINUX_2014 = "manylinux2014"  # the old name of manylinux_2_17


@dataclass(frozen=True)
class Target:
    """What a wheel has to fit: CPython's version such as (3, 11), glibc's such as (2, 36), and the machine."""

    python: tuple[int, int]
    glibc: tuple[int, int]
    isa: str

    @property
    def name(self) -> str:
        return f"Python {self.python[0]}.{self.python[1]} on {self.isa} with glibc {self.glibc[0]}.{self.glibc[1]}"


@dataclass(frozen=True)
class Wheel:
    """A file of the lock. ``unpacked_bytes`` is what its files take once they lie on the board."""

    name: str
    version: str
    file: str
    sha256: str
    bytes: int
    unpacked_bytes: int

    @property
    def requirement(self) -> str:
        """A line for pip, which then takes this very file or none."""
        return f"{self.name}=={self.version} --hash=sha256:{self.sha256}"

    def fits(self, target: Target) -> bool:
        """Whether a board of that kind can use it."""
        pythons, abis, platforms = (part.split(".") for part in self.file[: -len(".whl")].split("-")[-3:])
        return _fits_python(pythons, abis, target.python) and any(_fits_platform(platform, target) for platform in platforms)


@dataclass(frozen=True)
class Lock:
    """``runtimes``: runtime -> names of all packages that it is made of. Of several wheels that fit, the first is meant."""

    runtimes: dict[str, tuple[str, ...]]
    wheels: tuple[Wheel, ...]


def read_lock(path: Path = LOCK) -> Lock:
    """The pins. KeyError or TypeError where the file, which is part of the program, was damaged."""
    record = json.loads(path.read_text(encoding="utf-8"))
    return Lock({name: tuple(parts) for name, parts in record["runtimes"].items()}, tuple(Wheel(**wheel) for wheel in record["wheels"]))


def choose(lock: Lock, target: Target) -> tuple[dict[str, Wheel], dict[str, str]]:
    """The wheels to install by package, and the runtimes that cannot be had with the reason."""
    chosen: dict[str, Wheel] = {}
    missing: dict[str, str] = {}
    for runtime, parts in lock.runtimes.items():
        found = {part: next((wheel for wheel in lock.wheels if wheel.name == part and wheel.fits(target)), None) for part in parts}
        lacking = [part for part, wheel in found.items() if wheel is None]
        if lacking:
            missing[runtime] = why_missing(lock, lacking[0], target)
        else:
            chosen.update({part: wheel for part, wheel in found.items() if wheel is not None})
    return chosen, missing


def why_missing(lock: Lock, part: str, target: Target) -> str:
    """One line: what the package has wheels for, and what the board is."""
    wheels = [wheel for wheel in lock.wheels if wheel.name == part]
    fitting = [wheel for wheel in wheels if wheel.fits(Target(target.python, (2, 99), target.isa))]
    if fitting:
        needed = min(int(minor) for wheel in fitting for minor in re.findall(r"manylinux_2_(\d+)", wheel.file))
        return f"{part} {fitting[0].version} needs glibc 2.{needed}, the board has {target.glibc[0]}.{target.glibc[1]}; use a newer system"
    minors = sorted({int(minor) for wheel in wheels if target.isa in wheel.file for minor in re.findall(r"-cp3(\d+)-cp", wheel.file)})
    if not minors:
        return f"{part} has no wheels for {target.isa}; use another board"
    had = ", ".join(f"3.{minor}" for minor in minors)
    return f"{part} {wheels[0].version} has wheels for Python {had}, the board has {target.python[0]}.{target.python[1]}"


def fetch(wheels: list[Wheel], target: Target, cache: Path = CACHE) -> list[Path]:
    """Files of the wheels on this machine, downloaded by its pip where they are not in ``cache``. DeviceUnavailable without a network."""
    cache.mkdir(parents=True, exist_ok=True)
    missing = [wheel for wheel in wheels if not _is_whole(cache / wheel.file, wheel)]
    if missing:
        with tempfile.TemporaryDirectory(dir=cache, prefix="draft-") as folder:
            pins = Path(folder) / "pins.txt"
            pins.write_text("".join(f"{wheel.requirement}\n" for wheel in missing), encoding="utf-8")
            arguments = ["--no-deps", "--require-hashes", "--dest", folder, "--requirement", str(pins)]
            pip("download", *arguments, *platform_options(target))
            for wheel in missing:
                (Path(folder) / wheel.file).replace(cache / wheel.file)
    return [cache / wheel.file for wheel in wheels]


def platform_options(target: Target) -> list[str]:
    """Options that make pip choose for the board instead of this machine."""
    minors = range(OLDEST_GLIBC, target.glibc[1] + 1)
    platforms = [f"manylinux_2_{minor}_{target.isa}" for minor in minors] + [f"{MANYLINUX_2014}_{target.isa}"]
    tag = f"cp{target.python[0]}{target.python[1]}"
    options = ["--only-binary=:all:", "--implementation", "cp", "--python-version", f"{target.python[0]}.{target.python[1]}"]
    options += [word for abi in (tag, "abi3", "none") for word in ("--abi", abi)]
    return options + [word for platform in platforms for word in ("--platform", platform)]


def pip(*arguments: str) -> None:
    """Run this machine's pip. DeviceUnavailable with its first complaint."""
    # every version is pinned already: constraints of the machine would only get in the way
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        complaints = [line.strip() for line in done.stderr.splitlines() if "ERROR:" in line or "No module named pip" in line]
        complaint = complaints[0].replace("ERROR: ", "") if complaints else f"pip ended with exit code {done.returncode}"
        raise DeviceUnavailable(f"the board's wheels cannot be had here ({complaint}); check the network and pip's index, then run again")


def runtimes_by_package() -> dict[str, str]:
    """Name for pip -> runtime."""
    return {package: runtime for runtime, (_, _, _, package) in RUNTIMES.items()}


def _fits_python(pythons: list[str], abis: list[str], version: tuple[int, int]) -> bool:
    exact = f"cp{version[0]}{version[1]}"
    if exact in pythons and exact in abis:
        return True
    if "abi3" in abis:
        return any(int(minor) <= version[1] for python in pythons for minor in re.findall(r"^cp3(\d+)$", python))
    return "none" in abis and f"py{version[0]}" in pythons


def _fits_platform(platform: str, target: Target) -> bool:
    if platform in ("any", f"{MANYLINUX_2014}_{target.isa}"):
        return True
    found = re.fullmatch(rf"manylinux_(\d+)_(\d+)_{target.isa}", platform)
    return found is not None and (int(found[1]), int(found[2])) <= target.glibc


def _is_whole(file: Path, wheel: Wheel) -> bool:
    return file.is_file() and sha256_of(file) == wheel.sha256
