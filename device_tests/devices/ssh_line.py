"""One ssh connection to a board, with ``ssh_keeper`` at its other end. The person's own ssh client, configuration, agent and keys.

Nothing is asked on the way (no passwords), and a host key that is unknown or has changed stops it. ``POCKETLM_SSH_CONFIG`` names
another configuration file than ``~/.ssh/config``.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
import threading
from pathlib import Path
from typing import Any, Callable

from device_tests.devices import DeviceUnavailable
from device_tests.devices.ssh_address import Address
from device_tests.devices.ssh_faults import OLD_PYTHON, last_line, why_not
from device_tests.devices.ssh_keeper import MARK

KEEPER = Path(__file__).with_name("ssh_keeper.py")
CONFIG = "POCKETLM_SSH_CONFIG"
CONNECT_S, ALIVE_S, ALIVE_COUNT = 15, 5, 3  # a line that is silent for ALIVE_S * ALIVE_COUNT is given up
PING_S, SILENCE_S = 5.0, 60.0  # the keeper gives up by itself when it hears nothing for so long
LEAVE_S = 30.0  # for the keeper to clean up and for ssh to end
# handed to ``python3 -c``: the keeper itself follows as one line, because a shell could misread its quotes. Any Python 3 reads this
BOOTSTRAP = (
    f'import sys; sys.version_info < (3, 9) and sys.exit("{OLD_PYTHON} %d.%d" % sys.version_info[:2]); '
    "exec(eval(sys.stdin.buffer.raw.readline()))"
)
OPTIONS = {
    "BatchMode": "yes",
    "StrictHostKeyChecking": "yes",
    "ConnectTimeout": str(CONNECT_S),
    "ServerAliveInterval": str(ALIVE_S),
    "ServerAliveCountMax": str(ALIVE_COUNT),
    # what a configuration may have for logins by hand
    "ControlMaster": "no",  # a master that is there already is used
    "ClearAllForwardings": "yes",
    "ForwardAgent": "no",
    "PermitLocalCommand": "no",
    "RemoteCommand": "none",
    "RequestTTY": "no",
}


class BoardFull(DeviceUnavailable):
    """No room is left on the board."""


class Line:
    """A connection. ``doing`` is what is said to have broken off when it breaks."""

    def __init__(self, address: Address) -> None:
        """Connect. DeviceUnavailable says why that cannot be done and what to do."""
        self.address, self.doing = address, "the login"
        self._busy, self._write = False, threading.Lock()
        self._errors = tempfile.TemporaryFile()
        try:
            self._ssh = subprocess.Popen(
                command_line(address), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._errors, start_new_session=True
            )
        except FileNotFoundError as error:
            raise DeviceUnavailable(f"{address.name}: there is no ssh on this machine; install OpenSSH's client") from error
        try:
            self._send(repr(KEEPER.read_text(encoding="utf-8")).encode() + b"\n")
            self._greet()
        except BaseException:
            self._end(0.0)
            raise
        self._closed = threading.Event()
        threading.Thread(target=self._ping, daemon=True).start()

    def ask(self, do: str, payload: bytes = b"", waits: Callable[[str], None] | None = None, **fields: Any) -> Any:
        """Have the keeper do something; its answer. BoardFull and DeviceUnavailable carry what it said when it could not.

        ``payload`` follows the message. ``waits`` is called with the holder's name while another run has the board.
        """
        self._busy = True
        self._send(json.dumps({"do": do, **fields}).encode() + b"\n" + payload)
        while True:
            answer = self._answer()
            if "waits" not in answer:
                break
            if waits is not None:
                waits(answer["waits"])
        self._busy = False
        if "error" in answer:
            if answer["full"]:
                raise BoardFull(f"{self.address.name}: the board's disk is full during {self.doing}; make room there and run again")
            raise DeviceUnavailable(f"{self.address.name}: {self.doing} failed there ({answer['error']}); mend that and run again")
        return answer["ok"]

    def fetch(self, path: str) -> bytes | None:
        """A file of the board, None where there is none."""
        size = self.ask("fetch", path=path)
        if size is None:
            return None
        self._busy = True
        data = self._out.read(size)
        self._busy = False
        if len(data) != size:
            raise self.lost()
        return data

    def close(self, everything: bool) -> str | None:
        """Leave the board clean and wait until it is; what went wrong there with that. A keeper that is in the middle of something
        is asked nothing: it cleans up when the line ends, but keeps the files that were sent.
        """
        failure = None
        try:
            if not self._busy and self._ssh.poll() is None:
                self._send(json.dumps({"do": "close", "everything": everything}).encode() + b"\n")
                answer = self._out.readline()
                failure = json.loads(answer)["error"] if answer else None
        except DeviceUnavailable as error:
            failure = str(error)
        self._closed.set()
        self._end(LEAVE_S)
        return failure

    def lost(self) -> DeviceUnavailable:
        """The error that says why the connection is gone."""
        self._end(LEAVE_S)
        reason = last_line(self._said()) or "it closed without a word"
        return DeviceUnavailable(
            f"{self.address.name}: the connection broke off during {self.doing} ({reason}); the board lost its network or power, or was "
            "started anew: look at it and run again, what was sent is still there"
        )

    def _greet(self) -> None:
        """Wait for the keeper; whatever a login script prints before is not for us."""
        self._out = self._ssh.stdout
        for line in self._out:
            if line.startswith(b"{") and MARK.encode() in line:
                self.ask("hello", silence_s=SILENCE_S)
                return
        raise DeviceUnavailable(why_not(self.address, self._ssh.wait(), self._said()))

    def _answer(self) -> dict[str, Any]:
        line = self._out.readline()
        if not line.endswith(b"\n"):
            raise self.lost()
        return json.loads(line)

    def _send(self, data: bytes) -> None:
        try:
            with self._write:
                self._ssh.stdin.write(data)
                self._ssh.stdin.flush()
        except (BrokenPipeError, ValueError) as error:  # ValueError: closed by another thread
            if self.doing == "the login":
                return  # the reader finds out why
            raise self.lost() from error

    def _ping(self) -> None:
        while not self._closed.wait(PING_S):
            try:
                with self._write:
                    self._ssh.stdin.write(b'{"do": "ping"}\n')
                    self._ssh.stdin.flush()
            except (BrokenPipeError, ValueError):  # whoever asks next is told
                return

    def _end(self, seconds: float) -> None:
        """Close our side, give the other one time to clean up, and see that ssh has ended."""
        try:
            self._ssh.stdin.close()
        except BrokenPipeError:  # what was still to be sent has nowhere to go
            pass
        try:
            self._ssh.wait(seconds)
        except subprocess.TimeoutExpired:
            self._ssh.kill()
            self._ssh.wait()

    def _said(self) -> str:
        self._errors.seek(0)
        return self._errors.read().decode("utf-8", "replace")


def command_line(address: Address) -> list[str]:
    """ssh with our options before the person's: the first one given counts."""
    own = os.environ.get(CONFIG)
    options = [word for name, value in OPTIONS.items() for word in ("-o", f"{name}={value}")]
    return ["ssh", *(["-F", own] if own else []), "-T", *options, *address.login, f"exec python3 -c '{BOOTSTRAP}'"]
