"""Building the emulated machine: pins, what is refused in one line, draft and rename. Nothing here needs a network."""

import hashlib
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
import zipfile
from importlib.metadata import version
from pathlib import Path

import pytest

from device_tests.devices import DeviceUnavailable, lab, lab_debian, lab_wheels
from device_tests.devices.lab_lock import LOCK, Lock, Package, Wheel, read_lock, write_lock
from device_tests.devices.local import PACKAGE_ROOT
from device_tests.errors import DeviceTestError

PACKAGE = Package("libx", "arm64", "1:1.0-1", "a" * 64)
WHEEL = Wheel("tiny", "1.0", "tiny-1.0-py3-none-any.whl", "b" * 64)
PINS = Lock("bookworm", (PACKAGE,), (WHEEL,))
needs_dpkg = pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb on this machine")


def silent(what: str, state: str) -> None:
    """Nobody listens."""


def test_the_lock_pins_every_package_and_the_runtimes_that_are_tested_here():
    lock = read_lock()
    assert {(package.name, "amd64" if package.architecture == "amd64" else "arm64") for package in lock.packages} == set(
        lab_debian.wanted()
    )
    assert len({wheel.sha256 for wheel in lock.wheels}) == len(lock.wheels)
    pinned = {wheel.name: wheel.version for wheel in lock.wheels}
    installed = {name: version(name) for name in lab_wheels.RUNTIMES}
    assert {name: pinned[name] for name in installed} == installed, "run python -m device_tests.devices.lab --update-lock"
    assert all(re.search(r"aarch64|-none-any", wheel.file) for wheel in lock.wheels)
    assert "://" not in LOCK.read_text(encoding="utf-8"), "packages are named, places are the machine's own"


def test_a_lock_comes_back_as_it_was_written(tmp_path):
    other = Package("liba", "all", "2", "c" * 64)
    write_lock(Lock("bookworm", (PACKAGE, other), (WHEEL,)), tmp_path / "lock.json")
    found = read_lock(tmp_path / "lock.json")
    assert set(found.packages) == {PACKAGE, other} and found.wheels == (WHEEL,) and found.release == "bookworm"
    write_lock(Lock("bookworm", (other, PACKAGE), (WHEEL,)), tmp_path / "again.json")
    assert (tmp_path / "again.json").read_bytes() == (tmp_path / "lock.json").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again.json", "lock.json"]


@pytest.mark.parametrize(
    "spoil, words",
    [
        (lambda record: record.pop("wheels"), "wheels"),
        (lambda record: record["packages"][0].pop("sha256"), "sha256"),
        (lambda record: record["packages"][0].update(sha256="a" * 63), "no SHA-256 for libx"),
        (lambda record: record["wheels"][0].update(sha256=None), "no SHA-256 for tiny"),
        (lambda record: record.update(packages=[]), "no SHA-256 for anything"),
    ],
    ids=["no wheels", "no hash", "short hash", "null hash", "no packages"],
)
def test_a_broken_lock_is_one_line(tmp_path, spoil, words):
    write_lock(PINS, tmp_path / "lock.json")
    record = json.loads((tmp_path / "lock.json").read_text())
    spoil(record)
    (tmp_path / "lock.json").write_text(json.dumps(record))
    with pytest.raises(DeviceTestError, match=f"{words}.*--update-lock$"):
        read_lock(tmp_path / "lock.json")


def test_a_withdrawn_package_is_replaced_in_one_line():
    kept, newer = Package("liba", "all", "2", "c" * 64), Package("libx", "arm64", "1:1.0-2", "d" * 64)
    told = []
    chosen = lab_debian.choose((PACKAGE, kept), [kept, newer], [kept, newer], lambda *line: told.append(line))
    assert chosen == [newer, kept]
    assert told == [("arm64-lab", "libx 1:1.0-1 is withdrawn, taking 1:1.0-2")]
    # the same version with other bytes is not the pinned package
    assert lab_debian.choose((PACKAGE,), [newer], [newer], silent) == [newer]
    with pytest.raises(DeviceUnavailable, match="offer no libx for arm64"):
        lab_debian.choose((PACKAGE,), [kept], [kept], silent)


@pytest.mark.parametrize(
    "change, words",
    [
        (("machine", "aarch64"), "is ARM64 itself.*--device local$"),
        (("machine", "riscv64"), "needs Linux on x86-64, this is linux on riscv64"),
        (("platform", "darwin"), "this is darwin on x86_64"),
        (("release", "debian trixie"), "from Debian bookworm's packages, this is debian trixie"),
        (("program", "dpkg-deb"), "needs dpkg-deb"),
    ],
    ids=["arm64", "riscv", "mac", "release", "no dpkg"],
)
def test_another_machine_is_told_what_is_needed(monkeypatch, change, words):
    kind, value = change
    monkeypatch.setattr(platform, "machine", lambda: value if kind == "machine" else "x86_64")
    monkeypatch.setattr(sys, "platform", value if kind == "platform" else "linux")
    monkeypatch.setattr(lab, "release_of", lambda file: value if kind == "release" else "debian bookworm")
    monkeypatch.setattr(shutil, "which", lambda name: None if name == value else f"/usr/bin/{name}")
    with pytest.raises(DeviceUnavailable, match=words):
        lab.check_host(PINS)


def test_the_release_is_read_as_distributions_write_it(tmp_path):
    (tmp_path / "debian").write_text('PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_CODENAME=bookworm\nID=debian\n')
    (tmp_path / "alpine").write_text('ID=alpine\nVERSION_ID="3.20"\n')
    assert lab.release_of(tmp_path / "debian") == "debian bookworm"
    assert lab.release_of(tmp_path / "alpine") == "alpine 3.20"
    assert "no Linux" in lab.release_of(tmp_path / "missing")


def test_a_program_that_fails_or_is_missing_is_one_line():
    with pytest.raises(DeviceUnavailable, match=r"the lists cannot be had \(E: no such place\); check the network"):
        lab_debian.output_of(["sh", "-c", "echo 'W: a warning' >&2; echo 'E: no such place' >&2; echo more >&2; exit 100"], "the lists")
    with pytest.raises(DeviceUnavailable, match="no-such-program is not on this machine; install it"):
        lab_debian.output_of(["no-such-program"], "the lists")


@needs_dpkg
def test_packages_keep_the_merged_layout_and_only_two_programs_are_taken_from_the_emulators(tmp_path):
    def deb(name: str, files: list[str]) -> Package:
        folder = tmp_path / name
        for file in (f"{name}/DEBIAN/control", *(f"{name}/{file}" for file in files)):
            (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / file).write_text(file)
        (folder / "DEBIAN/control").write_text(f"Package: {name}\nVersion: 1\nArchitecture: all\nMaintainer: nobody\nDescription: none\n")
        package = Package(name, "amd64" if name == "qemu" else "arm64", "1", hashlib.sha256(name.encode()).hexdigest())
        subprocess.run(["dpkg-deb", "--build", str(folder), str(tmp_path / package.deb)], check=True, capture_output=True)
        return package

    packages = [deb("shell", ["bin/sh", "usr/bin/env", "usr/share/doc/shell/copyright"])]
    packages += [deb("qemu", [*(f"usr/bin/{name}" for name in lab_debian.EMULATORS), "usr/bin/qemu-m68k-static"])]
    lab_debian.unpack(packages, tmp_path, tmp_path / "root", tmp_path / "emulators")
    assert (tmp_path / "root/bin").is_symlink() and (tmp_path / "root/usr/bin/sh").read_text() == "shell/bin/sh"
    assert not (tmp_path / "root/usr/share/doc/shell").exists()
    assert sorted(path.name for path in (tmp_path / "emulators").iterdir()) == sorted(lab_debian.EMULATORS)
    (tmp_path / packages[0].deb).write_bytes(b"no package")
    with pytest.raises(DeviceUnavailable, match=f"{packages[0].deb} cannot be unpacked.*run again$"):
        lab_debian.unpack(packages[:1], tmp_path, tmp_path / "other", tmp_path / "other-emulators")


@pytest.fixture()
def index(tmp_path, monkeypatch) -> Wheel:
    """A folder that pip takes for its index, with one wheel in it."""
    folder = tmp_path / "index"
    folder.mkdir()
    with zipfile.ZipFile(folder / WHEEL.file, "w") as archive:
        archive.writestr("tiny.py", "NUMBER = 7\n")
        archive.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        archive.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny-1.0.dist-info/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return Wheel("tiny", "1.0", WHEEL.file, hashlib.sha256((folder / WHEEL.file).read_bytes()).hexdigest())


def test_a_wheel_with_the_pinned_bytes_is_fetched_once_and_unpacked(tmp_path, index, monkeypatch):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    lab_wheels.fetch((index,), downloads)
    assert [path.name for path in downloads.iterdir()] == [WHEEL.file]
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    lab_wheels.fetch((index,), downloads)  # it is there: the index is not asked again
    lab_wheels.install((index,), downloads, tmp_path / "site")
    assert (tmp_path / "site/tiny.py").read_text() == "NUMBER = 7\n"
    (downloads / WHEEL.file).write_bytes(b"torn")
    with pytest.raises(DeviceUnavailable, match="the aarch64 wheels cannot be had"):
        lab_wheels.fetch((index,), downloads)


def test_a_wheel_with_other_bytes_is_refused(tmp_path, index):
    downloads = tmp_path / "downloads"
    downloads.mkdir()
    with pytest.raises(DeviceUnavailable, match="(?i)the aarch64 wheels cannot be had .*hash") as refusal:
        lab_wheels.fetch((WHEEL,), downloads)
    assert "\n" not in str(refusal.value) and list(downloads.iterdir()) == []


@pytest.fixture()
def parts(monkeypatch):
    """Building without packages: the parts that fetch are left out, ``unpack`` makes one file. Returns how often it was called."""
    calls = []

    def unpack(packages, downloads, root, emulators):
        calls.append(root)
        root.mkdir(parents=True)
        (root / "etc").mkdir()
        (root / "usr/bin").mkdir(parents=True)
        time.sleep(0.2)

    monkeypatch.setattr(lab, "check_host", lambda lock: None)
    monkeypatch.setattr(lab, "_fetched_packages", lambda apt, downloads, lock, tell: list(lock.packages))
    monkeypatch.setattr(lab_debian, "unpack", unpack)
    monkeypatch.setattr(lab_wheels, "fetch", lambda wheels, downloads: None)
    monkeypatch.setattr(lab_wheels, "install", lambda wheels, downloads, target: target.mkdir(parents=True))
    return calls


def folders(work: Path) -> list[str]:
    return sorted(path.name for path in (work / "arm64-lab").iterdir() if path.name not in ("downloads", "lock"))


def test_it_is_built_once_and_says_what_is_in_it(tmp_path, parts):
    told = []
    first = lab.lab_at(tmp_path, lambda *line: told.append(line))
    second = lab.lab_at(tmp_path, lambda *line: told.append(line))
    assert first == second and len(parts) == 1 and folders(tmp_path) == [lab.key_of(read_lock())]
    record = first.record()
    assert [package["sha256"] for package in record["packages"]] == [package.sha256 for package in read_lock().packages]
    assert [wheel["version"] for wheel in record["wheels"]] == [wheel.version for wheel in read_lock().wheels]
    assert [state for _, state in told if "built in" in state]


def test_other_pins_are_another_machine(tmp_path, parts):
    write_lock(PINS, tmp_path / "lock.json")
    first = lab.lab_at(tmp_path, silent, tmp_path / "lock.json")
    newer = Lock("bookworm", (Package("libx", "arm64", "1:1.0-2", "d" * 64),), (WHEEL,))
    write_lock(newer, tmp_path / "lock.json")
    assert lab.lab_at(tmp_path, silent, tmp_path / "lock.json") != first and len(parts) == 2


def test_a_failure_leaves_nothing_and_does_not_stay(tmp_path, parts, monkeypatch):
    def full(wheels, downloads, target):
        raise DeviceUnavailable("no room")

    with monkeypatch.context() as broken:
        broken.setattr(lab_wheels, "install", full)
        with pytest.raises(DeviceUnavailable, match="no room"):
            lab.lab_at(tmp_path, silent)
    assert folders(tmp_path) == []
    assert lab.lab_at(tmp_path, silent).root.is_dir()


def test_two_at_once_build_one(tmp_path, parts):
    found = []
    threads = [threading.Thread(target=lambda: found.append(lab.lab_at(tmp_path, silent))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 2 and found[0] == found[1] and len(parts) == 1


KILLED = """import sys, time
from pathlib import Path
from device_tests.devices import lab, lab_debian
def unpack(packages, downloads, root, emulators):
    root.mkdir(parents=True)
    (root / "half").touch()
    print("unpacking", flush=True)
    time.sleep(60)
lab.check_host = lambda lock: None
lab._fetched_packages = lambda apt, downloads, lock, tell: []
lab.lab_wheels.fetch = lambda wheels, downloads: None
lab_debian.unpack = unpack
lab.lab_at(Path(sys.argv[1]), lambda what, state: None)
"""


def test_a_killed_build_is_not_taken_for_a_whole_one(tmp_path, parts):
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path)], cwd=PACKAGE_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "unpacking\n", process.stderr.read()
        os.kill(process.pid, signal.SIGKILL)
    assert folders(tmp_path) == [f"{lab.key_of(read_lock())}.draft"]
    built = lab.lab_at(tmp_path, silent)
    assert not (built.root / "half").exists() and folders(tmp_path) == [built.folder.name]


def test_the_command_ends_in_one_line_where_it_cannot_build(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    assert lab.main(["--work", str(tmp_path)]) == 2
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1 and "use --device local" in told.err
