"""A board over ssh: a Raspberry Pi, or any other Linux on ARM64 or x86-64 that one can log in to with a key.

The board is looked at before anything is sent. All that is put there lies in ``~/.cache/pocketlm``: the runtimes' environment, which
stays for the next run, and what this run sends, which does not. Two runs with one board wait for each other.
"""

from __future__ import annotations

import getpass
import io
import json
import platform
import tempfile
import threading
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from device_tests import board as board_module
from device_tests.artifact import read_artifact
from device_tests.devices import DeviceUnavailable, Tell
from device_tests.devices.job import (
    ANSWERS,
    GATES,
    RESULT,
    THREAD_VARIABLES,
    TOKENS,
    Job,
    Places,
    arguments,
    failed_result,
    files_of,
    gates_json,
    how_it_ended,
)
from device_tests.devices.ssh_address import parse
from device_tests.devices.ssh_environment import Environment, Site, prepare
from device_tests.devices.ssh_files import FOLDER, Files
from device_tests.devices.ssh_line import Line
from device_tests.errors import DeviceTestError

CODE, JOB = "work/code", "work/job"
PACKAGE = Path(__file__).resolve().parent.parent
ISAS = ("aarch64", "x86_64")
BANDWIDTH_S = 300.0
LEAST_MEMORY = 128e6  # Python, numpy and a runtime before the model is opened


@dataclass(frozen=True)
class Boarded:
    """Everything that a run on the board needs."""

    line: Line
    files: Files
    environment: Environment
    folder: str


class SshBoard:
    """An open board. One job at a time: two at once would time each other."""

    def __init__(self, boarded: Boarded, facts: dict[str, Any], threads: int | None) -> None:
        self.name = boarded.line.address.name
        self.emulated = facts["emulated"]
        self.threads = threads
        self.board: dict[str, Any] = {**facts, "bandwidth_gb_s": {}}
        self.missing = boarded.environment.missing
        self._boarded, self._one_at_a_time = boarded, threading.Lock()

    def run(self, job: Job) -> dict[str, Any]:
        """The job's result, whatever became of it. DeviceUnavailable when the board was lost or has no room for it."""
        if job.run.runtime in self.missing:
            raise DeviceTestError(f"{self.name}: {job.run.runtime} cannot run there: {self.missing[job.run.runtime]}")
        with self._one_at_a_time:
            if job.run.timing and not self.emulated and str(job.run.threads) not in self.board["bandwidth_gb_s"]:
                self.board["bandwidth_gb_s"][str(job.run.threads)] = self._bandwidth(job.run.threads)
            places = self._bring(job)
            return self._run(job, places)

    def _bandwidth(self, threads: int) -> float | None:
        """GB/s that the board reads from memory; None where it has too little of it to measure."""
        line = self._boarded.line
        line.doing = "measuring its memory bandwidth"
        done = self._start(["-m", "device_tests.bandwidth", "--threads", str(threads)], threads, BANDWIDTH_S)
        told = [said for said in done["words"].splitlines() if said.startswith("{")]
        return json.loads(told[-1])["gb_s"] if done["code"] == 0 and told else None

    def _bring(self, job: Job) -> Places:
        """Put the artifact, the vectors and the gates where the job finds them."""
        line, files = self._boarded.line, self._boarded.files
        artifact = read_artifact(job.sidecar)
        free = line.ask("board", source=board_source())["free_memory_mb"]
        if free is not None and artifact.bytes + LEAST_MEMORY > free * 1e6:
            needed = (artifact.bytes + LEAST_MEMORY) / 1e6
            raise DeviceUnavailable(
                f"{self.name}: {artifact.name} needs at least {needed:.0f} MB of memory and {free:.0f} MB are free on the board; end what "
                "runs there, or test a smaller artifact"
            )
        model, golden = files_of(job), golden_files(job)
        line.ask("remove", path=JOB)
        for paths, folder in ((model, "artifact"), (golden, "golden")):
            for path, name in zip(paths, files.send(paths)):
                line.ask("place", sha256=name, path=f"{JOB}/{folder}/{path.name}")
        line.ask("write", path=f"{JOB}/{GATES}", text=gates_json(job.run))
        place = f"{self._boarded.folder}/{JOB}"
        return Places(f"{place}/artifact/{job.sidecar.name}", f"{place}/golden", place)

    def _run(self, job: Job, places: Places) -> dict[str, Any]:
        line, run = self._boarded.line, job.run
        line.doing = f"the run of {job.sidecar.stem} in {run.runtime}"
        done = self._start(["-m", "device_tests", *arguments(job, places, self.name)], run.threads, run.timeout_s)
        result = line.fetch(f"{JOB}/{RESULT}") if done["code"] in (0, 1) else None
        for name, wanted in ((TOKENS, run.tokens), (ANSWERS, run.answers)):
            data = None if wanted is None else line.fetch(f"{JOB}/{name}")
            if wanted is not None and data is not None:
                wanted.write_bytes(data)
        line.ask("remove", path=JOB)
        if result is not None:
            return json.loads(result)
        return failed_result(job, self.name, self.board["isa"], how_it_ended(done["code"], done["words"], run.timeout_s))

    def _start(self, command: list[str], threads: int, timeout_s: float) -> dict[str, Any]:
        folder = self._boarded.folder
        environment = {"PYTHONPATH": f"{folder}/{CODE}", "PYTHONNOUSERSITE": "1", **{name: str(threads) for name in THREAD_VARIABLES}}
        words = [self._boarded.environment.python, *command]
        return self._boarded.line.ask("run", command=words, environment=environment, folder="work", timeout_s=timeout_s)


@contextmanager
def open_at(address: str, tell: Tell) -> Iterator[SshBoard]:
    """The board at ``ssh://user@host[:port][?threads=4][&clean=1]``. DeviceUnavailable says why it cannot be used."""
    given = parse(address)
    line = Line(given)
    try:
        facts = line.ask("board", source=board_source())
        tell(given.name, description(facts))
        refuse(given.name, facts)
        line.doing = "waiting for another run"
        who = f"{getpass.getuser()}@{platform.node()}"
        claimed = line.ask("claim", folder=FOLDER, who=who, waits=lambda holder: tell(given.name, f"waits for the run of {holder}"))
        files = Files(line, tell)
        environment = prepare(line, Site(claimed["folder"], claimed["python"], facts), files, tell)
        line.ask("unpack", sha256=send_code(files), path=CODE)
        yield SshBoard(Boarded(line, files, environment, claimed["folder"]), facts, given.threads)
    finally:
        failure = line.close(given.clean)
        if failure:
            tell(given.name, f"could not be cleaned ({failure}); remove {FOLDER} there by hand")


def refuse(name: str, facts: dict[str, Any]) -> None:
    """DeviceUnavailable for a board that no wheel can run on, before anything is sent."""
    if facts["isa"] not in ISAS:
        raise DeviceUnavailable(f"{name}: it is {facts['isa']}, the runtimes are for {' and '.join(ISAS)}; use a 64-bit system")
    if facts["python_bits"] != 64:
        raise DeviceUnavailable(f"{name}: its system is 32-bit, the runtimes are 64-bit; install the 64-bit system on it")
    if facts["libc"] is None:
        raise DeviceUnavailable(f"{name}: its C library is not glibc, which the runtimes need; install Debian, Ubuntu or Raspberry Pi OS")
    if not facts["venv"]:
        raise DeviceUnavailable(f"{name}: its Python cannot make environments; install python3-venv there")


def description(facts: dict[str, Any]) -> str:
    """The board in one line, without what it does not tell."""
    throttled = {True: "throttled", False: "not throttled", None: ""}[facts["throttled"]]
    temperature = "" if facts["temperature_c"] is None else f"{facts['temperature_c']:.0f} °C"
    clock = "" if facts["clock_mhz"] is None else f"{facts['clock_mhz']:.0f} MHz"
    memory = "" if facts["free_memory_mb"] is None else f"{facts['free_memory_mb']:.0f} MB of memory free"
    parts = [facts["model"], f"{facts['cores']} x {facts['cpu'] or facts['isa']}", clock, facts["governor"], temperature, throttled, memory]
    parts += [f"{facts['free_disk_mb']:.0f} MB of disk free", f"Python {facts['python']}", facts["libc"]]
    return ", ".join(part for part in parts if part)


def golden_files(job: Job) -> list[Path]:
    """The vectors that the job reads."""
    scored = job.run.quality or job.run.tokens is not None or job.run.windows is not None
    wanted = [job.golden / name for name in (("golden.npz", "evaluation.npz") if scored else ("golden.npz",))]
    for path in wanted:
        if not path.is_file():
            raise DeviceTestError(f"{path}: no such file; give the folder that holds the golden vectors")
    return wanted


def send_code(files: Files) -> str:
    """Send what runs on the board, as one archive of the same bytes every time; its name."""
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        for path in sorted(PACKAGE.glob("*.py")):
            archive.writestr(zipfile.ZipInfo(f"{PACKAGE.name}/{path.name}"), path.read_bytes())
    with tempfile.TemporaryDirectory(prefix="device-tests-") as folder:
        file = Path(folder) / "device_tests.zip"
        file.write_bytes(packed.getvalue())
        return files.send([file])[0]


def board_source() -> str:
    """The module that a board describes itself by, as text."""
    return Path(board_module.__file__).read_text(encoding="utf-8")
