"""Boards over a real sshd: this machine as an x86-64 board, the emulated machine as an ARM64 one, with real faults on the way."""

import json
import os
import platform
import re
import shutil
import signal
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from device_tests.artifact import read_artifact, sha256_of
from device_tests.devices import DeviceUnavailable, open_device, ssh, ssh_environment, ssh_line
from device_tests.devices.job import Job, Run
from device_tests.devices.lab import lab_at
from device_tests.devices.ssh_wheels import Lock, Target, choose, fetch, read_lock
from device_tests.devices.tests.stand_in_board import CACHE, StandIn
from device_tests.devices.tests.stand_in_network import Wire, package_index
from device_tests.errors import DeviceTestError
from device_tests.gates import Gates
from device_tests.tests.toy import CONTEXT, ToyModel, write_onnx, write_vectors

STRICT = Gates(perplexity_change=1e-5, top1=1.0, kl=1e-6, max_abs_diff=5e-5)
NO_INDEX = {"PIP_INDEX_URL": "http://127.0.0.1:9/simple", "PIP_CONFIG_FILE": "/dev/null"}
QUICK = Run("onnxruntime", timing=False)
ENDLESS = Run("onnxruntime", decode_tokens=10**9)
FILLER = 6_000_000  # bytes that make the artifact long enough to be cut in its middle


@pytest.fixture(scope="module")
def toy(tmp_path_factory) -> Path:
    """A toy as ONNX, with vectors, and with a second file of random bytes that belongs to it."""
    folder = tmp_path_factory.mktemp("toy")
    sidecar = write_onnx(ToyModel(), folder / "toy.onnx")
    (folder / "toy.extra").write_bytes(np.random.default_rng(0).bytes(FILLER))
    record = json.loads(sidecar.read_text())
    record["files"].append({"path": "toy.extra", "sha256": sha256_of(folder / "toy.extra"), "bytes": FILLER})
    sidecar.write_text(json.dumps(record))
    return write_vectors(folder, ToyModel(), ToyModel(1))


@pytest.fixture(scope="module")
def board(tmp_path_factory):
    """This machine as a board whose package index has what the lock pins; its environment stays for the whole module."""
    python = tuple(int(number) for number in platform.python_version_tuple()[:2])
    target = Target(python, (2, 36), platform.machine())
    try:
        wheels = fetch(list(choose(read_lock(), target)[0].values()), target, CACHE / "wheels")
    except DeviceUnavailable as error:
        pytest.skip(f"the wheels for a board cannot be had here: {error}")
    folder = tmp_path_factory.mktemp("board")
    with package_index(folder / "index", wheels) as (address, asked):
        board = StandIn(folder / "pi", environment={**NO_INDEX, "PIP_INDEX_URL": address})
        board.asked = asked
        board.start()
        yield board
        board.kill()


def running(board: StandIn) -> list[int]:
    """Ids of the jobs' programs on this board."""
    return board.processes(job_of(board))


def job_of(board: StandIn) -> str:
    """What is in the command line of a job's program on this board."""
    return f"{board.cache}/work/job"


def when_it_runs(board: StandIn, call) -> None:
    """Call ``call`` when a job's program on the board is in the middle of its work."""
    threading.Thread(target=lambda: (until(lambda: board.busy(job_of(board), 3.0), 60), call()), daemon=True).start()


@pytest.fixture()
def wire(board):
    """A cable to the board."""
    wire = Wire(board.port)
    yield wire
    wire.close()


@pytest.fixture()
def told():
    """What the person was told, line by line."""
    return []


@contextmanager
def opened(stand_in: StandIn, told: list[str], address: str = "ssh://board", port: int | None = None):
    """The board, by an ssh configuration of its own; ``port`` may be that of a cable."""
    before = os.environ.get("POCKETLM_SSH_CONFIG")
    os.environ["POCKETLM_SSH_CONFIG"] = str(stand_in.client(f"to-{port}", port))
    try:
        with open_device(address, lambda what, state: told.append(f"{what}: {state}")) as device:
            yield device
    finally:
        os.environ.pop("POCKETLM_SSH_CONFIG") if before is None else os.environ.update(POCKETLM_SSH_CONFIG=before)


def another(board: StandIn, folder: Path, **settings) -> StandIn:
    """A second board that already has the first one's environment."""
    stand_in = StandIn(folder / "other", environment=board.environment, **settings)
    shutil.copytree(environments_of(board), stand_in.cache / "environments", symlinks=True, copy_function=os.link)
    stand_in.start()
    return stand_in


def environments_of(board: StandIn) -> Path:
    """The runtimes' environment on the board, made now if no test before did."""
    if not (board.cache / "environments").exists():
        with opened(board, []):
            pass
    return board.cache / "environments"


def until(condition, seconds: float = 20.0):
    """Wait for something that must come true."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "it never came true"
        time.sleep(0.02)
    return found


def test_an_artifact_runs_on_the_board_and_nothing_of_it_stays(board, toy, told, tmp_path):
    """The first run: the environment comes from the board's own index. Results come back, times and all."""
    run = Run("onnxruntime", gates=STRICT, quality=True, decode_tokens=16, tokens=tmp_path / "tokens.npz", answers=tmp_path / "answers.npz")
    with opened(board, told, "ssh://board?threads=2") as device:
        assert device.name == "ssh://board" and device.threads == 2 and not device.emulated and device.missing == {}
        result = device.run(Job(toy / "toy.json", toy, run).with_threads(device.threads))
        assert set(device.board["bandwidth_gb_s"]) == {"2"} and device.board["bandwidth_gb_s"]["2"] > 0
        assert device.board["kernel"].startswith("Linux") and device.board["libc"].startswith("glibc")
        assert board.left() and "onnxruntime" in str(board.asked)
    measured = result["device"]
    assert measured["passed"], measured["failures"]
    assert measured["device"] == "ssh://board" and measured["threads"] == 2 and measured["top1"] == 1.0 and measured["decode_ms"]
    assert result["quality"]["tokens"] == 39 and result["sha256"] == read_artifact(toy / "toy.json").sha256
    assert "nll" in np.load(run.tokens).files and np.load(run.answers).files
    assert board.left() == []
    assert "sent from here" not in str(told) and "runtimes stay there for the next run" in str(told)


def test_the_next_run_finds_its_environment_and_the_board_waits_for_nobody_twice(board, toy, told):
    """Two runs at once: the second one says that it waits, and goes on when the first has ended."""
    second: list[str] = []
    results = []

    def run_second() -> None:
        with opened(board, second) as device:
            results.append(device.run(Job(toy / "toy.json", toy, QUICK)))

    with opened(board, told) as device:
        assert "runtimes are there from an earlier run" in str(told)
        other = threading.Thread(target=run_second)
        other.start()
        until(lambda: any("waits for the run of" in line for line in second))
        result = device.run(Job(toy / "toy.json", toy, QUICK))
        assert not results and len([line for line in second if "waits" in line]) == 1
    other.join(60)
    assert result["device"]["passed"] and results[0]["device"]["passed"] and board.left() == []


def test_jobs_that_end_badly_are_rows_and_the_next_one_still_runs(board, toy, told, tmp_path, monkeypatch):
    with opened(board, told) as device:
        stopped = device.run(Job(toy / "toy.json", toy, Run("onnxruntime", decode_tokens=10**9, timeout_s=4.0)))
        assert re.fullmatch(r"toy in onnxruntime on ssh://board: stopped after 4 s .*", stopped["device"]["failures"][0])
        assert not running(board), "the program must not run on"
        failed = device.run(Job(toy / "toy.json", toy, Run("onnxruntime", gates=Gates(max_abs_diff=1e-12), timing=False)))
        assert not failed["device"]["passed"] and "exceeds 1e-12" in failed["device"]["failures"][0]
        wrong = device.run(Job(toy / "toy.json", toy, Run("litert", timing=False)))
        assert "toy is onnx, litert runs tflite" in wrong["device"]["failures"][0] and wrong["device"]["isa"] == platform.machine()
        with pytest.raises(DeviceTestError, match="golden.npz: no such file"):
            device.run(Job(toy / "toy.json", tmp_path, QUICK))
        small = pytest.raises(DeviceUnavailable, match="toy needs at least .* MB of memory and .* MB are free on the board; end what runs")
        with monkeypatch.context() as patch, small:
            patch.setattr(ssh, "LEAST_MEMORY", 1e15)
            device.run(Job(toy / "toy.json", toy, QUICK))
        assert device.run(Job(toy / "toy.json", toy, QUICK))["device"]["passed"]


def test_a_transfer_that_breaks_off_is_gone_on_with(board, toy, told, wire):
    """Cut after a third of the long file. The second run sends the rest only: counted in the cable."""
    with pytest.raises(DeviceUnavailable) as raised, opened(board, told, port=wire.port) as device:
        wire.at(FILLER // 3, wire.cut)
        device.run(Job(toy / "toy.json", toy, QUICK))
    line = str(raised.value)
    assert "\n" not in line and "the connection broke off during the transfer of toy.extra" in line and "run again" in line
    until(lambda: not (board.cache / "work").exists())
    parts = [name for name in board.left() if name.endswith(".part")]
    assert len(parts) == 1 and all(name.startswith("files/") for name in board.left())
    kept = (board.cache / parts[0]).stat().st_size
    assert 0 < kept < FILLER
    before = wire.up
    with opened(board, told, port=wire.port) as device:
        assert device.run(Job(toy / "toy.json", toy, QUICK))["device"]["passed"]
    assert FILLER - kept < wire.up - before < FILLER, "what was there already was sent again"
    assert any(re.search(r"toy.extra sent \(6.0 MB in .* s, on from [\d.]+ MB\)", line) for line in told)
    assert board.left() == []


def test_a_part_of_something_else_is_not_gone_on_with(board, toy, told):
    """A part whose bytes are not the beginning of the file: it is sent from the start, and arrives whole."""
    name = sha256_of(toy / "toy.extra")
    (board.cache / "files").mkdir()
    (board.cache / "files" / f"{name}.part").write_bytes(b"not its beginning")
    (board.cache / "files" / sha256_of(toy / "toy.onnx")).write_bytes(b"whole by name, but its bytes were lost")
    with opened(board, told) as device:
        assert device.run(Job(toy / "toy.json", toy, QUICK))["device"]["passed"]
    assert "on from" not in str(told) and board.left() == []


def test_a_run_whose_connection_breaks_is_ended_there(board, toy, told, wire):
    broken = pytest.raises(DeviceUnavailable, match="broke off during the run of toy in onnxruntime")
    with broken, opened(board, told, port=wire.port) as device:
        when_it_runs(board, wire.cut)
        device.run(Job(toy / "toy.json", toy, ENDLESS))
    until(lambda: not running(board))
    until(lambda: not (board.cache / "work").exists())
    with opened(board, told) as device:
        assert device.run(Job(toy / "toy.json", toy, QUICK))["device"]["passed"]
    assert board.left() == []


def test_control_c_ends_the_run_there_before_it_returns(board, toy, told):
    with pytest.raises(KeyboardInterrupt), opened(board, told) as device:
        when_it_runs(board, lambda: os.kill(os.getpid(), signal.SIGINT))
        device.run(Job(toy / "toy.json", toy, ENDLESS))
    assert not running(board) and not (board.cache / "work").exists()


def test_a_line_that_falls_silent_is_noticed_on_both_sides(board, toy, told, wire, monkeypatch):
    monkeypatch.setitem(ssh_line.OPTIONS, "ServerAliveInterval", "1")
    monkeypatch.setitem(ssh_line.OPTIONS, "ServerAliveCountMax", "2")
    monkeypatch.setattr(ssh_line, "PING_S", 0.5)
    monkeypatch.setattr(ssh_line, "SILENCE_S", 3.0)
    with pytest.raises(DeviceUnavailable, match="not responding"), opened(board, told, port=wire.port) as device:
        when_it_runs(board, wire.hang)
        device.run(Job(toy / "toy.json", toy, ENDLESS))
    until(lambda: not running(board))
    until(lambda: not (board.cache / "work").exists())


def test_a_board_that_is_started_anew_in_the_middle(board, toy, told, tmp_path):
    """No process there has a moment to clean up: the next run does it."""
    other = another(board, tmp_path)
    try:
        with pytest.raises(DeviceUnavailable, match="started anew: look at it and run again"), opened(other, told) as device:
            when_it_runs(other, other.kill)
            device.run(Job(toy / "toy.json", toy, ENDLESS))
        assert any(name.startswith("work/") for name in other.left())
        other.start()
        with opened(other, told, "ssh://board?clean=1") as device:
            assert device.run(Job(toy / "toy.json", toy, QUICK))["device"]["passed"]
        assert not other.cache.exists(), "clean=1 leaves nothing at all"
    finally:
        other.kill()


def test_a_disk_that_fills_up_while_something_is_sent(board, toy, told, tmp_path):
    """Something else on the board takes the room. One line, nothing stays, and with room it goes through."""
    other = another(board, tmp_path, small_disks={".cache/pocketlm": FILLER + (36 << 20)})
    disk = other.seen_there(other.cache)
    (disk / "environments").symlink_to(environments_of(board))
    filler = disk / "files" / "filler"
    wire = Wire(other.port)

    def fill() -> None:
        with filler.open("wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
            while True:
                file.write(bytes(1 << 16))

    try:
        with pytest.raises(
            DeviceUnavailable, match="the board's disk is full during the transfer of toy.extra; make room there and run again"
        ):
            with opened(other, told, port=wire.port) as device:
                wire.at(FILLER // 3, fill)
                device.run(Job(toy / "toy.json", toy, QUICK))
        assert {path.name for path in disk.iterdir()} == {"environments", "lock"}
        with opened(other, told) as device:
            assert device.run(Job(toy / "toy.json", toy, QUICK))["device"]["passed"]
    finally:
        wire.close()
        other.kill()


def test_a_runtime_that_the_processor_cannot_run_is_left_out(tmp_path, told, toy, monkeypatch):
    """Also: no index is reached, so that the wheels are sent from here. The stand-in dies by SIGILL where it imports the runtime."""
    lock = read_lock()
    only = Lock({"tflite": lock.runtimes["tflite"]}, lock.wheels)
    monkeypatch.setattr(ssh_environment, "read_lock", lambda: only)
    illegal = tmp_path / "illegal" / "tflite_runtime"
    illegal.mkdir(parents=True)
    (illegal / "__init__.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGILL)\n")
    stand_in = StandIn(tmp_path / "pi", environment={**NO_INDEX, "PYTHONPATH": str(illegal.parent)})
    stand_in.start()
    try:
        with opened(stand_in, told) as device:
            assert (
                "died by signal SIGILL" in device.missing["tflite"] and "instructions that this processor lacks" in device.missing["tflite"]
            )
            with pytest.raises(DeviceTestError, match="tflite cannot run there"):
                device.run(Job(toy / "toy.json", toy, Run("tflite")))
        assert "the board's pip cannot fetch the wheels, they are sent from here" in str(told)
    finally:
        stand_in.kill()


def test_an_arm64_board_without_pip_and_index(tmp_path, told, toy):
    """The emulated machine behind the login: its environment is made from aarch64 wheels that are sent from here."""
    try:
        lab = lab_at(CACHE, lambda what, state: None)
    except DeviceUnavailable as error:
        pytest.skip(str(error))
    stand_in = StandIn(tmp_path / "pi", lab=lab, environment=NO_INDEX)
    stand_in.start()
    try:
        with opened(stand_in, told) as device:
            assert device.board["isa"] == "aarch64" and device.emulated and device.missing == {}
            assert device.board["cpu_flags"] == ["fp", "asimd"] and not device.board["ensurepip"]
            run = Run("onnxruntime", gates=STRICT, timing=False, answers=tmp_path / "answers.npz")
            result = device.run(Job(toy / "toy.json", toy, run))
            assert device.board["bandwidth_gb_s"] == {}, "an emulator's bandwidth says nothing"
        assert result["device"]["passed"], result["device"]["failures"]
        assert result["device"]["isa"] == "aarch64" and result["device"]["golden_tokens"] <= 3 * CONTEXT
        assert "the board has no pip, they are sent from here" in str(told) and stand_in.left() == []
    finally:
        stand_in.kill()
