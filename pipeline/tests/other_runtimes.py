"""Environments in which other people's runtimes open a bundle, and what our own runtime says to the same prompts.

Where `make bench-peers` has installed a peer, its environment is taken. Else a small one is made and kept under ``.pocketlm``: the
runtime's wheel with what it needs to run, a few seconds' work. optimum needs PyTorch, which is large, and finds ours.
"""

import json
import subprocess
import sys
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer

from device_tests.artifact import read_artifact
from device_tests.devices import WORK
from device_tests.sessions import import_runtime, open_artifact
from pipeline.fingerprint import ROOT, text_sha256
from pipeline.manifest import Artifact, Manifest
from pipeline.peers.table import peers
from pipeline.runner import locked

LIMIT_S = 600
PROMPTS = [
    "def tiny",
    "import os\n\n\ndef main(",
    "class A:\n    def __init__(self",
    "x = 'é ☃ 漢'  # ",
    "\n",
    "    return [i for i in range(10)]\n" * 3,
]


@dataclass(frozen=True)
class Runtime:
    """``script`` goes on from prompts; ``peer`` is its name among the peers, if it is one; ``packages`` are for a small environment."""

    script: str
    peer: str | None
    packages: tuple[str, ...]
    needs_ours: bool = False


def pinned(peer: str, *names: str) -> tuple[str, ...]:
    """The requirements of a peer that are for the distributions ``names``."""
    (found,) = [each for each in peers() if each.name == peer]
    return tuple(package.replace("[onnxruntime]", "") for package in found.packages if package.split("==")[0].split("[")[0] in names)


GENAI = Runtime("continue_in_genai.py", "onnxruntime_genai", pinned("onnxruntime_genai", "onnxruntime-genai", "onnxruntime", "numpy"))
OPTIMUM = Runtime(
    "continue_in_optimum.py",
    "optimum_onnx",
    (*pinned("optimum_onnx", "optimum-onnx", "transformers"), "optimum==2.1.0", "huggingface-hub==0.36.2", "tokenizers==0.22.2"),
    needs_ours=True,
)
LITERT_LM = Runtime("continue_in_litert_lm.py", None, ("litert-lm-api==0.18.1",))


def python_of(runtime: Runtime) -> Path:
    """The Python of an environment with the runtime. Skips the test where none can be had."""
    work = ROOT / WORK
    for peer in peers():
        if peer.name == runtime.peer and peer.versions(work) is not None:
            return peer.python(work)
    home = work / "test-runtimes" / text_sha256(json.dumps([runtime.packages, sys.version]))[:16]
    home.mkdir(parents=True, exist_ok=True)
    python = home / "venv" / "bin" / "python"
    with locked(home / "lock"):
        if (home / "installed").is_file():
            return python
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(home / "venv")], check=True)
        options = ["--quiet", "--disable-pip-version-check", *(["--no-deps"] if runtime.needs_ours else [])]
        done = subprocess.run(
            [str(python), "-m", "pip", "install", *options, *runtime.packages], capture_output=True, text=True, check=False
        )
        if done.returncode:
            pytest.skip(
                f"{runtime.packages[0]} cannot be installed here, and `make bench-peers` has not: {done.stderr.strip().splitlines()[-1]}"
            )
        if runtime.needs_ours:  # behind its own packages
            (next((home / "venv").glob("lib/python*/site-packages")) / "zz_ours.pth").write_text(sysconfig.get_path("purelib") + "\n")
        (home / "installed").write_text("\n".join(runtime.packages))
    return python


def said_by(runtime: Runtime, opened: Path, tokens: int) -> list[dict]:
    """What another runtime says to ``PROMPTS``, greedily: ids of the prompt, new ids where it tells them, text."""
    command = [str(python_of(runtime)), str(Path(__file__).parent / runtime.script), str(opened), str(tokens)]
    done = subprocess.run(
        command, input=json.dumps(PROMPTS), capture_output=True, text=True, check=False, timeout=LIMIT_S, cwd=opened.parent
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def said_by_ours(folder: Path, artifact: Artifact, runtime: str, tokens: int) -> list[dict]:
    """The same of a bundle's artifact in our own session, through the one graph that the others know."""
    manifest = Manifest.model_validate_json((folder / "manifest.json").read_bytes())
    return said_in(folder / artifact.sidecar, folder / manifest.tokenizer.file, runtime, tokens)


def said_in(sidecar: Path, tokenizer_file: Path, runtime: str, tokens: int) -> list[dict]:
    """The same in our own session."""
    tokenizer = Tokenizer.from_file(str(tokenizer_file))
    import_runtime(runtime)
    session = open_artifact(replace(read_artifact(sidecar), prompt=None), runtime, 1)
    found = []
    for prompt in PROMPTS:
        ids, new = tokenizer.encode(prompt).ids, []
        session.reset()
        token = int(session.prefill(np.array(ids)).argmax())
        while token != session.interface.eos_token_id:
            new.append(token)
            if len(new) == tokens:
                break
            token = int(session.step(token).argmax())
        found.append({"prompt": ids, "new": new, "text": tokenizer.decode(new, skip_special_tokens=False)})
    return found


def check_same(theirs: list[dict], ours: list[dict], eos_token_id: int | None) -> None:
    """The same ids of every prompt, and the same new ids up to the end of text; the same text of those that tell no ids.

    These hand texts over as C strings, which end at a NUL.
    """
    for prompt, their, our in zip(PROMPTS, theirs, ours, strict=True):
        assert their["prompt"] == our["prompt"], prompt
        if "new" in their:
            assert [token for token in their["new"] if token != eos_token_id] == our["new"], prompt
        else:
            assert their["text"] == our["text"].partition("\0")[0], prompt
