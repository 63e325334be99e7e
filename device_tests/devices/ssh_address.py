"""Addresses of boards: ssh://user@host[:port][?threads=4][&clean=1]"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import parse_qsl

from device_tests.errors import DeviceTestError

FORM = "ssh://user@host[:port][?threads=4][&clean=1]"
MOST_THREADS = 1024
# no name begins with a minus: ssh would take it for an option
ADDRESS = re.compile(
    r"ssh://((?P<user>[A-Za-z0-9_][A-Za-z0-9_.-]*)@)?(?P<host>[A-Za-z0-9_][A-Za-z0-9_.-]*|\[[0-9A-Fa-f:.]+(%[A-Za-z0-9_.-]+)?\])"
    r"(:(?P<port>[0-9]{1,5}))?/?(\?(?P<query>.*))?"
)


@dataclass(frozen=True)
class Address:
    """``user`` and ``port`` None: the person's ssh configuration says. ``clean``: leave nothing on the board, also no runtimes."""

    host: str
    user: str | None = None
    port: int | None = None
    threads: int | None = None
    clean: bool = False

    @property
    def name(self) -> str:
        """As in records: without what belongs to one run alone."""
        host = f"[{self.host}]" if ":" in self.host else self.host
        return "ssh://" + ("" if self.user is None else f"{self.user}@") + host + ("" if self.port is None else f":{self.port}")

    @property
    def login(self) -> list[str]:
        """What follows the options of ``ssh``."""
        port = [] if self.port is None else ["-p", str(self.port)]
        return port + ([] if self.user is None else ["-l", self.user]) + ["--", self.host]

    @property
    def by_hand(self) -> str:
        """The command that a person logs in with."""
        port = "" if self.port is None else f"-p {self.port} "
        return f"ssh {port}{'' if self.user is None else f'{self.user}@'}{self.host}"


def parse(text: str) -> Address:
    """An address as it was given. DeviceTestError says what is wrong with it."""
    found = ADDRESS.fullmatch(text)
    if found is None:
        raise DeviceTestError(f"device {text}: no address of a board; give {FORM}")
    port = None if found["port"] is None else int(found["port"])
    if port is not None and not 1 <= port <= 65535:
        raise DeviceTestError(f"device {text}: {port} is no port; give {FORM}")
    settings = dict(parse_qsl(found["query"] or "", keep_blank_values=True))
    wrong = [name for name in settings if name not in ("threads", "clean")]
    if wrong:
        raise DeviceTestError(f"device {text}: no such setting as {wrong[0]}; give {FORM}")
    threads, clean = settings.get("threads"), settings.get("clean", "0")
    if threads is not None and not (threads.isdecimal() and 1 <= int(threads) <= MOST_THREADS):
        raise DeviceTestError(f"device {text}: threads={threads} is no number from 1 to {MOST_THREADS}; give {FORM}")
    if clean not in ("0", "1"):
        raise DeviceTestError(f"device {text}: clean={clean} is neither 0 nor 1; give {FORM}")
    return Address(found["host"].strip("[]"), found["user"], port, None if threads is None else int(threads), clean == "1")
