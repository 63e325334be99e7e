"""A program that the person gives, checked for the phone's instruction set, and run there with its peak memory watched."""

from __future__ import annotations

import re
import shlex
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_tests.devices import DeviceUnavailable
from device_tests.devices.adb_link import Link, TimedOut
from device_tests.devices.job import how_it_ended
from device_tests.errors import ArtifactFailure

ELF_ABIS = {183: "arm64-v8a", 40: "armeabi-v7a", 62: "x86_64", 3: "x86", 243: "riscv64"}  # e_machine: name of Android's
LOADER_SEGMENT = 3  # PT_INTERP
POLL_S = 0.25
# The runner's memory is read while it lives: grep finds nothing in the status of a process that has ended, and the loop stops.
SCRIPT = """cd {folder} || exit 1
LD_LIBRARY_PATH=. {command} >said.txt 2>&1 &
pid=$!
echo $pid >pid
while line=$(grep VmHWM /proc/$pid/status 2>/dev/null); do peak=$line; sleep {poll_s}; done
wait $pid
code=$?
rm -f pid
echo "$peak"
cat said.txt
exit $code"""
# {folder} may be a pattern: every program that still runs there
STOP = "for file in {folder}/pid; do [ -f $file ] && kill -9 $(cat $file) && rm -f $file; done"


@dataclass(frozen=True)
class Said:
    """What a runner printed, and the largest VmHWM seen in MB (10^6 bytes), None when it was not seen."""

    text: str
    peak_mb: float | None


@dataclass(frozen=True)
class Measured:
    """What was found of an artifact: fields of the record, lines of its environment, what a reader must know, missed limits."""

    fields: dict[str, Any]
    environment: dict[str, str]
    notes: list[str]
    failures: list[str]


@dataclass(frozen=True)
class Runner:
    """A program in ``folder`` of the phone, a path without blanks.

    It is left alone at ``deadline`` (of time.monotonic), ``limit_s`` after the job began; STOP ends it.
    """

    link: Link
    folder: str
    program: str
    deadline: float
    limit_s: float

    def run(self, arguments: list[str], check: Callable[[str], object] | None = None) -> Said:
        """Run to its end. ArtifactFailure, one line, when it fails, dies or takes too long.

        ``check`` reads the output before the exit code is judged, and may raise what says more.
        """
        command = " ".join(shlex.quote(word) for word in (f"./{self.program}", *arguments))
        script = SCRIPT.format(folder=self.folder, command=command, poll_s=POLL_S)
        try:
            answer = self.link.shell(script, max(1.0, self.deadline - time.monotonic()))
        except TimedOut as error:  # who removes the folder stops it
            raise ArtifactFailure(f"{self.program} {how_it_ended(None, '', self.limit_s)}") from error
        if check is not None:
            check(answer.text)
        if answer.code != 0:
            raise ArtifactFailure(f"{self.program} {how_it_ended(answer.code, telling_line(answer.text), self.limit_s)}")
        memory = re.match(r"VmHWM:\s*(\d+) kB", answer.text)
        return Said(answer.text, int(memory.group(1)) * 1024 / 1e6 if memory else None)


def check_runner(path: Path, abis: list[str], phone: str) -> None:
    """DeviceUnavailable unless ``path`` is an Android program of one of the phone's instruction sets."""
    try:
        with path.open("rb") as file:
            head = file.read(1 << 16)
    except OSError as error:
        raise DeviceUnavailable(f"{path}: cannot be read ({error.strerror}); give the runner's path") from error
    if head[:4] != b"\x7fELF" or len(head) < 64:
        raise DeviceUnavailable(f"{path}: no program for Android (no ELF file); give the binary that was built for {abis[0]}")
    abi = ELF_ABIS.get(struct.unpack_from("<H", head, 18)[0], "another processor")
    if abi not in abis:
        raise DeviceUnavailable(f"{path}: built for {abi}, {phone} runs {', '.join(abis)}; give the binary that was built for {abis[0]}")
    loader = _loader(head)
    if loader and not loader.startswith("/system/"):
        raise DeviceUnavailable(f"{path}: built for Linux ({loader}), not for Android; give the binary of an Android build")


def telling_line(text: str) -> str:
    """The first line that speaks of an error, else the last one: runners end in a line that says only that they failed."""
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("VmHWM:")]
    errors = [line for line in lines if re.search("error|fail|fatal|cannot|exception|abort", line, re.IGNORECASE)]
    return (errors or lines[-1:] or [""])[0]


def _loader(head: bytes) -> str:
    """Path of the dynamic loader that an ELF file asks for; empty for a static program."""
    wide = head[4] == 2
    table = struct.unpack_from("<Q" if wide else "<I", head, 32 if wide else 28)[0]
    size, count = struct.unpack_from("<HH", head, 54 if wide else 42)
    for index in range(count):
        place = table + index * size
        if place + size > len(head) or struct.unpack_from("<I", head, place)[0] != LOADER_SEGMENT:
            continue
        start = struct.unpack_from("<Q" if wide else "<I", head, place + (8 if wide else 4))[0]
        return head[start:].split(b"\0", 1)[0].decode("utf-8", "replace")
    return ""
