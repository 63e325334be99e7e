"""The runtimes' aarch64 wheels, by this machine's own pip and index, each checked against its SHA-256."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from device_tests.artifact import sha256_of
from device_tests.devices import DeviceUnavailable
from device_tests.devices.lab_debian import is_whole
from device_tests.devices.lab_lock import Wheel
from device_tests.errors import DeviceTestError

RUNTIMES = ("onnxruntime", "onnxruntime-extensions", "ai-edge-litert", "tflite-runtime", "numpy")
PYTHON = "3.11"
GLIBC_MINORS = range(17, 37)  # manylinux names the oldest glibc that a wheel runs with; bookworm has 2.36
PLATFORM = [
    *(word for minor in GLIBC_MINORS for word in ("--platform", f"manylinux_2_{minor}_aarch64")), "--platform", "manylinux2014_aarch64",
    "--python-version", PYTHON, "--implementation", "cp", "--abi", "cp311", "--abi", "abi3", "--abi", "none", "--only-binary=:all:",
]  # fmt: skip


def fetch(wheels: tuple[Wheel, ...], downloads: Path) -> None:
    """Download what is not there yet. A wheel whose bytes differ from the pin is an error: an index never changes a file."""
    missing = [wheel for wheel in wheels if not is_whole(downloads / wheel.file, wheel.sha256)]
    if not missing:
        return
    with tempfile.TemporaryDirectory(dir=downloads, prefix="draft-") as folder:
        pins = Path(folder) / "pins.txt"
        pins.write_text("".join(f"{wheel.name}=={wheel.version} --hash=sha256:{wheel.sha256}\n" for wheel in missing), encoding="utf-8")
        _pip("download", "--no-deps", "--require-hashes", "--dest", folder, "--requirement", str(pins), *PLATFORM)
        for wheel in missing:
            file = Path(folder) / wheel.file
            if not file.is_file():
                raise DeviceUnavailable(f"{wheel.name} {wheel.version}: the index gave another file than {wheel.file}; use --update-lock")
            file.replace(downloads / wheel.file)


def install(wheels: tuple[Wheel, ...], downloads: Path, target: Path) -> None:
    """Unpack the wheels into ``target``, a folder for PYTHONPATH."""
    files = [str(downloads / wheel.file) for wheel in wheels]
    _pip("install", "--no-deps", "--no-index", "--no-compile", "--target", str(target), *PLATFORM, *files)


def resolve(downloads: Path) -> tuple[Wheel, ...]:
    """The wheels that this environment's versions of the runtimes need on aarch64; they stay in ``downloads``."""
    try:
        asked = [f"{name}=={version(name)}" for name in RUNTIMES]
    except PackageNotFoundError as error:
        raise DeviceTestError(f"{error.name} is not installed here, so its version is not known; run make first") from error
    with tempfile.TemporaryDirectory(dir=downloads, prefix="draft-") as folder:
        constraints = Path(folder) / "constraints.txt"
        installed = {found.metadata["Name"]: found.version for found in distributions()}
        constraints.write_text("".join(f"{name}=={number}\n" for name, number in installed.items()), encoding="utf-8")
        _pip("download", "--dest", folder, "--constraint", str(constraints), *PLATFORM, *asked)
        wheels = tuple(_described(file) for file in sorted(Path(folder).glob("*.whl")))
        for wheel in wheels:
            (Path(folder) / wheel.file).replace(downloads / wheel.file)
    return wheels


def _pip(*arguments: str) -> None:
    """DeviceUnavailable with pip's last complaint."""
    # every version is pinned already: constraints of the machine would only get in the way
    environment = {**os.environ, "PIP_CONSTRAINT": os.devnull, "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    command = [sys.executable, "-m", "pip", arguments[0], "--quiet", *arguments[1:]]
    done = subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        complaints = [line.strip() for line in done.stderr.splitlines() if "ERROR:" in line or "No module named pip" in line]
        complaint = complaints[0].replace("ERROR: ", "") if complaints else f"pip ended with exit code {done.returncode}"
        raise DeviceUnavailable(f"the aarch64 wheels cannot be had ({complaint}); check the network and pip's index, then run again")


def _described(file: Path) -> Wheel:
    name, number = file.name.split("-")[:2]
    return Wheel(re.sub(r"[-_.]+", "-", name).lower(), number, file.name, sha256_of(file))
