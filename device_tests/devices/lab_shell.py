"""A login on the emulated ARM64 board: every program in it is an ARM64 one, and so are the programs that these start.

    python -m device_tests.devices.lab_shell                             a shell
    python -m device_tests.devices.lab_shell --home DIR -- uname -m      one command

The user is ``pi``. ``--home DIR`` is a folder here that serves as /home/pi and outlives the login, without it the home is empty and
gone afterwards. /tmp, /run and /mnt are fresh for each login, the rest is read-only. ``--bind HERE:THERE`` shows a file or folder of
this machine there, such as ``--bind /etc/resolv.conf:/etc/resolv.conf``. It needs Linux 6.7, where each user namespace may say which
program runs foreign ones.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from device_tests.devices import WORK
from device_tests.devices.emulated import ARM64_CPU
from device_tests.devices.lab import Lab, lab_at
from device_tests.devices.lab_arm64 import Arm64, files_of
from device_tests.devices.lab_enter import Entry
from device_tests.errors import DeviceTestError

USER_ID = 1000
HOME = "/home/pi"


def login_entry(lab: Lab, command: list[str], home: Path | None = None, binds: tuple[tuple[str, str], ...] = ()) -> Entry:
    """A login of ``pi`` that runs ``command``; an empty one is a login shell. DeviceUnavailable where the board cannot be entered."""
    then = 'exec "$@"' if command else "exec bash -l"
    environment = {"HOME": HOME, "USER": "pi", "LOGNAME": "pi", "SHELL": "/bin/bash", "PATH": "/usr/local/bin:/usr/bin:/bin"}
    environment.update({"LANG": "C.UTF-8", "TERM": os.environ.get("TERM", "dumb"), "QEMU_CPU": ARM64_CPU})
    return Entry(
        root=str(lab.root),
        command=["/bin/sh", "-c", f'mkdir -p "$HOME" && cd && {then}', "sh", *command],
        environment=environment,
        binds=[*([(str(home.resolve()), HOME)] if home else []), *binds],
        files=files_of(ARM64_CPU, Arm64(lab, ARM64_CPU).board()["cpu_flags"]),
        emulator=str(lab.emulator("aarch64")),
        user=USER_ID,
    )


def main(arguments: list[str] | None = None) -> int:
    """Enter. The exit code is the command's, 2 where the board could not be entered."""
    parser = argparse.ArgumentParser(
        prog="python -m device_tests.devices.lab_shell", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, default=WORK, help="folder that the emulated board is kept in (default %(default)s)")
    parser.add_argument("--home", type=Path, help="folder here that is /home/pi there")
    parser.add_argument("--bind", action="append", default=[], metavar="HERE:THERE", help="show this there; may be repeated")
    parser.add_argument("command", nargs="*", help="what to run there; without it a login shell")
    given = parser.parse_args(arguments)
    try:
        if given.home and not given.home.is_dir():
            raise DeviceTestError(f"--home {given.home}: no such folder; make it first")
        binds = tuple(_bind(text) for text in given.bind)
        lab = lab_at(given.work, lambda what, state: print(f"  {what:<12} {state}", file=sys.stderr))
        words = login_entry(lab, given.command, given.home, binds).words()
    except DeviceTestError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    os.execv(words[0], words)


def _bind(text: str) -> tuple[str, str]:
    here, _, there = text.rpartition(":")
    if not there.startswith("/") or not Path(here).exists():
        raise DeviceTestError(f"--bind {text}: give HERE:THERE, a file or folder of this machine and an absolute path there")
    return str(Path(here).resolve()), there


if __name__ == "__main__":
    sys.exit(main())
