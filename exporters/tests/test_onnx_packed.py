"""Weights as the machine's kernels want them, in a folder: the same answers, no copy in the process's own memory, and no stale ones."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import onnxruntime
import pytest

from conftest import VOCABULARY
from device_tests import onnx_packed
from device_tests.artifact import read_artifact
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.onnx_model import open_model
from device_tests.sessions import open_artifact, open_session
from exporters import onnx_export, onnx_hybrid_int4, onnx_hybrid_int8, onnx_int8, onnx_weight_only_int8
from exporters.settings import (
    OnnxHybridInt4Settings,
    OnnxHybridInt8Settings,
    OnnxInt8Settings,
    OnnxSettings,
    OnnxWeightOnlyInt8Settings,
)
from exporters.tests.families import tiny_decoder

MAKERS = {
    "static": (onnx_int8, OnnxInt8Settings(windows=4, decode_steps=4, mixed_precision=False)),
    "hybrid int8": (onnx_hybrid_int8, OnnxHybridInt8Settings(block=32, decode_steps=4)),
    "hybrid int8, int8 cache": (onnx_hybrid_int8, OnnxHybridInt8Settings(block=32, decode_steps=4, kv_cache="int8")),
    "hybrid int4": (onnx_hybrid_int4, OnnxHybridInt4Settings(block=16, decode_steps=4)),
}
IDS = np.random.default_rng(0).integers(3, VOCABULARY, 40)


@pytest.fixture(scope="module")
def sidecar(exports, text, tmp_path_factory):
    """The sidecar by form, made when first asked for."""
    made = {"fp32": exports["llama", True] / "onnx_fp32.json"}

    def get(form):
        if form not in made:
            module, settings = MAKERS[form]
            folder = tmp_path_factory.mktemp("packed")
            module.run(settings, folder, onnx=exports["llama", True], text=text)
            made[form] = folder / f"{module.NAME}.json"
        return made[form]

    return get


def answers(session):
    return np.stack([session.prefill(IDS[:30]), *(session.step(int(token)).copy() for token in IDS[30:])])


@pytest.mark.parametrize("form", ["fp32", *MAKERS])
def test_answers_are_those_of_weights_in_memory_and_weights_are_packed_once(sidecar, form, tmp_path):
    expected = answers(open_session(sidecar(form), "onnxruntime"))
    first = open_session(sidecar(form), "onnxruntime", packed=tmp_path)
    (place,) = tmp_path.iterdir()
    times = {path.name: path.stat().st_mtime_ns for path in place.iterdir()}
    second = open_session(sidecar(form), "onnxruntime", packed=tmp_path)
    for session in (first, second):
        np.testing.assert_allclose(answers(session), expected, atol=1e-4 * np.ptp(expected))
    assert {path.name: path.stat().st_mtime_ns for path in place.iterdir()} == times
    assert list(tmp_path.iterdir()) == [place]


MEASURE = """
import sys
from pathlib import Path
from device_tests.sessions import import_runtime, open_session
import_runtime("onnxruntime")
packed = Path(sys.argv[2]) if len(sys.argv) > 2 else None
session = open_session(Path(sys.argv[1]), "onnxruntime", packed=packed)
session.prefill(range(4))
status = Path("/proc/self/status").read_text().splitlines()
print(next(line.split()[1] for line in status if line.startswith("RssAnon:")))
"""


def test_no_weight_is_in_the_process_s_own_memory(text, tmp_path):
    """Against the same model with its weights packed in memory: what is anonymous there is the system's pages here."""
    model = tiny_decoder("llama", {"vocab_size": VOCABULARY, "hidden_size": 256, "intermediate_size": 16384, "initializer_range": 0.02})
    model.save_pretrained(tmp_path / "model")
    for name in ("fp32", "int8"):
        (tmp_path / name).mkdir()
    onnx_export.run(OnnxSettings(greedy_tokens=1), tmp_path / "fp32", model=tmp_path / "model", text=text)
    onnx_weight_only_int8.run(OnnxWeightOnlyInt8Settings(), tmp_path / "int8", onnx=tmp_path / "fp32", text=text)
    path = tmp_path / "int8" / "onnx_weight_only_int8.json"
    weights = json.loads(path.read_text())["bytes_read_per_token"]
    assert weights > 25e6

    def anonymous(*more):
        done = subprocess.run([sys.executable, "-c", MEASURE, str(path), *more], capture_output=True, text=True, check=True)
        return int(done.stdout) * 1024

    anonymous(str(tmp_path / "packed"))  # makes them
    assert anonymous() - anonymous(str(tmp_path / "packed")) > 0.8 * weights


def test_another_artifact_runtime_or_processor_has_a_place_of_its_own(sidecar, tmp_path, monkeypatch):
    artifact = read_artifact(sidecar("static"))
    places = [onnx_packed.packed_place(tmp_path, artifact, "1.0"), onnx_packed.packed_place(tmp_path, artifact, "1.1")]
    places.append(onnx_packed.packed_place(tmp_path, replace(artifact, sha256="0" * 64), "1.0"))
    for flags in ("sse avx2", "sse avx2 avx512_vnni"):
        (tmp_path / flags).write_text(f"processor\t: 0\nmodel name\t: x\ncpu MHz\t\t: 1.0\nflags\t\t: {flags}\n\nprocessor\t: 1\n")
        monkeypatch.setattr(onnx_packed, "CPU_INFO", tmp_path / flags)
        places.append(onnx_packed.packed_place(tmp_path, artifact, "1.0"))
    assert len(set(places)) == 5
    (tmp_path / flags).write_text((tmp_path / flags).read_text().replace("MHz\t\t: 1.0", "MHz\t\t: 2.0"))
    assert onnx_packed.packed_place(tmp_path, artifact, "1.0") == places[-1]  # what changes by the minute does not count
    monkeypatch.setattr(onnx_packed, "CPU_INFO", tmp_path / "none")
    with pytest.raises(DeviceTestError, match="cannot be read, so nobody knows for which processor"):
        onnx_packed.packed_place(tmp_path, artifact, "1.0")


@pytest.mark.parametrize("file", ["decode.data", "prompt.data", "decode.onnx", "prompt.onnx", "sha256.json"])
def test_one_spoilt_byte_is_found(sidecar, file, tmp_path):
    """ONNX Runtime opens what is spoilt in most places, and answers with it."""
    open_session(sidecar("hybrid int8"), "onnxruntime", packed=tmp_path)
    (place,) = tmp_path.iterdir()
    held = bytearray((place / file).read_bytes())
    held[len(held) // 2] ^= 0x55
    (place / file).write_bytes(held)
    with pytest.raises(ArtifactFailure, match=f"{place}.*; remove {place}, and it is made anew"):
        open_session(sidecar("hybrid int8"), "onnxruntime", packed=tmp_path)


def test_a_folder_that_cannot_be_written_and_a_runtime_that_does_not_pack_are_one_line(sidecar, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DeviceTestError, match="cannot be written .*leave out --packed"):
        open_model(read_artifact(sidecar("static")), onnxruntime, 1, tmp_path / "file")
    with pytest.raises(DeviceTestError, match="litert cannot keep packed weights"):
        open_artifact(replace(read_artifact(sidecar("static")), format="tflite"), "litert", 1, tmp_path)


def test_an_interrupted_packing_leaves_nothing(sidecar, tmp_path, monkeypatch):
    def broken(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(onnx_packed.os, "replace", broken)
    with pytest.raises(KeyboardInterrupt):
        open_session(sidecar("static"), "onnxruntime", packed=tmp_path)
    assert list(tmp_path.iterdir()) == []
