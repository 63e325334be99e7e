"""An Android phone over adb: ``adb://SERIAL?benchmark_model=PATH&onnxruntime_perf_test=PATH``, the serial empty for the only phone.

There is no Python on a phone, so the person gives the runtimes' own benchmark programs, built for Android: ``benchmark_model`` (LiteRT
or TFLite) runs .tflite, ``onnxruntime_perf_test`` runs .onnx. More of the address: ``threads=4``, and ``library=PATH`` for each shared
library that a program needs. A character that an address cannot hold is written as %26 and the like.

Every run has its own folder below /data/local/tmp, checked by SHA-256, and leaves nothing. Two runs on one phone wait for each other.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shlex
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from threading import Lock
from typing import Any
from urllib.parse import unquote

from device_tests.artifact import read_artifact, sha256_of
from device_tests.devices import DeviceUnavailable, adb_onnx, adb_tflite
from device_tests.devices.adb_link import Link, connect
from device_tests.devices.adb_phone import FOLDER, condition, describe, free_bytes
from device_tests.devices.adb_runner import STOP, Measured, Runner, check_runner
from device_tests.devices.job import Job, failed_result, files_of
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.result import DeviceRecord
from device_tests.sessions import RUNTIMES
from device_tests.vectors import open_golden

Tell = Callable[[str, str], None]
PREFIX = "pocketlm-"
MEASURES = {adb_tflite.PROGRAM: adb_tflite.measure, adb_onnx.PROGRAM: adb_onnx.measure}
PROGRAMS = {"litert": adb_tflite.PROGRAM, "onnxruntime": adb_onnx.PROGRAM}
SPARE_BYTES = 64 << 20  # for inputs and outputs
TIMES = {
    "load_ms", "first_token_ms", "first_token_cold_ms", "first_token_samples_ms", "prompt_tokens", "prompts", "prefill_tokens_per_s",
    "decode_ms", "decode_ms_p50", "decode_ms_p90", "decode_ms_p99", "decode_tokens_per_s",
}  # fmt: skip


@dataclass(frozen=True)
class Address:
    """What an address says. ``programs`` are paths of this machine by the program's name."""

    serial: str
    threads: int | None
    programs: dict[str, Path]
    libraries: tuple[Path, ...]


class Phone:
    """An open phone with a folder of its own. ``runtimes`` are those that a program was given for."""

    def __init__(self, link: Link, address: Address, board: dict[str, Any], tell: Tell) -> None:
        self.name = link.name
        self.threads = address.threads
        self.board = board
        self.emulated = bool(board["emulated"])
        self.missing = {name: why for name, why in ((name, why_missing(name, address)) for name in RUNTIMES) if why}
        self.folder = f"{FOLDER}/{PREFIX}{secrets.token_hex(4)}"
        self._link, self._address, self._tell = link, address, tell
        self._one_at_a_time = Lock()

    def run(self, job: Job) -> dict[str, Any]:
        """The job's result, whatever became of it. DeviceUnavailable only when the phone goes away."""
        job = job.with_threads(self.threads)
        with self._one_at_a_time:
            try:
                result = self._measure(job)
            except DeviceUnavailable:
                raise
            except (ArtifactFailure, DeviceTestError) as error:
                result = failed_result(job, self.name, self.board["isa"], " ".join(str(error).split()))
            remove(self._link, self.folder)
        return result

    def _measure(self, job: Job) -> dict[str, Any]:
        missing = why_missing(job.run.runtime, self._address)
        if missing:
            raise DeviceTestError(missing)
        program = self._program(job.run.runtime)
        artifact = read_artifact(job.sidecar)
        form = RUNTIMES[job.run.runtime][0]
        if artifact.format != form:
            raise DeviceTestError(f"it is {artifact.format}, {job.run.runtime} runs {form}; give another runtime")
        golden = open_golden(job.golden, artifact.interface)
        sent = [program, *self._address.libraries, *files_of(job)[1:]]  # the artifact's JSON stays here
        self._send(sent, program, artifact.name)
        self._tell(self.name, f"running {artifact.name} in {job.run.runtime}")
        runner = Runner(self._link, self.folder, program.name, time.monotonic() + job.run.timeout_s, job.run.timeout_s)
        conditions = {"before": condition(self._link)}
        with tempfile.TemporaryDirectory(prefix="device-test-") as local:
            measured = MEASURES[PROGRAMS[job.run.runtime]](runner, artifact, golden, job.run, Path(local))
        conditions["after"] = condition(self._link)
        self._link.check({f"{self.folder}/{file.name}": sha256_of(file) for file in sent})  # what was measured is what was sent
        return {
            "artifact": artifact.name,
            "sha256": artifact.sha256,
            "device": self._record(job, artifact.name, measured, conditions),
            "quality": None,
        }

    def _program(self, runtime: str) -> Path:
        return self._address.programs[PROGRAMS[runtime]]

    def _send(self, files: list[Path], program: Path, artifact: str) -> None:
        needed = sum(file.stat().st_size for file in files) + SPARE_BYTES
        free = free_bytes(self._link)
        if free is not None and free < needed:
            raise ArtifactFailure(f"the phone has {free / 1e6:.0f} MB free in {FOLDER}, {needed / 1e6:.0f} are needed; free some")
        self._tell(self.name, f"sending {artifact}")
        if self._link.shell(f"mkdir -p {self.folder}").code != 0:
            raise DeviceUnavailable(f"{self.name}: no folder could be made in {FOLDER}; reboot the phone")
        self._link.push(files, self.folder)
        self._link.shell(f"chmod 755 {shlex.quote(f'{self.folder}/{program.name}')}")

    def _record(self, job: Job, artifact: str, measured: Measured, conditions: dict[str, dict[str, Any]]) -> dict[str, Any]:
        board, program = self.board, self._program(job.run.runtime)
        timed = job.run.timing and not self.emulated
        fields = {name: value for name, value in measured.fields.items() if timed or name not in TIMES}
        record = DeviceRecord(
            device=self.name,
            isa=board["isa"],
            runtime=job.run.runtime,
            runtime_version=sha256_of(program)[:12],  # the programs print no version
            threads=job.run.threads,
            emulated=self.emulated,
            environment={
                **{name: str(board[name]) for name in ("kernel", "system", "build")},
                "program": f"{program.name}, SHA-256 {sha256_of(program)}",
                "libc": "bionic",
                "cpus": str(board["cores"]),
                **measured.environment,
            },
            conditions=conditions,
            notes=measured.notes + notes_of(job, conditions),
            passed=not measured.failures,
            failures=[f"{artifact} in {job.run.runtime} on {self.name}: {line}" for line in measured.failures],
            **fields,
        )
        return asdict(record)

    def close(self) -> None:
        """Stop what may still run and remove the folder; a phone that is gone keeps it until the next run."""
        try:
            remove(self._link, self.folder)
        except DeviceUnavailable:
            self._tell(self.name, f"the phone is gone and keeps {self.folder}; the next run there removes it")


def remove(link: Link, folder: str) -> None:
    """Stop what still runs in ``folder``, which may be a pattern, and remove it."""
    link.shell(f"{STOP.format(folder=folder)}; rm -rf {folder}")


def why_missing(runtime: str, address: Address) -> str | None:
    """Why a runtime cannot be had on the phone; None when it can."""
    if runtime not in PROGRAMS:
        return f"one {adb_tflite.PROGRAM} is given for a phone, and its runs are told as litert's"
    return None if PROGRAMS[runtime] in address.programs else f"no program was given; add {PROGRAMS[runtime]}=PATH to the address"


def notes_of(job: Job, conditions: dict[str, dict[str, Any]]) -> list[str]:
    """What a reader must know besides the runner's own notes."""
    notes = ["temperatures are the battery's; the file was in the page cache when it was loaded, for it had just been sent"]
    untested = (
        ("perplexity over the evaluation text", job.run.quality),
        ("single tokens' scores", job.run.tokens),
        ("agreement with this machine", job.run.answers),
    )
    wanted = [what for what, given in untested if given]
    if wanted:
        notes.append(f"not tested on a phone: {', '.join(wanted)}")
    throttled = [f"{when}: {state['thermal_status']}" for when, state in conditions.items() if state["throttled"]]
    if throttled:
        notes.append(f"the phone was throttled ({', '.join(throttled)}): times are not its best")
    return notes


@contextmanager
def open_at(address: str, tell: Tell) -> Iterator[Phone]:
    """The phone at ``address``, alone with it. DeviceUnavailable says why it cannot be used and what to do."""
    given = parse(address)
    link = connect(given.serial)
    board = describe(link)
    if not board["abis"]:
        raise DeviceUnavailable(f"{link.name}: getprop tells no instruction set; reboot the phone")
    for program in given.programs.values():
        check_runner(program, board["abis"], link.name)
    with _alone(link, tell):
        remove(link, f"{FOLDER}/{PREFIX}*")  # of a run whose phone went away: its program may still run
        phone = Phone(link, given, board, tell)
        try:
            yield phone
        finally:
            phone.close()


def parse(address: str) -> Address:
    """Read an address. DeviceTestError for what it cannot say."""
    rest, _, query = address.partition("?")
    serial = rest.partition("://")[2].rstrip("/")
    threads, programs, libraries = None, {}, []
    for part in filter(None, query.split("&")):
        key, _, value = part.partition("=")
        value = unquote(value)
        if key == "threads" and value.isdigit() and int(value) > 0:
            threads = int(value)
        elif key in MEASURES and value:
            programs[key] = _file(address, key, value)
        elif key == "library" and value:
            libraries.append(_file(address, key, value))
        else:
            raise DeviceTestError(f"{address}: {part} is unknown; give threads=4, library=PATH, {'=PATH or '.join(MEASURES)}=PATH")
    if not programs:
        raise DeviceTestError(f"{address}: no program to run there; add {'=PATH or '.join(MEASURES)}=PATH, built for Android")
    return Address(serial, threads, programs, tuple(libraries))


def _file(address: str, key: str, value: str) -> Path:
    path = Path(value).expanduser()
    if not path.is_file():
        raise DeviceTestError(f"{address}: {key}: no file {path}; give the program's path")
    return path


@contextmanager
def _alone(link: Link, tell: Tell) -> Iterator[None]:
    """Hold this machine's lock on the phone; another run's end is waited for."""
    safe = "".join(letter if letter.isalnum() else "_" for letter in link.serial)
    path = Path(tempfile.gettempdir()) / f"pocketlm-adb-{safe}.lock"
    try:
        lock = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise DeviceUnavailable(f"{path}: cannot be opened ({error.strerror}); remove it") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            tell(link.name, "waiting for another run on this phone")
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
