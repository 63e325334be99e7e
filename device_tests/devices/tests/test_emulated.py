"""Jobs on emulated processors, with the real emulator, the real aarch64 wheels and toy models. Skipped where the lab cannot be built."""

import json
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from device_tests.devices import WORK, DeviceUnavailable, open_device
from device_tests.devices.emulated import AVX2_CPU, open_arm64, open_avx2, parse
from device_tests.devices.job import Job, Run
from device_tests.devices.lab import Lab, lab_at
from device_tests.devices.lab_arm64 import Arm64, board_of, files_of
from device_tests.devices.lab_enter import Entry
from device_tests.devices.lab_shell import login_entry
from device_tests.devices.lab_shell import main as shell
from device_tests.devices.lab_wheels import RUNTIMES
from device_tests.devices.local import PACKAGE_ROOT
from device_tests.errors import DeviceTestError
from device_tests.gates import Gates
from device_tests.tests.toy import ToyModel, write_onnx, write_vectors

GATES = Gates(top1=1.0, max_abs_diff=1e-3)
SATURATED, EXACT = 32 * 32767, 64 * 255 * 127  # pairs of products in 16 bits, and in 32


@pytest.fixture(scope="session")
def lab() -> Lab:
    """The machine as `make arm64-lab` builds it, kept for the next session."""
    try:
        return lab_at(PACKAGE_ROOT / WORK, lambda what, state: None)
    except DeviceUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def arm64(lab):
    try:
        return open_arm64(lab, "cortex-a76")
    except DeviceUnavailable as error:
        pytest.skip(str(error))


@pytest.fixture(scope="session")
def toys(tmp_path_factory) -> dict[str, Path]:
    """Sidecars of one model by runtime, in one folder with the golden vectors."""
    folder = tmp_path_factory.mktemp("toys")
    sidecar = write_onnx(ToyModel(), folder / "toy_onnx.onnx")
    made = subprocess.run(
        [sys.executable, "-m", "device_tests.tests.toy_tflite", str(folder / "toy_tflite.tflite")],
        cwd=PACKAGE_ROOT, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr[-2000:]
    write_vectors(folder, ToyModel(), ToyModel(1))
    return {"onnxruntime": sidecar, "litert": folder / "toy_tflite.json", "tflite": folder / "toy_tflite.json"}


def job(sidecar: Path, runtime: str, **run) -> Job:
    return Job(sidecar, sidecar.parent, Run(runtime, gates=GATES, **run))


def at_once(device, jobs: list[Job]) -> list[dict]:
    with ThreadPoolExecutor(max_workers=2) as pool:
        return list(pool.map(device.run, jobs))


def emulators(word: str) -> list[int]:
    """Ids of the emulator's processes whose command line has ``word``."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            words = (entry / "cmdline").read_bytes()
            if word.encode() in words and os.path.basename(os.readlink(entry / "exe")).startswith("qemu-"):
                found.append(int(entry.name))
        except OSError:  # it has just ended
            continue
    return found


def wait_for(word: str) -> int:
    for _ in range(600):
        found = emulators(word)
        if found:
            return found[0]
        time.sleep(0.05)
    raise AssertionError(f"no emulated process with {word} in its command line came up")


@pytest.mark.parametrize("address", ["arm64?cpu=", "arm64?threads=2", "arm64://here", "avx2?cpu=cortex-a72", "arm64?cpu=a b", "avx2x"])
def test_a_wrong_address_says_what_is_right(address):
    with pytest.raises(DeviceTestError, match=r"give (arm64, arm64\?cpu=cortex-a72 or avx2|local, arm64)"), open_device(address, print):
        pass


def test_addresses():
    assert parse("arm64") == ("arm64", "cortex-a76") and parse("arm64?cpu=neoverse-n1") == ("arm64", "neoverse-n1")
    assert parse("avx2") == ("avx2", AVX2_CPU)


def test_a_processor_that_the_emulator_lacks_is_one_line(lab):
    with pytest.raises(DeviceTestError, match=r"^device arm64\?cpu=cortex-a15: .* no such processor; give one of .*cortex-a72, .*max.*$"):
        open_arm64(lab, "cortex-a15")


def test_all_runtimes_replay_the_golden_vectors_on_arm64(arm64, toys, tmp_path):
    """Two at once, as the campaign runs them. Timing is not done, though it is asked for."""
    jobs = [job(sidecar, runtime, timing=True, answers=tmp_path / f"{runtime}.npz") for runtime, sidecar in toys.items()]
    results = at_once(arm64, jobs)
    for runtime, result in zip(toys, results):
        device = result["device"]
        assert device["passed"], device["failures"]
        assert (device["device"], device["isa"], device["runtime"]) == ("arm64-cortex-a76", "aarch64", runtime)
        assert device["golden_tokens"] == 18 and device["top1"] == 1.0 and device["greedy_prefix"] == device["greedy_tokens"]
        assert device["decode_ms_p50"] is None and device["load_ms"] is None, "an emulator's times mean nothing"
        with np.load(tmp_path / f"{runtime}.npz") as answers:
            assert answers["logits"].shape == (3, 6, 48)
    assert arm64.emulated and arm64.missing == {} and arm64.board["emulated"]


def test_the_processors_differ_as_the_real_ones_do(lab, arm64):
    """The Raspberry Pi 4's lacks the dot products that the Raspberry Pi 5's has."""
    older = open_arm64(lab, "cortex-a72")
    assert older.name == "arm64-cortex-a72" and older.board["isa"] == "aarch64"
    assert "asimddp" in arm64.board["cpu_flags"] and "asimddp" not in older.board["cpu_flags"]


XNNPACK = """import sys
from ai_edge_litert.interpreter import Interpreter
interpreter = Interpreter(model_path=sys.argv[1])
interpreter.allocate_tensors()
print(sorted({operation["op_name"] for operation in interpreter._get_ops_details()}))
"""


def test_litert_runs_the_kernels_that_phones_run(lab, arm64, toys):
    """Without the kernel's processor files XNNPACK is left out, and nothing says so but its absence here."""
    machine = Arm64(lab, "cortex-a76")
    words = ["-c", XNNPACK, "/mnt/toys/toy_tflite.tflite"]
    binds = [(str(toys["litert"].parent), "/mnt/toys")]
    for files, expected in ((files_of("cortex-a76", arm64.board["cpu_flags"]), True), ({}, False)):
        done = subprocess.run(machine.python(words, 1, binds, files).words(), capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        assert ("DELEGATE" in done.stdout) is expected, done.stdout + done.stderr


def test_zeros_are_named(arm64, toys, tmp_path):
    model = ToyModel()
    model.head[:] = 0
    write_onnx(model, tmp_path / "silent.onnx")
    write_vectors(tmp_path, ToyModel(), ToyModel(1))
    result = arm64.run(job(tmp_path / "silent.json", "onnxruntime"))
    assert not result["device"]["passed"]
    assert "silent in onnxruntime on arm64-cortex-a76: " in result["device"]["failures"][0]
    assert "zero" in result["device"]["failures"][0], result["device"]["failures"]


@pytest.mark.parametrize("number", [signal.SIGSEGV, signal.SIGKILL], ids=lambda number: number.name)
def test_a_process_that_dies_by_a_signal_is_a_failure_with_its_name(arm64, toys, tmp_path, number):
    sidecar = tmp_path / f"doomed_{number.name}.json"
    write_onnx(ToyModel(), sidecar.with_suffix(".onnx"))
    with ThreadPoolExecutor(max_workers=1) as pool:
        running = pool.submit(arm64.run, Job(sidecar, toys["onnxruntime"].parent, Run("onnxruntime")))
        os.kill(wait_for(sidecar.name), number)
        result = running.result()
    assert not result["device"]["passed"] and result["device"]["isa"] == "aarch64"
    assert f"doomed_{number.name} in onnxruntime on arm64-cortex-a76: died by signal {number.name}" in result["device"]["failures"][0]


def test_a_run_that_takes_too_long_is_stopped(arm64, toys):
    result = arm64.run(job(toys["onnxruntime"], "onnxruntime", timeout_s=0.5))
    assert "stopped after 0.5 s" in result["device"]["failures"][0]
    assert emulators("toy_onnx.json") == []


def test_a_missing_artifact_is_one_line(arm64, toys):
    result = arm64.run(replace(job(toys["onnxruntime"], "onnxruntime"), golden=Path("/nowhere")))
    assert "/nowhere: no such file or folder" in result["device"]["failures"][0]


ORPHAN = """import sys
from pathlib import Path
from device_tests.devices.emulated import open_at
from device_tests.devices.job import Job, Run
with open_at("arm64", print, Path(sys.argv[2])) as device:
    device.run(Job(Path(sys.argv[1]), Path(sys.argv[1]).parent, Run("onnxruntime")))
"""


def test_nothing_runs_on_or_stays_mounted_when_the_caller_is_killed(lab, toys, tmp_path):
    sidecar = tmp_path / "orphan.json"
    write_onnx(ToyModel(), sidecar.with_suffix(".onnx"))
    write_vectors(tmp_path, ToyModel(), ToyModel(1))
    mounts = Path("/proc/self/mounts").read_text()
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    with subprocess.Popen(
        [sys.executable, "-c", ORPHAN, str(sidecar), str(PACKAGE_ROOT / WORK)], cwd=PACKAGE_ROOT, env=environment
    ) as caller:
        wait_for(sidecar.name)
        caller.kill()
    for _ in range(100):
        if not emulators(sidecar.name):
            break
        time.sleep(0.05)
    assert emulators(sidecar.name) == [] and Path("/proc/self/mounts").read_text() == mounts
    assert sorted(path.name for path in lab.root.iterdir() if path.name in ("mnt", "home", "sys")) == ["home", "mnt", "sys"]
    assert not any(any((lab.root / name).iterdir()) for name in ("mnt", "home", "sys", "tmp", "run"))


def test_a_folder_that_cannot_be_entered_is_unavailable(lab, tmp_path):
    entry = Entry(root=str(tmp_path / "nowhere"), command=["/bin/true"], environment={}, program=str(lab.emulator("aarch64")))
    (tmp_path / "nowhere").mkdir()
    with pytest.raises(DeviceUnavailable, match=r"/proc cannot be mounted on .*nowhere/proc \(No such file or directory\)"):
        board_of(entry.words())


CHILDREN = """import platform, subprocess, sys
print(platform.machine(), subprocess.run(["uname", "-m"], capture_output=True, text=True).stdout.strip(), sys.prefix)"""


def test_a_login_on_the_board_runs_programs_that_run_programs(lab, tmp_path):
    script = f"id -un; touch /usr/bin/x 2>/dev/null || echo read-only; python3.11 -m venv --without-pip v && v/bin/python -c '{CHILDREN}'"
    try:
        words = login_entry(lab, ["sh", "-c", script], tmp_path).words()
    except DeviceUnavailable as error:
        pytest.skip(str(error))
    formats = os.listdir("/proc/sys/fs/binfmt_misc")
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if "binfmt_misc cannot be mounted" in done.stderr:
        pytest.skip(f"needs Linux 6.7: {done.stderr.strip()}")
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["pi", "read-only", "aarch64 aarch64 /home/pi/v"]
    assert (tmp_path / "v/bin/python").is_symlink(), "the home outlives the login"
    assert os.listdir("/proc/sys/fs/binfmt_misc") == formats, "nothing may change for other programs of this machine"


def test_a_login_with_wrong_options_is_one_line(tmp_path, capsys):
    assert shell(["--home", str(tmp_path / "nowhere")]) == 2
    assert shell(["--bind", f"{tmp_path}:there"]) == 2
    told = capsys.readouterr().err.splitlines()
    assert len(told) == 2 and "make it first" in told[0] and "give HERE:THERE" in told[1]


@pytest.fixture(scope="session")
def avx2(lab):
    try:
        return open_avx2(lab)
    except DeviceUnavailable as error:
        pytest.skip(str(error))


def test_all_runtimes_replay_the_golden_vectors_on_avx2(avx2, toys):
    assert avx2.emulated and avx2.board["isa"] == "x86_64"
    assert "avx2" in avx2.board["cpu_flags"] and not {"avx512f", "avx512_vnni"} & set(avx2.board["cpu_flags"])
    for result in at_once(avx2, [job(sidecar, runtime) for runtime, sidecar in toys.items()]):
        assert result["device"]["passed"], result["device"]["failures"]
        assert result["device"]["device"] == "avx2" and result["device"]["isa"] == "x86_64"


INTEGER_PRODUCT = """import sys, numpy as np, onnxruntime
session = onnxruntime.InferenceSession(sys.argv[1], providers=["CPUExecutionProvider"])
print(*np.unique(session.run(None, {"a": np.full((4, 64), 255, np.uint8)})[0]))"""


def test_int8_saturates_on_avx2_and_not_on_arm64(lab, arm64, avx2, tmp_path):
    """255 times 127 twice does not fit 16 bits: what comes out says which kernel ONNX Runtime took."""
    weights = numpy_helper.from_array(np.full((64, 32), 127, np.int8), "b")
    inputs = [helper.make_tensor_value_info("a", TensorProto.UINT8, [4, 64])]
    outputs = [helper.make_tensor_value_info("y", TensorProto.INT32, [4, 32])]
    graph = helper.make_graph([helper.make_node("MatMulInteger", ["a", "b"], ["y"])], "product", inputs, outputs, [weights])
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "product.onnx")
    words = ["-c", INTEGER_PRODUCT]
    here = [str(lab.emulator("x86_64")), "-cpu", AVX2_CPU, sys.executable, *words, str(tmp_path / "product.onnx")]
    there = Arm64(lab, "cortex-a76").python([*words, "/mnt/x/product.onnx"], 1, [(str(tmp_path), "/mnt/x")]).words()
    found = [subprocess.run(command, capture_output=True, text=True, check=True).stdout.split() for command in (here, there)]
    assert found == [[str(SATURATED)], [str(EXACT)]]


def test_the_record_of_the_lab_names_what_runs(lab):
    record = lab.record()
    assert set(RUNTIMES) <= {wheel["name"] for wheel in record["wheels"]}
    assert json.dumps(record).count('"sha256"') == len(record["packages"]) + len(record["wheels"])
