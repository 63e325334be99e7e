"""A board to log in to: a real sshd on this machine's loopback whose login lands here, or in the emulated ARM64 root folder.

It has a home folder, keys and a configuration of its own. As root it lives in mounts and processes of its own (unshare(1)), so that
``kill`` ends everything in it at once, as when a board loses its power.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from device_tests.devices import DeviceUnavailable
from device_tests.devices.lab import Lab
from device_tests.devices.lab_debian import Apt, output_of
from device_tests.devices.local import PACKAGE_ROOT

CACHE = PACKAGE_ROOT / ".pocketlm"
PACKAGES = (("openssh-server", "amd64"), ("libwrap0", "amd64"))
USER = "pi" if os.geteuid() == 0 else None  # without rights only this user can be logged in
BIN = "/usr/local/bin:/usr/bin:/bin"
PROGRAMS = ("sh", "cat", "true")  # on a board without Python


def find_sshd() -> Path:
    """sshd of this machine, else Debian's, unpacked beside the other caches. Skips the test where there is neither."""
    installed = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin:/usr/local/sbin")
    if installed:
        return Path(installed)
    root = CACHE / "sshd" / "root"
    if not (root / "usr/sbin/sshd").is_file():
        downloads = CACHE / "sshd" / "downloads"
        downloads.mkdir(parents=True, exist_ok=True)
        try:
            apt = Apt(downloads / "apt", downloads)
            apt.update()
            packages = apt.offered(PACKAGES, newest=True)
            apt.fetch(packages)
            draft = root.with_name(f"draft-{os.getpid()}")
            for package in packages:
                output_of(["dpkg-deb", "--extract", str(downloads / package.deb), str(draft)], package.name)
            draft.replace(root)
        except DeviceUnavailable as error:
            pytest.skip(f"no sshd is installed and Debian's cannot be had: {error}")
    return root / "usr/sbin/sshd"


def key(path: Path) -> str:
    """Make a key pair; the public half."""
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(path)], check=True)
    return path.with_suffix(".pub").read_text().rsplit(" ", 1)[0]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def descendants(pid: int) -> list[int]:
    """Ids of all that a process has started, and what those have."""
    parents = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(entry.parent.name)] = int(entry.read_text().rpartition(")")[2].split()[1])
        except OSError:  # it has just ended
            continue
    found = [pid]
    for known in found:
        found += [child for child, parent in parents.items() if parent == known]
    return found[1:]


@dataclass
class StandIn:
    """``lab``: the login lands in the emulated machine. ``python`` is the text of a program python3, None where there is none.

    ``login`` is a shell command that every login runs instead of what was asked for (that is in SSH_ORIGINAL_COMMAND),
    ``environment`` is that of a login, ``small_disks`` maps folders in its home to the bytes that fit there.
    """

    folder: Path
    lab: Lab | None = None
    # a wrapper, no link: then Python knows where it lives
    python: str | None = f'#!/bin/sh\nexec {Path(sys.executable).resolve()} "$@"\n'
    login: str | None = None
    environment: dict[str, str] = field(default_factory=dict)
    small_disks: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.home, self.port = self.folder / "home", free_port()
        self.home.mkdir(parents=True)
        self.host_key, self.user_key = key(self.folder / "host_key"), key(self.folder / "user_key")
        (self.folder / "authorized_keys").write_text(self.user_key + "\n")
        self.cache = self.home / ".cache" / "pocketlm"
        self._process: subprocess.Popen | None = None

    def start(self) -> None:
        """Switch it on and wait until it answers."""
        sshd = find_sshd()
        if self.small_disks and os.geteuid() != 0:
            pytest.skip("a small disk is a mount, and mounts need root")
        (self.folder / "sshd_config").write_text(self._sshd_config())
        words = [str(sshd), "-D", "-e", "-f", str(self.folder / "sshd_config")]
        if os.geteuid() == 0:
            script = self.folder / "start.sh"
            script.write_text(self._start_script(words))
            words = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "--mount-proc", "sh", str(script)]
        libraries = {"LD_LIBRARY_PATH": str(sshd.parent.parent / "lib/x86_64-linux-gnu")} if CACHE in sshd.parents else {}
        libraries.update(
            {} if not libraries else {"LD_LIBRARY_PATH": f"{libraries['LD_LIBRARY_PATH']}:{sshd.parents[2]}/lib/x86_64-linux-gnu"}
        )
        log = (self.folder / "sshd.log").open("ab")
        self._process = subprocess.Popen(words, env={**os.environ, **libraries}, stdout=log, stderr=log, start_new_session=True)
        for _ in range(200):
            with socket.socket() as probe:
                if probe.connect_ex(("127.0.0.1", self.port)) == 0:
                    return
            if self._process.poll() is not None:
                break
            time.sleep(0.05)
        pytest.skip(f"sshd does not start here: {(self.folder / 'sshd.log').read_text().strip()[-300:]}")

    def kill(self) -> None:
        """No power any more."""
        if self._process is not None:
            for pid in [self._process.pid, *descendants(self._process.pid)]:
                try:
                    os.kill(pid, signal.SIGKILL)
                except ProcessLookupError:  # it went with one of the others
                    continue
            self._process.wait()
            self._process = None

    def client(self, name: str, port: int | None = None, known: str | None = None) -> Path:
        """An ssh configuration in which ``board`` is this board, reached by ``port``; ``known`` is the host key that is known.

        It has what a person may have for logins by hand, and what would not be safe.
        """
        port = self.port if port is None else port
        known_hosts = self.folder / f"{name}.known_hosts"
        known_hosts.write_text(f"[127.0.0.1]:{port} {known or self.host_key}\n" if known != "" else "")
        lines = [
            "Host board",
            "HostName 127.0.0.1",
            f"Port {port}",
            "RemoteCommand tmux attach",
            "RequestTTY yes",
            "LocalForward 1 board:1",
        ]
        lines += ["Host *", *([f"User {USER}"] if USER else []), f"IdentityFile {self.folder}/user_key", "IdentitiesOnly yes"]
        lines += [f"UserKnownHostsFile {known_hosts}", "GlobalKnownHostsFile /dev/null", "StrictHostKeyChecking no"]
        config = self.folder / f"{name}.config"
        config.write_text("\n".join(lines) + "\n")
        return config

    def left(self) -> list[str]:
        """What lies in our folder on the board, without the runtimes and the lock."""
        found = [path for path in self.cache.rglob("*") if path.is_file() and path.name != "lock"]
        names = [str(path.relative_to(self.cache)) for path in found]
        return sorted(name for name in names if not name.startswith("environments/"))

    def seen_there(self, path: Path) -> Path:
        """A path as the board's own processes see it, small disks and all, for a process outside.

        By the sshd that listens: one of its children may belong to a connection that is about to end.
        """
        return Path(f"/proc/{descendants(self._process.pid)[0]}/root{path}")

    def processes(self, word: str) -> list[int]:
        """Ids of the processes on this machine whose command line has ``word`` in it."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                if word in entry.read_bytes().replace(b"\0", b" ").decode(errors="replace"):
                    found.append(int(entry.parent.name))
            except OSError:  # it has just ended
                continue
        return found

    def busy(self, word: str, seconds: float) -> bool:
        """Whether such a process has computed for so long: then it has long been past its imports."""
        for pid in self.processes(word):
            try:
                fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            except OSError:  # see above
                continue
            if (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK") >= seconds:
                return True
        return False

    def _sshd_config(self) -> str:
        environment = {"HOME": str(self.home), "PATH": self._path(), **self.environment}
        lines = [
            f"Port {self.port}", "ListenAddress 127.0.0.1", f"HostKey {self.folder}/host_key", f"PidFile {self.folder}/sshd.pid",
            f"AuthorizedKeysFile {self.folder}/authorized_keys", "StrictModes no", "PermitRootLogin yes", "PasswordAuthentication no",
            "KbdInteractiveAuthentication no", "UsePAM no", "PrintMotd no",
            "SetEnv " + " ".join(f'{name}="{value}"' for name, value in environment.items()),
        ]  # fmt: skip
        login = self.login
        if self.lab is not None:
            (self.folder / "login.py").write_text(LOGIN.format(entry=json.dumps(self._entry()), package=str(PACKAGE_ROOT)))
            login = f"{sys.executable} {self.folder}/login.py"
        if login is not None:
            lines.append(f"ForceCommand {login}")
        return "\n".join(lines) + "\n"

    def _entry(self) -> dict:
        """Where a login lands in the emulated machine, without its command."""
        environment = {"HOME": "/home/pi", "PATH": BIN, "USER": "pi", "QEMU_CPU": "cortex-a72", **self.environment}
        (self.folder / "empty").mkdir(exist_ok=True)
        # as Debian and Raspberry Pi OS come: without the package python3-venv
        binds = [(str(self.home), "/home/pi"), (str(self.folder / "empty"), "/usr/lib/python3.11/ensurepip")]
        emulator = str(self.lab.emulator("aarch64"))
        return {"root": str(self.lab.root), "environment": environment, "binds": binds, "emulator": emulator, "user": 1000}

    def _path(self) -> str:
        bin = self.folder / "bin"
        bin.mkdir(exist_ok=True)
        if self.python is not None:
            (bin / "python3").write_text(self.python)
            (bin / "python3").chmod(0o755)
            return f"{bin}:{BIN}"
        for name in PROGRAMS:
            if not (bin / name).exists():
                (bin / name).symlink_to(shutil.which(name))
        return str(bin)

    def _start_script(self, sshd: list[str]) -> str:
        """sshd wants a user of its own name and a folder in /run; here nobody else sees either."""
        passwd = self.folder / "passwd"
        passwd.write_text(
            "root:x:0:0:root:/root:/bin/sh\nsshd:x:105:65534::/run/sshd:/usr/sbin/nologin\n"
            f"pi:x:0:0::{self.home}:/bin/sh\nnobody:x:65534:65534:nobody:/nonexistent:/usr/sbin/nologin\n"
        )
        lines = ["set -e", f"mount --bind {passwd} /etc/passwd", "mount -t tmpfs none /run", "mkdir /run/sshd"]
        for name, size in self.small_disks.items():
            lines += [f"mkdir -p {self.home}/{name}", f"mount -t tmpfs -o size={size} none {self.home}/{name}"]
        return "\n".join([*lines, "exec " + " ".join(sshd)]) + "\n"


LOGIN = """import json, os, sys
sys.path.insert(0, {package!r})
from device_tests.devices.lab_enter import Entry
entry = Entry(command=["/bin/sh", "-c", os.environ["SSH_ORIGINAL_COMMAND"]], **json.loads({entry!r}))
words = entry.words()
os.execv(words[0], words)
"""
