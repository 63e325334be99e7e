"""The driver for phones against a stand-in for adb (see ``stand_in_adb``), with the real runtimes under stand-ins for the programs."""

import fcntl
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from device_tests.devices import DeviceUnavailable, open_device
from device_tests.devices.job import Job, Run
from device_tests.devices.local import PACKAGE_ROOT
from device_tests.devices.tests.stand_in_phone import FOLDER, HERE, SERIAL, THERMAL, StandInPhone, elf_header, program
from device_tests.errors import DeviceTestError
from device_tests.gates import Gates
from device_tests.tests.toy import ToyModel, write_onnx, write_vectors

STRICT = Gates(top1=1.0, kl=1e-6, max_abs_diff=5e-5)
# prints what the real one prints and writes a time per wanted call, without a model
CANNED = """while getopts e:m:r:x:y: flag; do [ $flag = r ] && times=$OPTARG; done; shift $((OPTIND - 1))
echo "Session creation time cost: 0.25 s"; echo "First inference time cost: 9 ms"; echo "Peak working set size: 271122432 bytes"
run=0; while [ $run -lt $times ]; do echo "x,0.00$((run % 5 + 1)),271122432,98,$run" >>$2; run=$((run + 1)); done"""


@pytest.fixture(scope="module")
def toys(tmp_path_factory):
    """The toy as ONNX and as TFLite, with its golden vectors."""
    folder = tmp_path_factory.mktemp("toys")
    write_onnx(ToyModel(), folder / "toy one.onnx")
    command = [sys.executable, "-m", "device_tests.tests.toy_tflite", str(folder / "toy_tflite.tflite")]
    done = subprocess.run(command, cwd=PACKAGE_ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return write_vectors(folder, ToyModel(), ToyModel(1))


@pytest.fixture()
def phone(tmp_path, monkeypatch):
    """A phone on this machine's adb."""
    made = StandInPhone(tmp_path / "phone")
    monkeypatch.setenv("PATH", f"{made.bin}:{os.environ['PATH']}")
    monkeypatch.setenv("STAND_IN_PHONE", str(made.root))
    return made


@pytest.fixture()
def programs(tmp_path):
    """Both programs, as the part of an address that gives them."""
    stand_ins = {"benchmark_model": "stand_in_benchmark_model.py", "onnxruntime_perf_test": "stand_in_perf_test.py"}
    paths = {
        name: program(tmp_path / name, f'PYTHONPATH="{PACKAGE_ROOT}" exec "{sys.executable}" "{HERE / file}" "$@"')
        for name, file in stand_ins.items()
    }
    return "&".join(f"{name}={path}" for name, path in paths.items())


def onnx_job(toys: Path, **run) -> Job:
    return Job(toys / "toy one.json", toys, Run("onnxruntime", gates=STRICT, decode_tokens=16, **run))


def tflite_job(toys: Path, **run) -> Job:
    return Job(toys / "toy_tflite.json", toys, Run("litert", gates=STRICT, decode_tokens=16, **run))


def run_one(address: str, job: Job) -> dict:
    """The record of one job."""
    told = []
    with open_device(address, lambda what, state: told.append((what, state))) as device:
        result = device.run(job)
    assert all(what == f"adb://{SERIAL}" for what, _ in told)
    return result["device"]


def failure(record: dict) -> str:
    """The one line of a record that failed."""
    assert not record["passed"] and len(record["failures"]) == 1
    assert "\n" not in record["failures"][0]
    return record["failures"][0]


def test_tflite_is_timed_and_its_logits_are_those_of_the_reference(phone, programs, toys):
    record = run_one(f"adb://{SERIAL}?threads=2&{programs}", tflite_job(toys))
    assert record["passed"], record["failures"]
    assert record["device"] == f"adb://{SERIAL}" and record["threads"] == 2 and record["environment"]["system"] == "Android 14 (sdk 34)"
    assert record["max_abs_diff"] < 5e-5 and record["top1"] == 1.0 and record["golden_tokens"] == 9, "three windows, three rows each"
    assert record["greedy_tokens"] is None and re.fullmatch("[0-9a-f]{12}", record["runtime_version"])
    assert record["environment"]["program"].startswith(f"benchmark_model, SHA-256 {record['runtime_version']}")
    assert record["prompt_tokens"] == 8 and 0 < record["first_token_ms"] and record["load_ms"] > 0 and record["decode_ms_p50"] > 0
    assert record["decode_ms"] == [] and record["decode_ms_p90"] is None and record["decode_tokens_per_s"] > 0
    assert 20 < record["peak_rss_mb"] < 1000, "VmHWM of a Python process with LiteRT"
    assert "parity was tested on 9 golden tokens: after each prompt and 2 steps; no greedy text" in record["notes"]
    assert record["conditions"]["before"] == {
        "temperature_c": 31.4, "thermal_status": "none", "throttled": False, "clock_mhz": 2914.0, "governor": "sched_pixel",
        "free_memory_mb": pytest.approx(3505.49),
    }  # fmt: skip
    assert phone.left() == []


def test_a_hybrid_s_record_says_which_graph_ran(phone, programs, toys, tmp_path):
    """The program knows one graph, so the first token is later than on a host that has both."""
    record = json.loads((toys / "toy one.json").read_text())
    for name in ("toy.prompt.onnx", "toy.data"):
        (tmp_path / name).write_bytes(b"not opened there")
        record["files"].append({"path": name, "sha256": hashlib.sha256(b"not opened there").hexdigest(), "bytes": 16})
    (tmp_path / "toy one.onnx").write_bytes((toys / "toy one.onnx").read_bytes())
    sidecar = tmp_path / "hybrid.json"
    sidecar.write_text(json.dumps({**record, "prompt": {"file": "toy.prompt.onnx", "data": "toy.data", "weights": []}}))
    found = run_one(f"adb://?{programs}", Job(sidecar, toys, Run("onnxruntime", gates=STRICT, prompts=(4,))))
    assert found["passed"] and any("prompts went through the decode graph" in note for note in found["notes"])
    plain = run_one(f"adb://?{programs}", onnx_job(toys, prompts=(4,)))
    assert not any("decode graph" in note for note in plain["notes"])


def test_onnx_is_timed_and_its_parity_is_said_to_be_untested(phone, programs, toys):
    record = run_one(f"adb://?{programs}", onnx_job(toys, prompts=(4, 30, 40), quality=True, answers=toys / "answers.npz"))
    assert record["passed"], record["failures"]
    assert (record["max_abs_diff"], record["kl"], record["top1"], record["golden_tokens"]) == (None, None, None, None)
    assert "parity was not tested: onnxruntime_perf_test gives no logits" in record["notes"]
    assert "not tested on a phone: perplexity over the evaluation text, agreement with this machine" in record["notes"]
    assert [prompt["tokens"] for prompt in record["prompts"]] == [4, 11, 30], "the golden prompt and those that fit a context of 40"
    assert all(len(prompt["samples_ms"]) == 5 for prompt in record["prompts"]) and record["prompt_tokens"] == 11
    assert len(record["decode_ms"]) == 16 and 0 < record["decode_ms_p50"] <= record["decode_ms_p99"]
    assert phone.left() == []


def test_what_adb_is_asked_for_one_run(phone, tmp_path, toys):
    """A model and a program with spaces in their names, byte for byte."""
    path = program(tmp_path / "perf test", CANNED)
    record = run_one(f"adb://?threads=3&onnxruntime_perf_test={str(path).replace(' ', '%20')}", onnx_job(toys, prompts=(11,)))
    assert record["passed"], record["failures"]
    assert record["load_ms"] == 250 and record["first_token_ms"] == 3 and record["peak_rss_mb"] == pytest.approx(271.122432)
    first, *calls = phone.calls()
    assert first == ["devices", "-l"] and all(call[:2] == ["-s", SERIAL] for call in calls)
    shells = [re.fullmatch(r"\((.*)\); echo pocketlm-exit=\$\?", call[3], re.DOTALL).group(1) for call in calls if call[2] == "shell"]
    folder = re.search(r"/data/local/tmp/pocketlm-[0-9a-f]{8}", " ".join(shells)).group(0)
    model, binary = f"{folder}/toy one.onnx", f"{folder}/perf test"
    made, sent = shells.index(f"mkdir -p {folder}"), calls.index(["-s", SERIAL, "push", str(path), binary])
    assert ["-s", SERIAL, "push", str(toys / "toy one.onnx"), model] == calls[sent + 1]
    assert shells[made + 1 : made + 3] == [f"sha256sum '{binary}' '{model}'", f"chmod 755 '{binary}'"]
    inputs = [call[4] for call in calls if call[2] == "push" and "test_data_set_0" in call[4]]
    assert inputs == [f"{folder}/test_data_set_0/input_{index}.pb" for index in range(6)] * 2, "a prompt and a step"
    runs = [command for command in shells if "LD_LIBRARY_PATH" in command]
    assert "LD_LIBRARY_PATH=. './perf test' -e cpu -m times -r 5 -x 3 -y 1 'toy one.onnx' times.csv >said.txt 2>&1 &" in runs[0]
    assert " -r 24 " in runs[1] and len(runs) == 2, "eight calls warm up before sixteen tokens"
    assert shells[-1].startswith(f"for file in {folder}/pid; do ") and shells[-1].endswith(f"; rm -rf {folder}")
    assert phone.left() == []


@pytest.mark.parametrize(
    ("devices", "serial", "words"),
    [
        ([], "", "adb://: no phone; plug one in, with USB debugging on"),
        (["A device", "B device"], "", "2 phones; give one of them, as adb://SERIAL: A, B"),
        (["A device"], "B", "adb://B: no such phone; there are: A"),
        (["A unauthorized usb:1-4"], "", "adb://A: the phone is unauthorized; unlock the phone and allow debugging"),
        (["A offline"], "A", "adb://A: the phone is offline; unplug the cable"),
        (["???? no permissions (missing udev rules?)"], "", "the phone is no permissions; let your user reach"),
        (["A recovery"], "", "adb://A: the phone is recovery; wait until it has started"),
    ],
)
def test_phones_that_cannot_be_used_are_told_in_one_line(phone, programs, devices, serial, words):
    phone.list(*devices)
    with pytest.raises(DeviceUnavailable, match=words) as told, open_device(f"adb://{serial}?{programs}", print):
        pass
    assert "\n" not in str(told.value)


def test_no_adb_is_told_in_one_line(programs, monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    with (
        pytest.raises(DeviceUnavailable, match="there is no adb here; install Android's platform-tools"),
        open_device(f"adb://?{programs}", print),
    ):
        pass


def test_a_phone_that_tells_nothing_of_itself_is_told_in_one_line(phone, programs):
    phone.write("properties", "")
    with pytest.raises(DeviceUnavailable, match="getprop tells no instruction set; reboot"), open_device(f"adb://?{programs}", print):
        pass


def test_a_program_for_another_processor_never_reaches_the_phone(phone, tmp_path):
    (tmp_path / "pt").write_bytes(elf_header(40, headers=0))
    with pytest.raises(DeviceUnavailable, match="built for armeabi-v7a"), open_device(f"adb://?onnxruntime_perf_test={tmp_path}/pt", print):
        pass
    assert not any(call[2:3] == ["push"] for call in phone.calls())


@pytest.mark.parametrize(
    ("variable", "value", "words"),
    [
        ("STAND_IN_FAULT", "no_room", "could not be copied to the phone: it has no room left; free some and run again"),
        ("STAND_IN_FAULT", "corrupt", "SHA-256 there is [0-9a-f]{12}, here [0-9a-f]{12}; run again"),
        ("STAND_IN_BENCHMARK", "illegal", "benchmark_model died by signal SIGILL"),
        ("STAND_IN_BENCHMARK", "silent", "benchmark_model printed no timings"),
        ("STAND_IN_BENCHMARK", "older", "does not know --signature_to_run_for; give a newer one"),
        ("STAND_IN_BENCHMARK", "compiled", "does not know --input_layer, .* give a newer one, and that of TFLite's Interpreter API"),
        ("STAND_IN_BENCHMARK", "zeros", "zero"),
    ],
)
def test_an_artifact_that_fails_is_one_line_and_the_next_one_runs(phone, tmp_path, programs, toys, monkeypatch, variable, value, words):
    canned = program(tmp_path / "canned", CANNED)
    both = re.sub("onnxruntime_perf_test=[^&]*", f"onnxruntime_perf_test={canned}", programs)
    with open_device(f"adb://?{both}", lambda what, state: None) as device:
        monkeypatch.setenv(variable, value)
        line = failure(device.run(tflite_job(toys))["device"])
        monkeypatch.delenv(variable)
        assert line.startswith(f"toy_tflite in litert on adb://{SERIAL}: ") and re.search(words, line)
        assert phone.left() == []
        assert device.run(onnx_job(toys))["device"]["passed"]
    assert phone.left() == []


@pytest.mark.parametrize(("kind", "words"), [("garbage", "printed no timings"), ("few", "tells of 3 calls, 5 were wanted")])
def test_another_perf_test_fails_the_artifact(phone, programs, toys, monkeypatch, kind, words):
    monkeypatch.setenv("STAND_IN_PERF_TEST", kind)
    assert re.search(words, failure(run_one(f"adb://?{programs}", onnx_job(toys))))


@pytest.mark.parametrize("damage", ["refused", "differs"])
def test_a_model_that_is_refused_or_damaged_fails_by_name(phone, programs, toys, tmp_path, damage):
    data = b"no model at all" if damage == "refused" else (toys / "toy one.onnx").read_bytes()[:-1]
    record = json.loads((toys / "toy one.json").read_text())
    if damage == "refused":
        record["files"][0].update(bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
    (tmp_path / "toy one.onnx").write_bytes(data)
    (tmp_path / "toy one.json").write_text(json.dumps(record))
    job = Job(tmp_path / "toy one.json", toys, Run("onnxruntime"))
    words = "onnxruntime_perf_test ended with exit code 255 .*[Pp]rotobuf" if damage == "refused" else "copy the artifact again"
    assert re.search(words, failure(run_one(f"adb://?{programs}", job)))


def test_a_full_phone_is_told_before_anything_is_sent(phone, programs, toys):
    phone.write("disk", "Filesystem 1K-blocks Used Available Use% Mounted on\n/dev/block/dm-50 111418372 111418000 2000 99% /data\n")
    assert re.search("has 2 MB free in /data/local/tmp, [0-9]+ are needed", failure(run_one(f"adb://?{programs}", onnx_job(toys))))
    assert not any(call[2:3] == ["push"] for call in phone.calls())


@pytest.mark.parametrize("moment", ["VmHWM", "toy_tflite.tflite", "outputs.bin", "chmod"])
def test_a_pulled_cable_loses_the_phone_and_the_next_run_cleans_up(phone, programs, toys, monkeypatch, moment):
    told = []
    monkeypatch.setenv("STAND_IN_FAULT", f"unplugged:{moment}")
    with pytest.raises(DeviceUnavailable, match="the phone went away .*; plug it in again and run once more") as lost:
        with open_device(f"adb://?{programs}", lambda what, state: told.append(state)) as device:
            device.run(tflite_job(toys))
    assert "\n" not in str(lost.value)
    assert len(phone.left()) == 1 and f"keeps /{FOLDER}/{phone.left()[0]}; the next run there removes it" in told[-1]
    (phone.root / "gone").unlink()
    monkeypatch.delenv("STAND_IN_FAULT")
    with open_device(f"adb://?{programs}", print):
        assert phone.left() == []


def alive(words: str) -> list[int]:
    """Processes of this machine that have ``words`` in their command line."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:  # it has just ended
            continue
        found += [int(path.parent.name)] if words in command and int(path.parent.name) != os.getpid() else []
    return found


def test_a_runner_that_never_ends_is_stopped_there_too(phone, tmp_path, toys):
    path = program(tmp_path / "sleepy", f"exec sleep 600.{os.getpid()}")
    line = failure(run_one(f"adb://?onnxruntime_perf_test={path}", onnx_job(toys, timeout_s=2.0)))
    assert "sleepy stopped after 2 s without a result" in line
    assert alive(f"sleep 600.{os.getpid()}") == [] and phone.left() == []


def test_a_program_that_outlived_its_cable_is_stopped_by_the_next_run(phone, tmp_path, toys, monkeypatch):
    address = f"adb://?onnxruntime_perf_test={program(tmp_path / 'sleepy', f'exec sleep 800.{os.getpid()}')}"
    monkeypatch.setenv("STAND_IN_FAULT", "unplugged:VmHWM")
    with (
        pytest.raises(DeviceUnavailable, match="the connection ended in the middle"),
        open_device(address, lambda what, state: None) as device,
    ):
        device.run(onnx_job(toys))
    assert len(alive(f"sleep 800.{os.getpid()}")) == 1
    (phone.root / "gone").unlink()
    monkeypatch.delenv("STAND_IN_FAULT")
    with open_device(address, print):
        assert alive(f"sleep 800.{os.getpid()}") == [] and phone.left() == []


def test_ctrl_c_leaves_nothing_on_the_phone(phone, tmp_path, toys):
    path = program(tmp_path / "sleepy", f"exec sleep 700.{os.getpid()}")
    source = f"""
from pathlib import Path
from device_tests.devices import open_device
from device_tests.devices.job import Job, Run
with open_device("adb://?onnxruntime_perf_test={path}", print) as device:
    device.run(Job(Path({str(toys / "toy one.json")!r}), Path({str(toys)!r}), Run("onnxruntime")))
"""
    child = subprocess.Popen([sys.executable, "-c", source], cwd=PACKAGE_ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    for _ in range(600):
        if alive(f"sleep 700.{os.getpid()}") or child.poll() is not None:
            break
        time.sleep(0.1)
    assert len(phone.left()) == 1
    child.send_signal(signal.SIGINT)
    _, stderr = child.communicate(timeout=60)
    assert stderr.rstrip().endswith("KeyboardInterrupt"), stderr
    assert alive(f"sleep 700.{os.getpid()}") == [] and phone.left() == []


def test_an_old_phone_whose_shell_loses_exit_codes(phone, programs, toys, monkeypatch):
    monkeypatch.setenv("STAND_IN_FAULT", "old")
    (phone.root / "thermalservice").unlink()  # came with Android 10
    record = run_one(f"adb://?{programs}", onnx_job(toys))
    assert record["passed"], record["failures"]
    assert record["conditions"]["before"]["throttled"] is None and record["conditions"]["before"]["temperature_c"] == 31.4
    monkeypatch.setenv("STAND_IN_BENCHMARK", "illegal")
    assert "died by signal SIGILL" in failure(run_one(f"adb://?{programs}", tflite_job(toys)))


def test_a_benchmark_model_without_outputs_leaves_parity_untested(phone, programs, toys, monkeypatch):
    monkeypatch.setenv("STAND_IN_BENCHMARK", "old")
    record = run_one(f"adb://?{programs}", tflite_job(toys))
    assert record["passed"] and record["max_abs_diff"] is None and record["top1"] is None
    assert "parity was not tested: this build of benchmark_model does not write outputs" in record["notes"]
    assert record["decode_ms_p50"] is None and record["decode_tokens_per_s"] > 0
    assert "this build of benchmark_model prints no median: times are means" in record["notes"]


def test_a_missed_gate_fails_with_its_number(phone, programs, toys, tmp_path):
    with np.load(toys / "golden.npz") as golden:  # one window is enough here
        windows = {name: golden[name][:1] if name in ("windows", "logits") else golden[name] for name in golden}
    np.savez(tmp_path / "golden.npz", **windows)
    job = Job(toys / "toy_tflite.json", tmp_path, Run("litert", gates=Gates(max_abs_diff=1e-12), decode_tokens=1))
    line = failure(run_one(f"adb://?{programs}", job))
    assert re.search(r"max_abs_diff .* exceeds 1e-12 \(worst: golden window 0 token 1[012]\)", line)


def test_a_throttled_phone_says_so(phone, tmp_path, toys):
    phone.write("thermalservice", THERMAL.format(status=2))
    path = program(tmp_path / "canned", CANNED)
    record = run_one(f"adb://?onnxruntime_perf_test={path}", onnx_job(toys))
    assert record["conditions"]["after"]["throttled"] is True
    assert "the phone was throttled (before: moderate, after: moderate): times are not its best" in record["notes"]


def test_an_android_emulator_tells_no_times(phone, tmp_path, toys):
    phone.write("properties", (phone.root / "properties").read_text() + "[ro.boot.qemu]: [1]\n")
    path = program(tmp_path / "canned", CANNED)
    record = run_one(f"adb://?onnxruntime_perf_test={path}", onnx_job(toys))
    assert record["emulated"] and record["passed"] and record["load_ms"] is None and record["decode_ms"] == [] and record["prompts"] == []


def test_runtimes_without_a_program_are_missing(phone, tmp_path, toys):
    path = program(tmp_path / "canned", CANNED)
    with open_device(f"adb://?onnxruntime_perf_test={path}", print) as device:
        assert sorted(device.missing) == ["litert", "tflite"] and "add benchmark_model=PATH" in device.missing["litert"]
        assert "add benchmark_model=PATH to the address" in failure(device.run(tflite_job(toys))["device"])
        assert device.board["model"] == "Google Pixel 8" and device.board["cores"] == 9 and not device.emulated


def test_two_runs_on_one_phone_wait_for_each_other(phone, tmp_path):
    path = program(tmp_path / "canned", CANNED)
    told: list[str] = []
    waiting, entered = threading.Event(), threading.Event()

    def tell(what: str, state: str) -> None:
        told.append(state)
        waiting.set()

    def open_and_leave() -> None:
        with open_device(f"adb://?onnxruntime_perf_test={path}", tell):
            entered.set()

    with (Path(tempfile.gettempdir()) / f"pocketlm-adb-{SERIAL}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        other = threading.Thread(target=open_and_leave)
        other.start()
        assert waiting.wait(60) and told == ["waiting for another run on this phone"] and not entered.is_set()
        fcntl.flock(lock, fcntl.LOCK_UN)
    assert entered.wait(60)
    other.join(60)


def test_a_shared_library_goes_along(phone, tmp_path, toys):
    path = program(tmp_path / "canned", "[ -f libonnxruntime.so ] && [ $LD_LIBRARY_PATH = . ] || exit 9\n" + CANNED)
    (tmp_path / "libonnxruntime.so").write_bytes(b"\x7fELF")
    assert run_one(f"adb://?onnxruntime_perf_test={path}&library={tmp_path}/libonnxruntime.so", onnx_job(toys))["passed"]
    assert "exit code 9" in failure(run_one(f"adb://?onnxruntime_perf_test={path}", onnx_job(toys)))


def test_another_format_is_told_in_one_line(phone, programs, toys):
    job = Job(toys / "toy one.json", toys, Run("litert"))
    assert "it is onnx, litert runs tflite" in failure(run_one(f"adb://?{programs}", job))


def test_an_address_without_a_program_is_the_persons_mistake(phone):
    with pytest.raises(DeviceTestError, match="no program to run there") as told, open_device("adb://", print):
        pass
    assert not isinstance(told.value, DeviceUnavailable) and phone.calls() == []
