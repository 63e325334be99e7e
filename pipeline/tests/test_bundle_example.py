"""python/generate.py of a bundle: from that folder alone, in both runtimes, the text that device_tests' loops write."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from device_tests.sampling import Sampling, next_token
from device_tests.sessions import open_session
from pipeline.bundle_example import SOURCE, write_example
from pipeline.tests.phone_folder import INT8_CACHE, write_onnx_phone, write_tflite_phone

PROMPT = "def tiny_text() -> str:\n    "


@pytest.fixture(scope="module")
def onnx_bundle(tmp_path_factory) -> Path:
    return with_example(write_onnx_phone(tmp_path_factory.mktemp("example")))


@pytest.fixture(scope="module")
def tflite_bundle(tmp_path_factory) -> Path:
    return with_example(write_tflite_phone(tmp_path_factory.mktemp("example")))


def with_example(folder: Path) -> Path:
    write_example(folder, None)
    return folder


def run(bundle: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-B", "-I", str(bundle / "python/generate.py"), *arguments]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=bundle.parent, env=environment, capture_output=True, text=True, check=False)


def expected(bundle: Path, artifact: str, runtime: str, count: int, sampling: Sampling, seed: int) -> str:
    tokenizer = Tokenizer.from_file(str(bundle / "tokenizer/tokenizer.json"))
    sidecar = next(bundle.glob(f"*/{artifact}.json"))
    session, generator, found = open_session(sidecar, runtime), np.random.default_rng(seed), []
    logits = session.prefill(np.array(tokenizer.encode(PROMPT).ids))
    while len(found) < count:
        token = next_token(logits, sampling, generator)
        if token == session.interface.eos_token_id:
            break
        found.append(token)
        logits = session.step(token)
    return tokenizer.decode(found, skip_special_tokens=False) + "\n"


@pytest.mark.parametrize(("artifact", "runtime"), [("onnx_fp32", "onnxruntime"), ("tflite_fp32", "litert")])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.2, 40, 0.9), Sampling(0.9, 0, 0.8), Sampling(1.0)], ids=str)
def test_it_writes_what_the_measured_loops_write(request, artifact, runtime, sampling):
    bundle = request.getfixturevalue(f"{artifact.split('_')[0]}_bundle")
    options = ["--temperature", str(sampling.temperature), "--top-k", str(sampling.top_k), "--top-p", str(sampling.top_p)]
    done = run(bundle, PROMPT, "--artifact", artifact, "--max-tokens", "14", "--seed", "5", "--threads", "1", *options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected(bundle, artifact, runtime, 14, sampling, 5)
    assert f"{artifact}: " in done.stderr and "tokens/s" in done.stderr


def test_the_recommended_artifact_is_taken_and_a_hybrid_is_whole_by_its_own_file(onnx_bundle):
    done = run(onnx_bundle, PROMPT, "--max-tokens", "4")
    assert done.returncode == 0 and "onnx_hybrid_int8: " in done.stderr, done.stderr


def test_without_its_libraries_it_says_what_to_install(onnx_bundle):
    """As on a board where nothing was installed yet."""
    command = [sys.executable, "-B", "-I", "-S", str(onnx_bundle / "python/generate.py"), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "numpy is not installed; in the bundle's folder: python3 -m venv" in done.stderr
    assert "Traceback" not in done.stderr


def test_an_int8_cache_is_fed_as_it_is(onnx_bundle):
    done = run(onnx_bundle, PROMPT, "--max-tokens", "4", "--artifact", INT8_CACHE)
    assert done.returncode == 0 and f"{INT8_CACHE}: " in done.stderr, done.stderr


def test_a_long_prompt_goes_in_chunks_and_the_context_ends_it(tflite_bundle):
    done = run(tflite_bundle, "x = 1\n" * 9, "--artifact", "tflite_fp32", "--max-tokens", "500")
    assert done.returncode == 0, done.stderr
    prompt, new = (int(part) for part in done.stderr.split(": ")[-1].split(" tokens")[0].split(" + "))
    assert prompt > 16 and prompt + new <= 65, "the last token needs no place of its own"


@pytest.mark.parametrize("name", ["onnx/onnx_fp32.onnx", "tokenizer/tokenizer.json"])
def test_a_changed_file_is_named_and_not_opened(onnx_bundle, tmp_path, name):
    copy = tmp_path / "copy"
    shutil.copytree(onnx_bundle, copy)
    data = (copy / name).read_bytes()
    (copy / name).write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    done = run(copy, PROMPT, "--artifact", "onnx_fp32")
    assert done.returncode != 0 and done.stderr.startswith(f"{name}: changed") and done.stdout == ""


def test_mistakes_are_one_line(onnx_bundle):
    assert run(onnx_bundle, "x = 1\n" * 100).stderr.count("\n") == 1
    assert "nothing here opens nonsense" in run(onnx_bundle, PROMPT, "--artifact", "nonsense").stderr


def test_it_needs_no_more_than_it_says():
    wanted = {"numpy", "tokenizers", "onnxruntime", "ai_edge_litert"}
    parsed = list(ast.walk(ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 9))))
    imported = {alias.name for node in parsed if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module.split(".")[0] for node in parsed if isinstance(node, ast.ImportFrom)}
    assert imported - set(sys.stdlib_module_names) == wanted
