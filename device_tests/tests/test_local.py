"""The command line and the fresh process around it, with real files in the real runtimes."""

import ast
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from device_tests.devices.local import PACKAGE_ROOT, Run, run_local
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.gates import Gates
from device_tests.sessions import import_runtime, open_session
from device_tests.tests.toy import CONTEXT, VOCABULARY, ToyModel, write_onnx, write_vectors
from device_tests.tflite_session import notes_on

STRICT = Gates(perplexity_change=1e-5, top1=1.0, kl=1e-6, max_abs_diff=5e-5)
MODULES = sorted((PACKAGE_ROOT / "device_tests").glob("*.py"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy as ONNX with its golden vectors."""
    path = tmp_path_factory.mktemp("toy")
    write_onnx(ToyModel(), path / "toy.onnx")
    return write_vectors(path, ToyModel(), ToyModel(1))


@pytest.fixture(scope="module")
def tflite_sidecar(folder):
    """The same toy as TFLite."""
    command = [sys.executable, "-m", "device_tests.tests.toy_tflite", str(folder / "toy_tflite.tflite")]
    done = subprocess.run(command, cwd=PACKAGE_ROOT, env={**os.environ, "CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return folder / "toy_tflite.json"


def command_line(folder: Path, *more: str, cwd=PACKAGE_ROOT, environment=None) -> subprocess.CompletedProcess:
    """Run the command on the ONNX toy."""
    given = [
        "--artifact",
        f"{folder}/toy.json",
        "--golden",
        str(folder),
        "--runtime",
        "onnxruntime",
        "--out",
        f"{folder}/out.json",
    ]
    command = [sys.executable, "-m", "device_tests", *given, "--decode-tokens", "16", *more]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def assert_sound(result: dict) -> None:
    device = result["device"]
    assert device["passed"], device["failures"]
    assert device["max_abs_diff"] < 5e-5 and device["top1"] == 1.0 and device["greedy_prefix"] == device["greedy_tokens"] == 10
    assert result["quality"]["tokens"] == 39 and abs(result["quality"]["perplexity_change"]) < 1e-5
    assert device["isa"] == os.uname().machine and len(device["decode_ms"]) == 64
    assert 0 < device["decode_ms_p50"] <= device["decode_ms_p90"] <= device["decode_ms_p99"]
    assert 10 < device["baseline_rss_mb"] <= device["peak_rss_mb"] < 500


@pytest.mark.parametrize("threads", [1, 2])
def test_onnxruntime_runs_the_toy(folder, threads):
    result = run_local(folder / "toy.json", folder, Run("onnxruntime", threads, STRICT, quality=True, decode_tokens=64))
    assert_sound(result)
    assert result["device"]["threads"] == threads


@pytest.mark.parametrize("runtime", ["litert", "tflite"])
def test_tflite_runtimes_run_the_toy(folder, tflite_sidecar, runtime):
    """Prompts of 11 tokens in chunks of 8, and of 5: a full chunk, a padded one and a short one."""
    run = Run(runtime, 1, STRICT, quality=True, decode_tokens=64)
    result = run_local(tflite_sidecar, folder, run)
    assert_sound(result)
    assert result["device"]["notes"] == [], "XNNPACK is in use"


def test_a_runtime_without_xnnpack_says_so():
    """As where it cannot find out what the processor is: then it is left out without a word."""

    class Plain:
        def _get_ops_details(self):
            return [{"op_name": "FULLY_CONNECTED"}]

    assert notes_on(Plain()) == ["XNNPACK is not in use: times and roundings are those of the plain kernels"]


@pytest.mark.parametrize("split", [1, 7, 8, 9, 16, 30])
def test_sessions_agree_with_recomputing_everything(folder, tflite_sidecar, split):
    """A prompt, more prompt on top of the cache, single steps to the end of the context; then the same after a reset."""
    tokens = np.random.default_rng(split).integers(0, VOCABULARY, size=CONTEXT)
    expected = ToyModel().logits(tokens)
    for sidecar, runtime in ((folder / "toy.json", "onnxruntime"), (tflite_sidecar, "litert")):
        session = open_session(sidecar, runtime)
        for _ in range(2):
            session.reset()
            np.testing.assert_allclose(session.prefill(tokens[:split]), expected[split - 1], atol=5e-5)
            np.testing.assert_allclose(session.prefill(tokens[split : split + 5]), expected[split + 4], atol=5e-5)
            for position in range(split + 5, CONTEXT):
                np.testing.assert_allclose(session.step(tokens[position]), expected[position], atol=5e-5)
        with pytest.raises(DeviceTestError, match="do not fit the context of 40"):
            session.step(0)
        session.reset()
        with pytest.raises(DeviceTestError, match="do not fit"):
            session.prefill(np.zeros(CONTEXT + 1, dtype=int))
        with pytest.raises(DeviceTestError, match="the model has 48"):
            session.prefill(np.array([VOCABULARY]))
        with pytest.raises(DeviceTestError, match="empty prompt"):
            session.prefill(np.array([], dtype=int))


def test_exit_codes_and_lines_of_the_command(folder, tmp_path):
    passed = command_line(folder)
    assert passed.returncode == 0 and passed.stdout == "passed toy in onnxruntime on local\n"
    assert json.loads((folder / "out.json").read_text())["device"]["passed"]
    (tmp_path / "gates.json").write_text('{"max_abs_diff": 1e-12}')
    failed = command_line(folder, "--gates", f"{tmp_path}/gates.json", "--no-timing", "--device", "pi")
    assert failed.returncode == 1 and failed.stderr.startswith("FAILED toy in onnxruntime on pi: max_abs_diff ")
    assert failed.stderr.count("\n") == 1 and "exceeds 1e-12 (worst: golden window " in failed.stderr
    record = json.loads((folder / "out.json").read_text())["device"]
    assert not record["passed"] and record["load_ms"] is None and record["device"] == "pi"
    for more, words in (
        (("--golden", "/nowhere"), "no such file"),
        (("--artifact", f"{folder}/none.json"), "cannot be read"),
        (("--runtime", "litert"), "toy is onnx, litert runs tflite"),
        (("--threads", "0"), "give 1 or more"),
        (("--out", "/nowhere/out.json"), "cannot be written"),
    ):
        refused = command_line(folder, *more)
        assert refused.returncode == 2 and words in refused.stderr and refused.stderr.count("\n") == 1, refused.stderr


@pytest.fixture()
def stand_in(tmp_path, monkeypatch):
    """Puts an ``onnxruntime`` of our making before the real one in the child's path."""

    def install(source: str) -> None:
        (tmp_path / "onnxruntime").mkdir()
        (tmp_path / "onnxruntime" / "__init__.py").write_text(source)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))

    return install


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("import os, signal\nos.kill(os.getpid(), signal.SIGSEGV)", "died by signal SIGSEGV"),
        ("import os\nos.abort()", "died by signal SIGABRT"),
        (
            "import os\nprint('out of ideas', file=__import__('sys').stderr, flush=True)\nos._exit(3)",
            "exit code 3 .*out of ideas",
        ),
        ("raise ImportError('illegal wheel')", "not installed here .illegal wheel."),
        ("import time\ntime.sleep(60)", "stopped after 1 s"),
    ],
)
def test_however_the_child_ends_a_failed_result_comes_back(folder, stand_in, source, words):
    stand_in(source)
    timeout_s = 1.0 if "sleep" in source else 60.0
    result = run_local(folder / "toy.json", folder, Run("onnxruntime", timeout_s=timeout_s))
    assert not result["device"]["passed"] and result["quality"] is None and result["artifact"] == "toy"
    assert len(result["device"]["failures"]) == 1
    assert re.search(words, result["device"]["failures"][0])


def test_a_graph_that_the_runtime_refuses_fails_by_name(folder, tmp_path):
    for name in ("toy.json", "toy.onnx"):
        shutil.copy(folder / name, tmp_path / name)
    import_runtime("onnxruntime")
    sidecar = json.loads((tmp_path / "toy.json").read_text())
    sidecar["interface"]["layers"] = 3
    (tmp_path / "toy.json").write_text(json.dumps(sidecar))
    with pytest.raises(ArtifactFailure, match="inputs differ from the contract in past_key_values.2.key"):
        open_session(tmp_path / "toy.json", "onnxruntime")


def test_the_folder_alone_is_enough(folder, tmp_path):
    """Copied somewhere else, with a path that holds numpy and one runtime but none of our packages and no torch."""
    packages = tmp_path / "packages"
    packages.mkdir()
    for name in ("numpy", "numpy.libs", "onnxruntime"):
        (packages / name).symlink_to(Path(np.__file__).parent.parent / name)
    board = tmp_path / "board"
    shutil.copytree(PACKAGE_ROOT / "device_tests", board / "device_tests", ignore=shutil.ignore_patterns("tests", "__pycache__"))
    given = [
        "--artifact",
        f"{folder}/toy.json",
        "--golden",
        str(folder),
        "--runtime",
        "onnxruntime",
        "--out",
        f"{board}/out.json",
    ]
    # -S leaves site-packages out, so that only what stands in PYTHONPATH is there
    done = subprocess.run(
        [sys.executable, "-S", "-m", "device_tests", *given, "--quality"],
        cwd=board,
        env={"PYTHONPATH": str(packages), "PATH": os.environ["PATH"]},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((board / "out.json").read_text())["quality"]["tokens"] == 39


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_modules_are_python_3_9_and_import_only_what_a_board_has(module):
    tree = ast.parse(module.read_text(encoding="utf-8"), feature_version=(3, 9))
    imported = {node.module.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    imported |= {name.name.split(".")[0] for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names}
    assert imported <= set(sys.stdlib_module_names) | {"numpy", "device_tests"}
    annotated = [node for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module == "__future__"]
    assert annotated or module.name == "__init__.py", "X | None needs postponed annotations in Python 3.9"
