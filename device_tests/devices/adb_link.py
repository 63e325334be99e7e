"""Talking to one Android phone through the ``adb`` of the platform tools: shell, push, pull, each fault as one line.

Every command's exit code comes back inside its output. Old phones' shells lose it, and an answer without it is the sure sign that the
connection went away in the middle.
"""

from __future__ import annotations

import hashlib
import shlex
import shutil
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from device_tests.artifact import sha256_of
from device_tests.devices import DeviceUnavailable
from device_tests.errors import ArtifactFailure

EXIT_MARK = "pocketlm-exit="
ANSWER_S = 60.0  # for a command that should take a moment
SLOWEST_BYTES_PER_S = 500_000.0  # a transfer slower than this hangs
INSTALL = "install Android's platform-tools and put adb in the PATH"
WHAT_TO_DO = {
    "unauthorized": "unlock the phone and allow debugging from this computer, then run again",
    "offline": "unplug the cable and plug it in again, or run: adb reconnect",
    "no permissions": "let your user reach the USB device (udev rules of the platform-tools), then run: adb kill-server",
}


@dataclass(frozen=True)
class Answer:
    """What a shell command printed (both streams of an old phone, stdout of a newer one) and its exit code."""

    code: int
    text: str


class TimedOut(Exception):
    """A command that was given a limit ran past it; it may still run on the phone."""


@dataclass(frozen=True)
class Link:
    """One phone: ``adb`` is the program, ``serial`` the phone's."""

    adb: str
    serial: str

    @property
    def name(self) -> str:
        """As in the record."""
        return f"adb://{self.serial}"

    def shell(self, command: str, limit_s: float | None = None) -> Answer:
        """Run ``command`` in the phone's shell. DeviceUnavailable when the phone goes away, TimedOut past ``limit_s``."""
        words = [self.adb, "-s", self.serial, "shell", f"({command}); echo {EXIT_MARK}$?"]
        try:
            done = _run(words, ANSWER_S if limit_s is None else limit_s)
        except subprocess.TimeoutExpired as error:
            if limit_s is not None:
                raise TimedOut from error
            raise DeviceUnavailable(f"{self.name}: no answer to {command!r} in {ANSWER_S:g} s; reboot the phone") from error
        text, mark, code = done.stdout.replace("\r\n", "\n").rpartition(EXIT_MARK)
        if not mark or not code.strip().isdigit():
            raise self._lost(done)
        return Answer(int(code), text)

    def read(self, command: str) -> str:
        """What ``command`` prints, stripped; empty when it fails: an old phone does not have every service."""
        answer = self.shell(command)
        return answer.text.strip() if answer.code == 0 else ""

    def has(self, path: str) -> bool:
        """Whether the phone has a file there that is not empty."""
        return self.shell(f"[ -s {shlex.quote(path)} ]").code == 0

    def push(self, files: Iterable[Path], folder: str) -> None:
        """Copy files into a folder of the phone and compare their SHA-256 there. ArtifactFailure names what went wrong."""
        files = list(files)
        for file in files:
            limit = ANSWER_S + file.stat().st_size / SLOWEST_BYTES_PER_S
            self._transfer(["push", str(file), f"{folder}/{file.name}"], limit, f"{file.name} could not be copied to the phone")
        self.check({f"{folder}/{file.name}": sha256_of(file) for file in files})

    def check(self, digests: dict[str, str]) -> None:
        """ArtifactFailure unless the phone's files have these SHA-256."""
        answer = self.shell("sha256sum " + " ".join(shlex.quote(path) for path in digests))
        if answer.code == 127:
            raise DeviceUnavailable(f"{self.name}: its Android has no sha256sum; take a phone with Android 6 or newer")
        found = dict(reversed(line.split(None, 1)) for line in answer.text.splitlines() if len(line.split(None, 1)) == 2)
        for path, digest in digests.items():
            if found.get(path) != digest:
                raise ArtifactFailure(f"{path}: SHA-256 there is {found.get(path, 'unknown')[:12]}, here {digest[:12]}; run again")

    def pull(self, remote: str, local: Path) -> bytes:
        """The bytes of a file of the phone, by way of ``local``, compared by SHA-256."""
        self._transfer(["pull", remote, str(local)], ANSWER_S * 10, f"{remote} could not be copied from the phone")
        data = local.read_bytes()
        self.check({remote: hashlib.sha256(data).hexdigest()})
        return data

    def _transfer(self, words: list[str], limit_s: float, otherwise: str) -> None:
        try:
            done = _run([self.adb, "-s", self.serial, *words], limit_s)
        except subprocess.TimeoutExpired as error:
            raise DeviceUnavailable(f"{self.name}: adb {words[0]} hangs; plug the cable in again and run once more") from error
        if done.returncode == 0:
            return
        said = _last_line(done)
        if "no space left" in said.lower():
            raise ArtifactFailure(f"{otherwise}: it has no room left; free some and run again")
        if self.state() != "device":
            raise self._lost(done)
        raise ArtifactFailure(f"{otherwise} ({said}); run again")

    def state(self) -> str:
        """``device`` when all is well, else what adb says of it."""
        try:
            return _run([self.adb, "-s", self.serial, "get-state"], ANSWER_S).stdout.strip()
        except subprocess.TimeoutExpired:
            return "hangs"

    def _lost(self, done: subprocess.CompletedProcess[str]) -> DeviceUnavailable:
        said = _last_line(done) if done.stderr.strip() else "the connection ended in the middle of a command"
        return DeviceUnavailable(f"{self.name}: the phone went away ({said}); plug it in again and run once more")


def connect(wanted: str) -> Link:
    """The phone with the serial ``wanted``, or the only one there is. DeviceUnavailable says what to do."""
    adb = shutil.which("adb")
    if adb is None:
        raise DeviceUnavailable(f"adb://{wanted}: there is no adb here; {INSTALL}")
    try:
        done = _run([adb, "devices", "-l"], ANSWER_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DeviceUnavailable(f"adb://{wanted}: adb does not answer; run: adb kill-server") from error
    if done.returncode != 0:
        raise DeviceUnavailable(f"adb://{wanted}: adb cannot list phones ({_last_line(done)}); run: adb kill-server")
    phones = listed(done.stdout)
    serials = ", ".join(phones)
    if not phones:
        raise DeviceUnavailable(f"adb://{wanted}: no phone; plug one in, with USB debugging on in its developer options")
    if not wanted and len(phones) > 1:
        raise DeviceUnavailable(f"adb://: {len(phones)} phones; give one of them, as adb://SERIAL: {serials}")
    serial = wanted or next(iter(phones))
    if serial not in phones:
        raise DeviceUnavailable(f"adb://{serial}: no such phone; there are: {serials}")
    if phones[serial] != "device":
        advice = WHAT_TO_DO.get(phones[serial], "wait until it has started, then run again")
        raise DeviceUnavailable(f"adb://{serial}: the phone is {phones[serial]}; {advice}")
    return Link(adb, serial)


def listed(text: str) -> dict[str, str]:
    """Serial to state from ``adb devices -l``. A state of two words ("no permissions") is kept whole."""
    phones = {}
    started = False
    for line in text.splitlines():
        words = line.split()
        if started and len(words) > 1:
            phones[words[0]] = "no permissions" if words[1:3] == ["no", "permissions"] else words[1].rstrip(";")
        started = started or line.startswith("List of devices")
    return phones


def _run(words: list[str], limit_s: float) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace", timeout=limit_s, check=False
    )


def _last_line(done: subprocess.CompletedProcess[str]) -> str:
    lines = [line.strip() for line in (done.stdout + "\n" + done.stderr).splitlines() if line.strip()]
    return lines[-1] if lines else "adb said nothing"
