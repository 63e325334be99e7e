"""Debian packages of another architecture, by this machine's own apt and sources but in a state folder of ours.

Nothing of the machine's apt or dpkg state is read or changed, its hooks are not run, and no rights are needed.
Reference: apt-get(8), apt.conf(5), dpkg-deb(1).
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from pathlib import Path

from device_tests.artifact import sha256_of
from device_tests.devices import DeviceUnavailable
from device_tests.devices.lab_lock import Package

EMULATORS = ("qemu-aarch64-static", "qemu-x86_64-static")
# what a small Raspberry Pi OS has that our code, the wheels or a login over ssh use. No package scripts are run.
PYTHON = (
    "python3", "python3-minimal", "python3.11", "python3.11-minimal", "libpython3.11-minimal", "libpython3.11-stdlib", "libpython3-stdlib",
    "python3-venv", "python3.11-venv", "python3-distutils", "python3-lib2to3", "python3-pip-whl", "python3-setuptools-whl",
)  # fmt: skip
LIBRARIES = (
    "libc6", "libgcc-s1", "libstdc++6", "libgomp1", "zlib1g", "libexpat1", "libffi8", "libssl3", "libbz2-1.0", "liblzma5", "libsqlite3-0",
    "libuuid1", "libncursesw6", "libtinfo6", "libreadline8", "libdb5.3", "libcrypt1",
)  # fmt: skip
LOGIN = (
    "base-files", "libc-bin", "bash", "dash", "coreutils", "libacl1", "libattr1", "libgmp10", "libselinux1", "libpcre2-8-0", "debianutils",
    "findutils", "grep", "sed", "tar", "gzip", "hostname", "mawk", "util-linux", "libsmartcols1", "libcap-ng0", "libmount1", "libblkid1",
    "libudev1", "openssh-sftp-server",
)  # fmt: skip
UNREAD = ("doc", "man", "locale", "info", "lintian")  # below /usr/share: half of the files and read by nobody there
# the machine's own settings stay (a proxy, say); its hooks and lists would act on its own state
CONFIGURATION = """#clear APT::Update::Pre-Invoke;
#clear APT::Update::Post-Invoke;
#clear APT::Update::Post-Invoke-Success;
#clear Acquire::IndexTargets::deb::DEP-11;
#clear Acquire::IndexTargets::deb::DEP-11-icons-small;
#clear Acquire::IndexTargets::deb::DEP-11-icons;
#clear APT::Architectures;
APT::Architecture "arm64";
APT::Architectures {{ "arm64"; "amd64"; }};
APT::Sandbox::User "";
Acquire::Languages "none";
Acquire::Retries "3";
Dir::State "{state}";
Dir::State::lists "{state}/lists";
Dir::State::status "{state}/status";
Dir::Cache "{state}/cache";
"""


class Apt:
    """apt with a state folder of its own below ``folder``; the packages' files are kept in ``downloads``."""

    def __init__(self, folder: Path, downloads: Path) -> None:
        state = folder.resolve()
        for part in ("lists/partial", "cache/archives/partial", "fetched"):
            (state / part).mkdir(parents=True, exist_ok=True)
        (state / "status").touch()
        (state / "apt.conf").write_text(CONFIGURATION.format(state=state), encoding="utf-8")
        self._configuration, self._fetched, self._downloads = state / "apt.conf", state / "fetched", downloads

    def update(self) -> None:
        """Fetch the signed lists of what is offered. DeviceUnavailable when a source cannot be reached."""
        self._run("apt-get", "update", "-oAPT::Update::Error-Mode=any")

    def offered(self, packages: Iterable[tuple[str, str]], newest: bool = False) -> list[Package]:
        """Every version that is offered of each (name, architecture), or only the one that apt would take."""
        which = "--no-all-versions" if newest else "--all-versions"
        answer = self._run("apt-cache", "show", which, *(_asked(name, architecture) for name, architecture in packages))
        records = (dict(_fields(paragraph)) for paragraph in answer.split("\n\n") if paragraph.strip())
        keys = ("Package", "Architecture", "Version", "SHA256")
        return [Package(*(record[key] for key in keys)) for record in records if "SHA256" in record]

    def fetch(self, packages: list[Package]) -> None:
        """Download what is not there yet; each file is checked here again. DeviceUnavailable when one cannot be had."""
        missing = [package for package in packages if not is_whole(self._downloads / package.deb, package.sha256)]
        if not missing:
            return
        asked = [f"{_asked(package.name, package.architecture)}={package.version}" for package in missing]
        self._run("apt-get", "download", *asked)
        for package in missing:
            version = package.version.replace(":", "%3a")
            file = self._fetched / f"{package.name}_{version}_{package.architecture}.deb"
            if not file.is_file() or sha256_of(file) != package.sha256:
                raise DeviceUnavailable(f"{package.name} {package.version} did not arrive as the signed list says; run again")
            file.replace(self._downloads / package.deb)

    def _run(self, *command: str) -> str:
        return output_of([command[0], f"-c={self._configuration}", *command[1:]], "the Debian packages", cwd=self._fetched)


def is_whole(file: Path, sha256: str) -> bool:
    """Whether a downloaded file is there with the bytes that it should have."""
    return file.is_file() and sha256_of(file) == sha256


def output_of(command: list[str], what: str, cwd: Path | None = None) -> str:
    """What a program prints. DeviceUnavailable with the first line of its complaint, or where there is no such program."""
    try:
        done = subprocess.run(
            command, cwd=cwd, env={**os.environ, "LC_ALL": "C"}, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
        )
    except FileNotFoundError as error:
        raise DeviceUnavailable(f"{what}: {command[0]} is not on this machine; install it") from error
    if done.returncode != 0:
        complaints = [line.strip() for line in done.stderr.splitlines() if line.strip() and not line.startswith(("W:", "WARNING", "N:"))]
        complaint = complaints[0] if complaints else f"exit code {done.returncode}"
        raise DeviceUnavailable(f"{what} cannot be had ({complaint}); check the network and the machine's package sources, then run again")
    return done.stdout


def wanted() -> list[tuple[str, str]]:
    """Name and architecture of every package of the machine, and of the emulator."""
    return [(name, "arm64") for name in (*PYTHON, *LIBRARIES, *LOGIN)] + [("qemu-user-static", "amd64")]


def choose(pinned: tuple[Package, ...], offered: list[Package], newest: list[Package], tell: Callable[[str, str], None]) -> list[Package]:
    """The pinned packages where they are still offered, else what is offered instead: point releases withdraw old versions."""
    by_name = {(package.name, package.architecture): package for package in newest}
    chosen = []
    for package in pinned:
        if package in offered:
            chosen.append(package)
            continue
        instead = by_name.get((package.name, package.architecture))
        if instead is None:
            raise DeviceUnavailable(f"the machine's package sources offer no {package.name} for {package.architecture}; add Debian's main")
        tell("arm64-lab", f"{package.name} {package.version} is withdrawn, taking {instead.version}")
        chosen.append(instead)
    return chosen


def unpack(packages: list[Package], downloads: Path, root: Path, emulators: Path) -> None:
    """Every package into ``root``, except that of the emulators: of that, two programs into ``emulators``."""
    emulators.mkdir(parents=True)
    for name in ("bin", "sbin", "lib"):  # Debian's layout since bookworm; its packages still name /bin, /sbin and /lib
        (root / "usr" / name).mkdir(parents=True)
        (root / name).symlink_to(f"usr/{name}")
    for package in packages:
        if package.architecture == "amd64":
            members = [f"./usr/bin/{name}" for name in EMULATORS]
            _extract(downloads / package.deb, emulators, "--strip-components=3", *members)
        else:
            _extract(downloads / package.deb, root, "--keep-directory-symlink", *(f"--exclude=./usr/share/{name}" for name in UNREAD))


def _extract(deb: Path, folder: Path, *words: str) -> None:
    """The files of a package, by tar and not by ``dpkg-deb --extract``, which puts a folder where a link to one stands."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as archive:
        command = ["tar", "-x", "-C", str(folder), *words]
        taken = subprocess.run(command, stdin=archive.stdout, capture_output=True, text=True, check=False)
    if taken.returncode != 0 or archive.returncode != 0:
        complaint = (taken.stderr.splitlines() or ["it is damaged"])[0]
        raise DeviceUnavailable(f"{deb.name} cannot be unpacked ({complaint}); free some room or delete it, then run again")


def _asked(name: str, architecture: str) -> str:
    return f"{name}:{'arm64' if architecture == 'all' else architecture}"


def _fields(paragraph: str) -> Iterable[tuple[str, str]]:
    for line in paragraph.splitlines():
        key, colon, value = line.partition(": ")
        if colon and not line.startswith(" "):
            yield key, value
