"""Build the emulated ARM64 machine: a root folder of Debian's arm64 packages and the aarch64 wheels of the runtimes.

    python -m device_tests.devices.lab                 build it, or say where it is
    python -m device_tests.devices.lab --update-lock   pin what the sources offer now

These are the binaries that a Raspberry Pi runs; qemu (Debian's, unpacked beside the root folder, not installed) runs them here.
No container engine and no rights are needed, and nothing of this machine is changed. The folder lives under
``<work>/arm64-lab/<key>``, where the key is a hash of the pins and of the code that builds it. It is made as a draft and renamed
into place; downloads are kept beside it.
"""

from __future__ import annotations

import argparse
import ast
import fcntl
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from device_tests.devices import WORK, DeviceUnavailable, lab_debian, lab_wheels
from device_tests.devices.lab_lock import LOCK, Lock, Package, read_lock, write_lock
from device_tests.errors import DeviceTestError

RECORD = "lab.json"
SITE = "opt/runtimes"  # in the root folder: apart from Python's own places, so that a login meets a bare board
PASSWD = "root:x:0:0:root:/root:/bin/bash\npi:x:1000:1000::/home/pi:/bin/bash\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
GROUP = "root:x:0:\npi:x:1000:\nnogroup:x:65534:\n"
Tell = Callable[[str, str], None]


@dataclass(frozen=True)
class Lab:
    """A finished machine: its root folder, the emulators and the record of what it was built from."""

    folder: Path

    @property
    def root(self) -> Path:
        return self.folder / "root"

    def emulator(self, name: str) -> Path:
        """Path of qemu for ``aarch64`` or ``x86_64``."""
        return self.folder / "qemu" / f"qemu-{name}-static"

    def record(self) -> dict:
        """Versions and SHA-256 of what is in it."""
        return json.loads((self.folder / RECORD).read_text(encoding="utf-8"))


def lab_at(work: Path, tell: Tell, lock_file: Path = LOCK) -> Lab:
    """The machine under ``work``, built if it is not there. DeviceUnavailable says what is missing for that."""
    lock = read_lock(lock_file)
    check_host(lock)
    folder = work.resolve() / "arm64-lab" / key_of(lock)
    if (folder / RECORD).is_file():
        return Lab(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.parent / "lock"):
        if not (folder / RECORD).is_file():
            _build(folder, lock, tell)
    return Lab(folder)


def key_of(lock: Lock) -> str:
    """Hash of the pins and of the code that makes a folder of them; comments do not count."""
    digest = hashlib.sha256(json.dumps(asdict(lock), sort_keys=True).encode())
    for module in (__file__, lab_debian.__file__, lab_wheels.__file__):
        digest.update(ast.dump(ast.parse(Path(module).read_text(encoding="utf-8"))).encode())
    return digest.hexdigest()[:16]


def check_host(lock: Lock) -> None:
    """DeviceUnavailable unless this machine can hold the emulated one."""
    if platform.machine() in ("aarch64", "arm64"):
        raise DeviceUnavailable("this machine is ARM64 itself, there is nothing to emulate; use --device local")
    if sys.platform != "linux" or platform.machine() != "x86_64":
        raise DeviceUnavailable(f"emulated ARM64 needs Linux on x86-64, this is {sys.platform} on {platform.machine()}; use --device local")
    found = release_of(Path("/etc/os-release"))
    if found != f"debian {lock.release}":
        raise DeviceUnavailable(
            f"emulated ARM64 is built from Debian {lock.release}'s packages, this is {found}; run it in Debian {lock.release}"
        )
    for program in ("apt-get", "apt-cache", "dpkg-deb", "tar"):
        if shutil.which(program) is None:
            raise DeviceUnavailable(f"emulated ARM64 needs {program}, which is not on this machine; install it")


def release_of(file: Path) -> str:
    """``debian bookworm`` or the like, from an os-release file."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except OSError:
        return "no Linux distribution that says its name"
    fields = dict(line.replace('"', "").split("=", 1) for line in lines if "=" in line)
    return f"{fields.get('ID', 'unknown')} {fields.get('VERSION_CODENAME', fields.get('VERSION_ID', ''))}".strip()


def update_lock(work: Path, lock_file: Path = LOCK) -> Lock:
    """Pin the newest packages that are offered and the wheels of this environment's versions."""
    release = release_of(Path("/etc/os-release"))
    check_host(Lock(release.removeprefix("debian "), (), ()))
    downloads, apt = _downloads(work.resolve() / "arm64-lab")
    apt.update()
    packages = apt.offered(lab_debian.wanted(), newest=True)
    missing = {name for name, _ in lab_debian.wanted()} - {package.name for package in packages}
    if missing:
        raise DeviceUnavailable(f"the machine's package sources offer no {', '.join(sorted(missing))}; add Debian's main")
    lock = Lock(release.removeprefix("debian "), tuple(packages), lab_wheels.resolve(downloads))
    write_lock(lock, lock_file)
    return lock


def _build(folder: Path, lock: Lock, tell: Tell) -> None:
    started = time.monotonic()
    downloads, apt = _downloads(folder.parent)
    packages = _fetched_packages(apt, downloads, lock, tell)
    lab_wheels.fetch(lock.wheels, downloads)
    for left in folder.parent.glob("*.draft"):  # of a killed build; whoever builds holds the lock
        shutil.rmtree(left)
    draft = folder.with_suffix(".draft")
    try:
        tell("arm64-lab", "unpacks")
        lab_debian.unpack(packages, downloads, draft / "root", draft / "qemu")
        lab_wheels.install(lock.wheels, downloads, draft / "root" / SITE)
        _furnish(draft / "root")
        record = {"seconds": round(time.monotonic() - started, 1), "release": lock.release}
        record["packages"] = [asdict(package) for package in packages]
        record["wheels"] = [asdict(wheel) for wheel in lock.wheels]
        (draft / RECORD).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        draft.rename(folder)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    tell("arm64-lab", f"built in {record['seconds']:.0f} s")


def _fetched_packages(apt: lab_debian.Apt, downloads: Path, lock: Lock, tell: Tell) -> list[Package]:
    """The packages to use, all of them in ``downloads``. The network is asked only when something is missing."""
    if all(lab_debian.is_whole(downloads / package.deb, package.sha256) for package in lock.packages):
        return list(lock.packages)
    tell("arm64-lab", "fetches")
    unreachable = None
    try:
        apt.update()
    except DeviceUnavailable as error:  # it may be a source that nothing of this comes from
        unreachable = error
    names = [(package.name, package.architecture) for package in lock.packages]
    try:
        chosen = lab_debian.choose(lock.packages, apt.offered(names), apt.offered(names, newest=True), tell)
    except DeviceUnavailable as error:
        raise (unreachable or error) from error
    apt.fetch(chosen)
    return chosen


def _furnish(root: Path) -> None:
    """What packages leave to their scripts, and compiled modules, because an emulated compiler is slow."""
    for folder in ("proc", "sys", "dev", "tmp", "mnt", "root", "run", "home"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "etc/passwd").write_text(PASSWD, encoding="utf-8")
    (root / "etc/group").write_text(GROUP, encoding="utf-8")
    (root / "etc/hostname").write_text("raspberrypi\n", encoding="utf-8")
    (root / "etc/hosts").write_text("127.0.0.1 localhost raspberrypi\n", encoding="utf-8")
    for link, target in (("usr/bin/awk", "mawk"), ("etc/mtab", "../proc/self/mounts")):
        if not (root / link).is_symlink():
            (root / link).symlink_to(target)
    if f"{sys.version_info.major}.{sys.version_info.minor}" == lab_wheels.PYTHON:  # else its byte code is another
        words = ["-m", "compileall", "-qq", "-j", "0", "-s", str(root), "-p", "/", str(root / "usr/lib/python3.11"), str(root / SITE)]
        subprocess.run([sys.executable, *words], check=False)  # a module that is for another Python does not compile: nobody imports it


def _downloads(folder: Path) -> tuple[Path, lab_debian.Apt]:
    downloads = folder / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    return downloads, lab_debian.Apt(downloads / "apt", downloads)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel drops it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main(arguments: list[str] | None = None) -> int:
    """Build or pin, and print where the result is."""
    command = argparse.ArgumentParser(prog="python -m device_tests.devices.lab", description=__doc__.splitlines()[0])
    command.add_argument("--work", type=Path, default=WORK, help="folder that it is kept in (default %(default)s)")
    command.add_argument("--update-lock", action="store_true", help="pin what is offered now instead of building")
    given = command.parse_args(arguments)
    try:
        if given.update_lock:
            lock = update_lock(given.work)
            print(f"{LOCK.name}: {len(lock.packages)} packages, {len(lock.wheels)} wheels")
            return 0
        lab = lab_at(given.work, lambda what, state: print(f"  {what:<12} {state}", file=sys.stderr))
    except DeviceTestError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print(lab.folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
