"""A stand-in for adb with one phone behind it, for tests. It is no adb and there is no phone: nothing here was ever near Android.

It follows adb 29 to 35 (platform-tools) for the calls that the driver makes: ``devices -l``, ``-s SERIAL`` with ``get-state``,
``push``, ``pull`` and ``shell``, with their words, streams and exit codes. The phone's file system is the folder STAND_IN_PHONE:
commands run in this machine's sh with the phone's paths put below that folder and its own ``getprop``, ``dumpsys``, ``df`` and
``uname`` first in the PATH. What a command starts goes on when adb is killed, as it does on a phone.

STAND_IN_FAULT switches a fault on: ``no_room`` (a push finds no space), ``corrupt`` (a push changes a byte), ``old`` (the shell of
Android 6: no exit codes, one stream, CRLF), ``unplugged:TEXT`` (the cable is pulled at the first command or file that has TEXT in
it). Every call is written to ``calls.jsonl`` in the folder.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

PHONE = Path(os.environ["STAND_IN_PHONE"])
FAULT, _, DETAIL = os.environ.get("STAND_IN_FAULT", "").partition(":")
MOVED = ("/data/local/tmp", "/proc/cpuinfo", "/proc/meminfo", "/sys/devices/system/cpu")


def main(words: list[str]) -> int:
    """One call of adb."""
    with (PHONE / "calls.jsonl").open("a", encoding="utf-8") as calls:
        calls.write(json.dumps(words) + "\n")
    devices = (PHONE / "devices").read_text(encoding="utf-8")
    if words == ["devices", "-l"]:
        print("List of devices attached\n" + ("" if gone() else devices))
        return 0
    if words[:1] != ["-s"] or len(words) < 3:
        return fail(f"adb: unknown command {words[0] if words else ''}")
    serial, command, rest = words[1], words[2], words[3:]
    if gone() or serial not in devices:
        told = f"device '{serial}' not found"
        return fail(f"adb: error: failed to get feature set: {told}" if command in ("push", "pull") else f"error: {told}")
    if command == "get-state" and not rest:
        print("device")
        return 0
    if command == "push" and len(rest) == 2:
        return push(Path(rest[0]), rest[1])
    if command == "pull" and len(rest) == 2:
        return pull(rest[0], Path(rest[1]))
    if command == "shell" and rest:
        return shell(" ".join(rest))
    return fail(f"adb: usage: unknown command {command}")


def gone() -> bool:
    """Whether the cable was pulled."""
    return (PHONE / "gone").exists()


def pulled_now(text: str) -> bool:
    """Pull the cable, if this is the moment."""
    if FAULT == "unplugged" and DETAIL in text:
        (PHONE / "gone").touch()
    return gone()


def fail(words: str) -> int:
    """adb's way to fail."""
    print(words, file=sys.stderr)
    return 1


def there(path: str) -> Path:
    """Where a path of the phone lies here."""
    return PHONE / path.lstrip("/")


def push(local: Path, remote: str) -> int:
    """Copy a file to the phone."""
    error = f"adb: error: failed to copy '{local}' to '{remote}': remote"
    if pulled_now(remote):
        there(remote).write_bytes(local.read_bytes()[:100])
        return fail(f"adb: error: failed to copy '{local}' to '{remote}': no response: Connection reset by peer")
    if not there(remote).parent.is_dir():
        return fail(f"{error} couldn't create file: No such file or directory")
    if FAULT == "no_room":
        there(remote).write_bytes(local.read_bytes()[:100])
        return fail(f"{error} write failed: No space left on device")
    shutil.copyfile(local, there(remote))
    if FAULT == "corrupt":
        data = bytearray(there(remote).read_bytes())
        data[len(data) // 2] ^= 1
        there(remote).write_bytes(data)
    os.chmod(there(remote), 0o644)
    size = local.stat().st_size
    print(f"{local}: 1 file pushed, 0 skipped. 31.2 MB/s ({size} bytes in {size / 31.2e6:.3f}s)")
    return 0


def pull(remote: str, local: Path) -> int:
    """Copy a file from the phone."""
    if pulled_now(remote) or not there(remote).is_file():
        return fail(f"adb: error: failed to stat remote object '{remote}': No such file or directory")
    shutil.copyfile(there(remote), local)
    size = local.stat().st_size
    print(f"{remote}: 1 file pulled, 0 skipped. 28.8 MB/s ({size} bytes in {size / 28.8e6:.3f}s)")
    return 0


def shell(command: str) -> int:
    """Run a command in a session of its own, which neither Ctrl-C nor the end of adb reaches."""
    moved = command
    for path in MOVED:
        moved = moved.replace(path, str(there(path)))
    old = FAULT == "old"
    environment = {**os.environ, "PATH": f"{PHONE}/bin:/usr/bin:/bin"}
    child = subprocess.Popen(
        ["/bin/sh", "-c", moved], cwd=PHONE, env=environment, start_new_session=True, stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT if old else subprocess.PIPE, text=True, errors="replace",
    )  # fmt: skip
    if pulled_now(command):
        time.sleep(0.5)  # the command has begun
        return 255
    stdout, stderr = child.communicate()
    for path in MOVED:
        stdout = stdout.replace(str(there(path)), path)
    sys.stdout.write(stdout.replace("\n", "\r\n") if old else stdout)
    sys.stderr.write(stderr or "")
    return 0 if old else child.returncode % 256


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
