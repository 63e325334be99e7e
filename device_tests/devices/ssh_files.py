"""Files on their way to a board: by content, so that what is there is not sent again, and from where an earlier run broke off."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

from device_tests.artifact import sha256_of
from device_tests.devices import DeviceUnavailable, Tell
from device_tests.devices.ssh_line import BoardFull, Line

FOLDER = "~/.cache/pocketlm"  # on the board; nothing is ever written anywhere else
TOLD_BYTES = 1 << 20  # the sending of smaller files is not worth a line
CHUNK = 1 << 20  # each is acknowledged: progress counts what the board has written
SHOWN_EVERY_S = 0.2
DISK_RESERVE = 32 << 20  # a board whose disk is full to the last byte does not work well


class Files:
    """What this run has on the board. Names are SHA-256."""

    def __init__(self, line: Line, tell: Tell) -> None:
        self._line, self._tell = line, tell
        self._known: dict[tuple[Path, int, int], str] = {}
        self._there: set[str] = set()

    def send(self, paths: list[Path]) -> list[str]:
        """Bring files to the board, each one whole and checked there; their names. BoardFull before anything is sent to no room."""
        names = [self._name(path) for path in paths]
        states = {name: self._line.ask("part", sha256=name) for name in names if name not in self._there}
        sizes = {name: path.stat().st_size for name, path in zip(names, paths)}
        missing = sum(sizes[name] - state["bytes"] for name, state in states.items() if not state["whole"])
        self.require_room(missing, "what is to be sent")
        for name, path in zip(names, paths):
            if name not in self._there:
                self._send(path, name, states[name])
                self._there.add(name)
        return names

    def require_room(self, needed: int, what: str) -> None:
        """BoardFull unless the board's disk has room for ``needed`` bytes more."""
        free = self._line.ask("room")
        if needed > 0 and needed + DISK_RESERVE > free:
            raise BoardFull(
                f"{self._line.address.name}: {what} needs {needed / 1e6:.0f} MB and {free / 1e6:.0f} MB are free on the board (some are "
                "kept back); make room there and run again"
            )

    def _name(self, path: Path) -> str:
        state = path.stat()
        key = (path, state.st_size, state.st_mtime_ns)
        if key not in self._known:
            self._known[key] = sha256_of(path)
        return self._known[key]

    def _send(self, path: Path, name: str, state: dict) -> None:
        """One file, if it is not there: from the end of the part that is."""
        if state["whole"]:
            return
        self._line.doing = f"the transfer of {path.name}"
        size = path.stat().st_size
        with path.open("rb") as file:
            start = state["bytes"] if 0 < state["bytes"] <= size and _prefix(file, state["bytes"]) == state["sha256"] else 0
            file.seek(start)
            progress = Progress(f"{self._line.address.name} {path.name}", start, size)
            for offset in range(start, max(size, start + 1), CHUNK):
                block = file.read(CHUNK)
                self._line.ask("append", payload=block, sha256=name, offset=offset, count=len(block))
                progress.show(offset + len(block))
        progress.end()
        if not self._line.ask("finish", sha256=name):
            raise DeviceUnavailable(f"{self._line.address.name}: {path.name} did not arrive as it was sent; run again")
        went_on = f", on from {start / 1e6:.1f} MB" if start else ""
        if size >= TOLD_BYTES:
            self._tell(self._line.address.name, f"{path.name} sent ({size / 1e6:.1f} MB in {progress.seconds:.1f} s{went_on})")


class Progress:
    """One line that is written over and over on a terminal, and nothing elsewhere."""

    def __init__(self, what: str, start: int, size: int) -> None:
        self._what, self._first, self._size = what, start, size
        self._start, self._shown = time.monotonic(), 0.0
        self._terminal = sys.stderr.isatty()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self._start

    def show(self, done: int) -> None:
        """Share, speed and the time that is left."""
        if not self._terminal or time.monotonic() - self._shown < SHOWN_EVERY_S:
            return
        self._shown = time.monotonic()
        rate = max(done - self._first, 1) / max(self.seconds, 1e-6)
        share, left = done / max(self._size, 1), (self._size - done) / rate
        sys.stderr.write(f"\r  {self._what} {share:4.0%} of {self._size / 1e6:.1f} MB, {rate / 1e6:.1f} MB/s, {left:.0f} s left\033[K")
        sys.stderr.flush()

    def end(self) -> None:
        """Leave the terminal's line empty."""
        if self._terminal and self._shown:
            sys.stderr.write("\r\033[K")
            sys.stderr.flush()


def _prefix(file, count: int) -> str:
    """SHA-256 of the first ``count`` bytes."""
    digest = hashlib.sha256()
    while count:
        block = file.read(min(count, CHUNK))
        digest.update(block)
        count -= len(block)
    return digest.hexdigest()
