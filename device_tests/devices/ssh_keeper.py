"""Runs on the board as long as the connection is open. Nothing of it is written there: the driver hands it to ``python3``.

It reads one JSON object per line and answers each with one. All that the driver does on the board goes through it, so that one login
is enough, and so that the board is clean again however the connection ends: it stops what runs and removes the work folder when its
input ends or falls silent. Whole and partial files stay then, for a next run to go on from; ``close`` removes them too.
The standard library of Python 3.9 only.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
import zipfile

MARK = "POCKETLM-KEEPER"
BLOCK = 1 << 16
POLL_S = 0.1  # between two looks at a program that runs
LOCK_POLL_S = 0.5
FILES, WORK, LOCK = "files", "work", "lock"


class Lost(Exception):
    """The driver is gone, or has been silent for too long."""


class Input:
    """What the driver sends. It sends something every few seconds: silence is a dead line."""

    def __init__(self, silence_s: float) -> None:
        self.silence_s, self._buffer, self._heard = silence_s, b"", time.monotonic()

    def fill(self, wait_s: float) -> None:
        """Take what comes within ``wait_s`` seconds."""
        if select.select([0], [], [], wait_s)[0]:
            block = os.read(0, BLOCK)
            if not block:
                raise Lost("closed")
            self._buffer += block
            self._heard = time.monotonic()
        elif time.monotonic() - self._heard > self.silence_s:
            raise Lost("silent")

    def waiting(self) -> dict | None:
        """The next message if it is there. Pings are none."""
        while b"\n" in self._buffer:
            line, self._buffer = self._buffer.split(b"\n", 1)
            message = json.loads(line)
            if message["do"] != "ping":
                return message
        return None

    def message(self) -> dict:
        """The next message, waited for."""
        while True:
            message = self.waiting()
            if message is not None:
                return message
            self.fill(1.0)

    def take(self, most: int) -> bytes:
        """Up to ``most`` of the bytes that follow a message."""
        while not self._buffer:
            self.fill(1.0)
        block, self._buffer = self._buffer[:most], self._buffer[most:]
        return block


def answer(record: dict, payload: bytes = b"") -> None:
    data = json.dumps(record).encode() + b"\n" + payload
    while data:
        data = data[os.write(1, data) :]


class Keeper:
    """One method per message, named as the message's ``do``."""

    def __init__(self, source: Input) -> None:
        self.source, self.folder, self.child, self.board_functions = source, "", None, {}
        self.lock = None

    def path(self, *parts: str) -> str:
        return os.path.join(self.folder, *parts)

    def board(self, source: str) -> dict:
        """What the module ``board``, handed over as text, says of this machine."""
        if not self.board_functions:
            self.board_functions = {"__name__": "board"}
            exec(compile(source, "board.py", "exec", dont_inherit=True), self.board_functions)
        return {**self.board_functions["describe"](), **self.board_functions["condition"]()}

    def claim(self, folder: str, who: str) -> dict:
        """Make the folder and take its lock; while another run has it, wait and say so once."""
        self.folder = os.path.expanduser(folder)
        told = False
        while not self._locked():
            if not told:
                with open(self.path(LOCK), encoding="utf-8") as holder:
                    answer({"waits": holder.read().strip()})
                told = True
            self.source.fill(LOCK_POLL_S)
            self.source.waiting()  # drops pings
        self.lock.truncate(0)
        self.lock.write(who)
        self.lock.flush()
        shutil.rmtree(self.path(WORK), ignore_errors=True)  # of a run that was killed with the whole board
        for name in (FILES, WORK):
            os.makedirs(self.path(name), exist_ok=True)
        return {"folder": self.folder, "python": sys.executable}

    def _locked(self) -> bool:
        os.makedirs(self.folder, mode=0o700, exist_ok=True)
        self.lock = open(self.path(LOCK), "a", encoding="utf-8")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # whoever had it may have removed the folder: then it is a lock that nobody else can see
            return os.path.samestat(os.stat(self.path(LOCK)), os.fstat(self.lock.fileno()))
        except (BlockingIOError, FileNotFoundError):
            self.lock.close()
            return False

    def room(self) -> int:
        """Bytes that may still be written."""
        return shutil.disk_usage(self.path(FILES)).free

    def part(self, sha256: str) -> dict:
        """How much of a file is here, and the hash of that."""
        whole, part = self.path(FILES, sha256), self.path(FILES, sha256 + ".part")
        if os.path.exists(whole):
            if digest_of(whole) == sha256:
                return {"bytes": os.path.getsize(whole), "sha256": sha256, "whole": True}
            os.remove(whole)  # the board lost its power before the bytes were on the disk
        size = os.path.getsize(part) if os.path.exists(part) else 0
        return {"bytes": size, "sha256": digest_of(part) if size else "", "whole": False}

    def append(self, sha256: str, offset: int, count: int) -> None:
        """Put ``count`` bytes that follow at ``offset``; what lay behind it is cut off."""
        failure = None
        file = os.open(self.path(FILES, sha256 + ".part"), os.O_WRONLY | os.O_CREAT, 0o600)
        try:
            os.ftruncate(file, offset)
            os.lseek(file, offset, os.SEEK_SET)
            while count:
                block = self.source.take(count)
                count -= len(block)
                while block and failure is None:  # after a failure the rest is only read
                    try:
                        block = block[os.write(file, block) :]
                    except OSError as error:
                        failure = error
        finally:
            os.close(file)
        if failure is not None:
            raise failure

    def finish(self, sha256: str) -> bool:
        """Whether the file arrived as it was sent; it is kept only then."""
        part = self.path(FILES, sha256 + ".part")
        if digest_of(part) != sha256:
            os.remove(part)
            return False
        os.rename(part, self.path(FILES, sha256))
        return True

    def place(self, sha256: str, path: str) -> None:
        """Have a file that was sent under another name: a second name, no second copy."""
        target = self.path(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        os.link(self.path(FILES, sha256), target)

    def unpack(self, sha256: str, path: str) -> None:
        """Unpack an archive that was sent."""
        with zipfile.ZipFile(self.path(FILES, sha256)) as archive:
            archive.extractall(self.path(path))

    def write(self, path: str, text: str) -> None:
        target = self.path(path)
        os.makedirs(os.path.dirname(target), exist_ok=True)
        with open(target, "w", encoding="utf-8") as file:
            file.write(text)

    def rename(self, path: str, target: str) -> None:
        os.makedirs(os.path.dirname(self.path(target)), exist_ok=True)
        os.rename(self.path(path), self.path(target))

    def fetch(self, path: str) -> None:
        """The size of a file, then its bytes; null where there is none."""
        try:
            with open(self.path(path), "rb") as file:
                data = file.read()
        except FileNotFoundError:
            answer({"ok": None})
            return
        answer({"ok": len(data)}, data)

    def remove(self, path: str) -> None:
        shutil.rmtree(self.path(path), ignore_errors=True)

    def run(self, command: list, environment: dict, folder: str, timeout_s: float) -> dict:
        """Exit code (null: stopped after ``timeout_s``) and what was said on stdout and stderr, the end of it."""
        log = self.path(WORK, "log")
        os.makedirs(self.path(folder), exist_ok=True)
        with open(log, "wb") as file:
            self.child = subprocess.Popen(
                command, cwd=self.path(folder), env={**os.environ, **environment}, stdin=subprocess.DEVNULL, stdout=file, stderr=file,
                start_new_session=True,
            )  # fmt: skip
        end = time.monotonic() + timeout_s
        while self.child.poll() is None and time.monotonic() < end:
            self.source.fill(POLL_S)
            self.source.waiting()  # drops pings
        code = self.child.poll()
        self.stop()
        with open(log, "rb") as file:
            file.seek(max(0, os.path.getsize(log) - BLOCK))
            words = file.read().decode("utf-8", "replace")
        os.remove(log)
        return {"code": code, "words": words}

    def stop(self) -> None:
        """Kill what runs, and whatever that started."""
        if self.child is None:
            return
        try:
            os.killpg(self.child.pid, signal.SIGKILL)
        except ProcessLookupError:  # all of them have ended
            pass
        self.child.wait()
        self.child = None

    def close(self, everything: bool) -> None:
        """Remove what was sent, or the whole folder; that too where nothing else is in it."""
        if self.claimed:
            for name in (FILES, WORK):
                shutil.rmtree(self.path(name))
            if everything or os.listdir(self.folder) == [LOCK]:
                shutil.rmtree(self.folder)
        raise SystemExit(0)

    @property
    def claimed(self) -> bool:
        """Whether the folder is ours. Before that nothing may be removed."""
        return self.lock is not None and not self.lock.closed

    def leave(self) -> None:
        """Whatever happened: nothing runs on, and no work lies about."""
        self.stop()
        if self.claimed:
            shutil.rmtree(self.path(WORK), ignore_errors=True)


def digest_of(path: str) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest()


def serve(keeper: Keeper) -> None:
    while True:
        message = keeper.source.message()
        do = message.pop("do")
        try:
            value = getattr(keeper, do)(**message)
        except OSError as error:
            answer({"error": error.strerror or str(error), "full": error.errno in (errno.ENOSPC, errno.EDQUOT)})
            continue
        if do != "fetch":
            answer({"ok": value})


def gone(number: int, frame: object) -> None:
    raise Lost(f"signal {number}")


def main() -> None:
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, gone)
    answer({"mark": MARK})
    source = Input(60.0)
    source.silence_s = source.message()["silence_s"]
    answer({"ok": None})
    keeper = Keeper(source)
    try:
        serve(keeper)
    except (Lost, BrokenPipeError):
        pass
    finally:
        keeper.leave()


if __name__ == "__main__":
    main()
