"""Pin the wheels for boards: python -m device_tests.devices.ssh_wheels_update

For every Python and machine that a board may have, this machine's pip resolves each runtime at the version that is installed here;
what it finds is written to the lock with size and SHA-256. Run it after a runtime's version was changed.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
import tempfile
import zipfile
from dataclasses import asdict
from importlib.metadata import distributions, version
from pathlib import Path

from device_tests.artifact import sha256_of
from device_tests.devices import DeviceUnavailable
from device_tests.devices.ssh_wheels import LOCK, Lock, Target, Wheel, pip, platform_options, runtimes_by_package
from device_tests.errors import DeviceTestError

PYTHONS = tuple((3, minor) for minor in range(9, 15))
ISAS = ("aarch64", "x86_64")
NEWEST_GLIBC = (2, 39)
NUMPY_2 = (3, 13)  # from here on there is no wheel of the numpy 1 that tflite-runtime needs; the others take either
NUMPY_FOR_THOSE = "2.3.5"


def resolve() -> Lock:
    """Ask the index for everything. A runtime without wheels for one Python or machine is left out there."""
    wheels: dict[str, Wheel] = {}
    runtimes: dict[str, set[str]] = {runtime: set() for runtime in runtimes_by_package().values()}
    with tempfile.TemporaryDirectory(prefix="wheels-") as folder:
        for target in (Target(python, NEWEST_GLIBC, isa) for python in PYTHONS for isa in ISAS):
            constraints = Path(folder) / "constraints.txt"
            constraints.write_text(pins(target), encoding="utf-8")
            for package, runtime in runtimes_by_package().items():
                place = Path(folder) / f"{runtime}-{target.python[1]}-{target.isa}"
                asked = f"{package}=={version(package)}"
                try:
                    pip("download", "--dest", str(place), "--constraint", str(constraints), *platform_options(target), asked)
                except DeviceUnavailable as error:
                    print(f"{runtime} for {target.name}: {error}", file=sys.stderr)
                    continue
                for file in place.glob("*.whl"):
                    wheels[file.name] = wheels.get(file.name) or described(file)
                    runtimes[runtime].add(wheels[file.name].name)
    ordered = tuple(wheels[name] for name in sorted(wheels))
    return Lock({runtime: tuple(sorted(parts)) for runtime, parts in runtimes.items()}, ordered)


def pins(target: Target) -> str:
    """What is installed here, as constraints; with another numpy for Pythons that ours has no wheel for."""
    installed = {found.metadata["Name"].lower(): found.version for found in distributions()}
    if target.python >= NUMPY_2:
        installed["numpy"] = NUMPY_FOR_THOSE
    return "".join(f"{name}=={number}\n" for name, number in sorted(installed.items()))


def described(file: Path) -> Wheel:
    """A wheel's line in the lock. DeviceTestError for one that is not made by unpacking alone."""
    name, number = file.name.split("-")[:2]
    with zipfile.ZipFile(file) as archive:
        members = archive.infolist()
    if any(re.match(r"[^/]+\.data/(?!scripts/)", member.filename) for member in members):
        raise DeviceTestError(f"{file.name} has files for other places than site-packages; boards could not be given it without pip")
    unpacked = sum(member.file_size for member in members)
    return Wheel(re.sub(r"[-_.]+", "-", name).lower(), number, file.name, sha256_of(file), file.stat().st_size, unpacked)


def main(arguments: list[str] | None = None) -> int:
    """Resolve and write, whole or not at all."""
    command = argparse.ArgumentParser(prog="python -m device_tests.devices.ssh_wheels_update", description=__doc__.splitlines()[0])
    command.parse_args(arguments)
    try:
        lock = resolve()
    except DeviceTestError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    draft = LOCK.with_name(LOCK.name + ".draft")
    record = {"runtimes": lock.runtimes, "wheels": [asdict(wheel) for wheel in lock.wheels]}
    draft.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(draft, LOCK)
    print(f"{LOCK.name}: {len(lock.wheels)} wheels")
    return 0


if __name__ == "__main__":
    sys.exit(main())
