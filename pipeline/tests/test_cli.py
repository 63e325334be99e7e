"""What a person types wrong: one line that says what to do, exit code 2, nothing half-written."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import write_checkpoint
from pipeline.recipe import ROOT
from pipeline.runner import with_our_path


def pocketlm(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    environment = with_our_path({**os.environ, "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"})
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def refused(folder: Path, *arguments: str) -> str:
    """The one line of a refused command, after checking that it left nothing that looks like a result."""
    done = pocketlm(folder, *arguments)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    lines = done.stderr.strip().splitlines()
    assert "Traceback" not in done.stderr
    assert not list(folder.rglob("*.draft")) and not list(folder.glob("dist/*"))
    return lines[-1]


def test_help_lists_every_command_and_imports_nothing_heavy(tmp_path):
    code = "import sys; from pipeline import cli; print(sorted({'torch', 'onnx', 'numpy', 'tensorflow'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=with_our_path(dict(os.environ)), check=True)
    assert done.stdout.strip() == "[]"
    text = pocketlm(tmp_path, "--help").stdout
    for command in ("plan", "run", "bundle", "test", "verify", "generate", "bench", "quality", "lm-eval", "compare", "report", "demo"):
        assert command in text
        assert "Example" in pocketlm(tmp_path, command, "--help").stdout


def test_no_such_model(tmp_path):
    assert "no such folder" in refused(tmp_path, "run", "--model", "nowhere/at-all")


def test_several_faults_of_a_recipe_are_told_at_once(tmp_path):
    (tmp_path / "bad.toml").write_text("[prune]\nsparsity = 2\nlayers = -1\nx = 1\n")
    done = pocketlm(tmp_path, "plan", "--recipe", "bad.toml")
    assert done.returncode == 2
    for fault in ("3 faults", "prune.sparsity = 2", "prune.layers = -1", "prune.x"):
        assert fault in done.stderr


def with_pickle(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    torch.save({"x": torch.zeros(1)}, folder / "pytorch_model.bin")


def with_half_the_weights(folder: Path) -> None:
    whole = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def with_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (with_pickle, "pickle"),
        (with_half_the_weights, "model.safetensors"),
        (with_nan, "model.norm.weight"),
        (lambda folder: with_config(folder, model_type="mystery"), "mystery"),
        (lambda folder: with_config(folder, num_key_value_heads=3), "3"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "tokenizer"),
    ],
)
def test_a_spoilt_checkpoint_is_refused_in_one_line(tmp_path, spoil, words):
    folder = write_checkpoint(tmp_path / "model", "llama")
    spoil(folder)
    line = refused(tmp_path, "run", "--model", "model")
    assert words in line and line.startswith("pocketlm: checkpoint: ")


SHORT = ("--set=text.window_tokens=64", "--set=text.prompt_tokens=16")  # windows that the tiny models' context holds


@pytest.mark.parametrize(("content", "words"), [(b"", "empty"), (b"\xff\xfe\x00\xd8", "UTF-8"), (b"too short", "token")])
def test_a_spoilt_text_is_refused_in_one_line(tmp_path, checkpoints, content, words):
    (tmp_path / "text.txt").write_bytes(content)
    line = refused(tmp_path, "run", "--model", str(checkpoints["llama"]), "--calibration", "text.txt", *SHORT)
    assert words in line and line.startswith("pocketlm: text: ")


def test_a_missing_text_is_told_before_any_work(tmp_path, checkpoints):
    line = refused(tmp_path, "run", "--model", str(checkpoints["llama"]), "--calibration", "none.txt")
    assert "none.txt" in line and not (tmp_path / ".pocketlm").exists()


def test_verify_and_generate_want_a_bundle(tmp_path):
    for command in ("verify", "generate", "test"):
        assert "nothing" in refused(tmp_path, command, "nothing")


@pytest.mark.parametrize("bundle", [(), ("bundle",)], ids=["recipe", "bundle"])
@pytest.mark.parametrize(
    ("given", "words"),
    [(("--device", "pi"), "'pi' is no device; give local, arm64"), (("--device", "local", "--device", "local"), "give each device once")],
)
def test_a_device_that_is_none_is_told_before_any_work(tmp_path, bundle, given, words):
    assert words in refused(tmp_path, "test", *bundle, *given) and not (tmp_path / ".pocketlm").exists()


def test_a_bundle_has_its_own_recipe(tmp_path):
    assert "leave out --recipe" in refused(tmp_path, "test", "bundle", "--model", "x")


def test_make_names_the_python_that_is_needed(tmp_path):
    pretender = tmp_path / "python3"
    pretender.write_text('#!/bin/sh\n[ "$1" = --version ] && echo Python 3.9.1\nexit 1\n')
    pretender.chmod(0o755)
    done = subprocess.run(["make", "-C", str(ROOT), "python-3.11", f"PYTHON={pretender}"], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Python 3.11 is needed" in done.stderr and "Python 3.9.1" in done.stderr
