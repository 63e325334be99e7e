"""A login on the emulated ARM64 board: every program in it is an ARM64 one, and so are the programs that these start.

    python -m device_tests.devices.lab_shell --home DIR                         a shell
    python -m device_tests.devices.lab_shell --home DIR -- uname -m             one command
    python -m device_tests.devices.lab_shell --home DIR --write-login FILE      a program to be a real sshd's ForceCommand

The user is ``pi``; ``--home DIR`` is a folder here that serves as /home/pi and outlives the login, without it the home is empty and
gone afterwards. /tmp, /run and /mnt are fresh for each login, everything else is read-only. ``--bind HERE:THERE`` shows a file or
folder of this machine there, such as a made-up /sys or /proc/cpuinfo, ``--bind /etc/resolv.conf:/etc/resolv.conf``, or a folder that
is on a full disk.

A program written with ``--write-login`` does what sshd hands over in SSH_ORIGINAL_COMMAND (a command, or the sftp server for
which sshd_config says ``Subsystem sftp /usr/lib/openssh/sftp-server``), and is a login shell without it. ``login_entry`` and
``write_login`` are the same for Python. It needs Linux 6.7, where each user namespace may say which program runs foreign ones.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from pathlib import Path

from device_tests.devices.lab import HOME, WORK, Lab, lab_at
from device_tests.devices.lab_enter import Entry
from device_tests.errors import DeviceTestError

USER_ID = 1000
CPU = "cortex-a76"
PATH = "/usr/local/bin:/usr/bin:/bin"
# what sshd tells a session, and what makes a terminal one
INHERITED = ["SSH_ORIGINAL_COMMAND", "SSH_CONNECTION", "SSH_CLIENT", "SSH_TTY", "TERM"]
HOME_FIRST = 'mkdir -p "$HOME" && cd'
LOGIN = f'{HOME_FIRST} && if [ -n "${{SSH_ORIGINAL_COMMAND+set}}" ]; then exec bash -c "$SSH_ORIGINAL_COMMAND"; else exec bash -l; fi'


def login_entry(lab: Lab, home: Path | None = None, binds: tuple[tuple[str, str], ...] = (), command: list[str] | None = None) -> Entry:
    """A login of ``pi``; ``command`` None does what SSH_ORIGINAL_COMMAND says, and without that it is a login shell."""
    return Entry(
        root=str(lab.root),
        command=["/bin/sh", "-c", LOGIN] if command is None else ["/bin/sh", "-c", f'{HOME_FIRST} && exec "$@"', "sh", *command],
        environment={"HOME": HOME, "USER": "pi", "LOGNAME": "pi", "SHELL": "/bin/bash", "PATH": PATH, "LANG": "C.UTF-8", "QEMU_CPU": CPU},
        inherited=INHERITED,
        binds=[*([(str(home.resolve()), HOME)] if home else []), *binds],
        emulator=str(lab.emulator("aarch64")),
        user=USER_ID,
    )


def write_login(entry: Entry, file: Path) -> None:
    """Write ``file``, a program that takes no arguments and enters."""
    file.write_text(f"#!/bin/sh\nexec {shlex.join(entry.words())}\n", encoding="utf-8")
    file.chmod(0o755)


def main(arguments: list[str] | None = None) -> int:
    """Enter, or write the program that does. Exit code 2: it could not be entered."""
    command = argparse.ArgumentParser(
        prog="python -m device_tests.devices.lab_shell", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--work", type=Path, default=WORK, help="folder that the emulated board is kept in (default %(default)s)")
    command.add_argument("--home", type=Path, help="folder here that is /home/pi there")
    command.add_argument("--bind", action="append", default=[], metavar="HERE:THERE", help="show this there; may be repeated")
    command.add_argument("--write-login", type=Path, metavar="FILE", help="write the program that enters instead of entering")
    command.add_argument("command", nargs="*", help="what to run there; without it a login shell")
    given = command.parse_args(arguments)
    try:
        for folder in [given.home] if given.home else []:
            if not folder.is_dir():
                raise DeviceTestError(f"--home {folder}: no such folder; make it first")
        binds = tuple(_bind(text) for text in given.bind)
        lab = lab_at(given.work, lambda what, state: print(f"  {what:<12} {state}", file=sys.stderr))
    except DeviceTestError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    entry = login_entry(lab, given.home, binds, given.command or None)
    if given.write_login:
        write_login(entry, given.write_login)
        return 0
    words = entry.words()
    os.execv(words[0], words)


def _bind(text: str) -> tuple[str, str]:
    here, colon, there = text.rpartition(":")
    if not colon or not there.startswith("/") or not Path(here).exists():
        raise DeviceTestError(f"--bind {text}: give HERE:THERE, a file or folder of this machine and an absolute path there")
    return str(Path(here).resolve()), there


if __name__ == "__main__":
    sys.exit(main())
