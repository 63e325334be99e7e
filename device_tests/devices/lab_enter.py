"""Run a command with a folder as its whole file system, in mounts that nobody else sees and that end with the command.

Linux only, by system calls: mount(2), unshare(2), user_namespaces(7), and the kernel's guide to binfmt_misc. It is run as a file,
in a process of its own that has imported the standard library alone: a process with threads, as numpy starts them, gets no user
namespace.

    python lab_enter.py '{"root": ..., "command": [...], ...}'      see ``Entry``
"""

from __future__ import annotations

import ctypes
import errno
import json
import os
import resource
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
MS_RDONLY, MS_NOSUID, MS_NODEV, MS_REMOUNT, MS_BIND, MS_MOVE, MS_REC, MS_PRIVATE = 1, 2, 4, 0x20, 0x1000, 0x2000, 0x4000, 0x40000
# flags of the file system that a bind mount inherits and must keep: nosuid, nodev, noexec, noatime, nodiratime; relatime
KEPT, ST_RELATIME, MS_RELATIME = 2 | 4 | 8 | 0x400 | 0x800, 0x1000, 0x200000
PR_SET_PDEATHSIG = 1
# ELF, 64 bits, little endian, executable or shared, machine 183 (EM_AARCH64)
MAGIC = r"\x7fELF\x02\x01\x01\x00\x00\x00\x00\x00\x00\x00\x00\x00\x02\x00\xb7\x00"
MASK = r"\xff\xff\xff\xff\xff\xff\xff\x00\xff\xff\xff\xff\xff\xff\xff\xff\xfe\xff\xff\xff"
SCRATCH = ("/tmp", "/run", "/mnt", "/home", "/sys")  # empty, writable and gone with the command; everything else is read-only
NEEDS = "it needs root, or a kernel with unprivileged user namespaces"
CANNOT = 2  # exit code when the command was not reached


@dataclass(frozen=True)
class Entry:
    """What to run where. ``binds`` are (path here, path in the root), made below ``SCRATCH`` where the root has no such path.

    ``files`` maps paths in the root to texts that stand there, also over what /proc says. ``environment`` is all that the command
    gets. ``program`` is a file here that is run instead of the command's first word (a statically linked emulator); ``emulator`` is
    one that the kernel shall start for every ARM64 program in the root. ``user`` is the user and group id that the command sees,
    None for 0.
    """

    root: str
    command: list[str]
    environment: dict[str, str]
    binds: list[tuple[str, str]] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)
    program: str | None = None
    emulator: str | None = None
    user: int | None = None

    def words(self) -> list[str]:
        """The command line that runs this."""
        return [sys.executable, "-I", "-S", __file__, json.dumps(asdict(self))]


class _Refused(Exception):
    """The kernel does not allow it. One line."""


def main(arguments: list[str]) -> int:
    """Become the command. Returns only when that was not possible."""
    try:
        enter(Entry(**json.loads(arguments[0])))
    except _Refused as refusal:
        print(" ".join(str(refusal).split()), file=sys.stderr)
    except OSError as error:
        print(f"{error.filename}: {error.strerror}; delete the folder of the emulated machine and build it anew", file=sys.stderr)
    return CANNOT


def enter(entry: Entry) -> None:
    """Leave for the root folder and become the command there."""
    program = os.open(entry.program, os.O_RDONLY) if entry.program else None
    _own_mounts(as_user=entry.emulator is not None or os.geteuid() != 0)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # an emulator would write its core into the folder it stands in
    _furnish(entry)
    os.chdir(entry.root)
    _mount(".", "/", MS_MOVE)
    os.chroot(".")
    if entry.user is not None:
        _check(libc().unshare(CLONE_NEWUSER), "the kernel allows no second user namespace")
        _map(entry.user, 0, entry.user, 0)
    libc().prctl(PR_SET_PDEATHSIG, signal.SIGKILL)  # who started this must not leave it behind when killed; other rights end it
    os.chdir("/")
    try:
        os.execve(entry.command[0] if program is None else program, entry.command, entry.environment)
    except OSError as error:
        raise _Refused(f"{entry.command[0]} cannot be started in {entry.root} ({error.strerror})") from error


def _furnish(entry: Entry) -> None:
    """Everything that is mounted in the root, which itself becomes read-only."""
    kept = os.statvfs(entry.root).f_flag
    _mount(entry.root, entry.root, MS_BIND)
    _mount("none", entry.root, MS_REMOUNT | MS_BIND | MS_RDONLY | kept & KEPT | (MS_RELATIME if kept & ST_RELATIME else 0))
    for source in ("/proc", "/dev"):
        _mount(source, entry.root + source, MS_BIND | MS_REC)
    for place in SCRATCH:
        _mount("tmpfs", entry.root + place, MS_NOSUID | MS_NODEV, "tmpfs")
    for source, place in entry.binds:
        _bind(source, Path(entry.root + place))
    for number, (place, text) in enumerate(entry.files.items()):
        target = Path(entry.root + place)
        file = Path(f"{entry.root}/run/file-{number}") if target.exists() else target
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
        if file != target:
            _bind(str(file), target)
    if entry.emulator:
        _emulate(entry.root, entry.emulator)


def _bind(source: str, target: Path) -> None:
    """Show ``source`` at ``target``, which is made where there is nothing yet."""
    if not target.exists() and Path(source).is_dir():
        target.mkdir(parents=True)
    elif not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.touch()
    _mount(source, str(target), MS_BIND | MS_REC)


def libc() -> ctypes.CDLL:
    """The C library, with errno kept."""
    return ctypes.CDLL(None, use_errno=True)


def _own_mounts(as_user: bool) -> None:
    """Mounts of our own; ``as_user`` with rights over them that come from a user namespace, else those of root."""
    uid, gid = os.geteuid(), os.getegid()
    _check(libc().unshare(CLONE_NEWNS | (CLONE_NEWUSER if as_user else 0)), "the kernel allows no namespaces here")
    if as_user:
        _map(0, uid, 0, gid)
    _mount("none", "/", MS_REC | MS_PRIVATE)


def _map(uid: int, outer_uid: int, gid: int, outer_gid: int) -> None:
    Path("/proc/self/setgroups").write_text("deny", encoding="ascii")
    Path("/proc/self/uid_map").write_text(f"{uid} {outer_uid} 1", encoding="ascii")
    Path("/proc/self/gid_map").write_text(f"{gid} {outer_gid} 1", encoding="ascii")


def _emulate(root: str, emulator: str) -> None:
    """Have the kernel start ``emulator`` for ARM64 programs, in this user namespace alone."""
    formats = f"{root}/proc/sys/fs/binfmt_misc"
    _mount("binfmt_misc", formats, 0, "binfmt_misc", "it needs Linux 6.7 or newer")
    # F: opened now, so that it need not lie in the root; P: programs see the name that they were called by
    line = f":qemu-aarch64:M::{MAGIC}:{MASK}:{emulator}:FP"
    try:
        Path(f"{formats}/register").write_text(line, encoding="ascii")
    except OSError as error:
        raise _Refused(f"the kernel does not take {emulator} for ARM64 programs ({error.strerror}); build the lab anew") from error


def _mount(source: str, target: str, flags: int, kind: str | None = None, needs: str = NEEDS) -> None:
    answer = libc().mount(source.encode(), target.encode(), kind.encode() if kind else None, ctypes.c_ulong(flags), None)
    _check(answer, f"{kind or source} cannot be mounted on {target}", needs)


def _check(answer: int, otherwise: str, needs: str = NEEDS) -> None:
    number = ctypes.get_errno()
    if answer != 0:
        advice = "delete the folder and build it anew" if number in (errno.ENOENT, errno.ENOTDIR) else needs
        raise _Refused(f"{otherwise} ({os.strerror(number)}); {advice}")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
