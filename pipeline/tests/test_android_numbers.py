"""The Kotlin library's numbers and files: drawing tokens, numpy's generator and arrays, a hybrid's matrices, the manifest's check."""

import dataclasses
import hashlib
import json

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from device_tests.artifact import Matrix
from device_tests.onnx_hybrid import as_int8
from device_tests.sampling import Sampling, next_token

pytest_plugins = ["pipeline.tests.kotlin_fixtures"]

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
UNIFORMS = st.floats(0, 1, exclude_max=True)


class Given:
    """A generator that draws one given number."""

    def __init__(self, uniform: float) -> None:
        self.uniform = uniform

    def random(self) -> float:
        return self.uniform


@SLOW
@given(
    logits=st.lists(st.floats(-8, 8, width=32) | st.sampled_from([0.0, -0.0, 1.5]), min_size=1, max_size=200),
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.integers(0, 220),
    top_p=st.sampled_from([1.0, 0.9, 0.5, 0.999, 1e-6]),
    uniforms=st.lists(UNIFORMS, min_size=1, max_size=6),
)
def test_tokens_are_drawn_as_in_python(onnx_library, logits, temperature, top_k, top_p, uniforms):
    drawn = onnx_library.ask(
        "sample", cases=[{"logits": logits, "temperature": temperature, "top_k": top_k, "top_p": top_p, "uniforms": uniforms}]
    )[0]
    values = np.array(logits, dtype=np.float32)
    assert drawn == [next_token(values, Sampling(temperature, top_k, top_p), Given(uniform)) for uniform in uniforms]


def test_a_large_vocabulary_is_drawn_from_as_in_python(onnx_library):
    """Where the share needs more of the likeliest than are looked at first, and where nothing can be left out."""
    generator = np.random.default_rng(1)
    cases, expected = [], []
    for top_k, top_p, spread in ((0, 0.95, 0.5), (0, 0.999, 3.0), (300, 0.9, 1.0), (0, 1.0, 2.0), (4999, 1.0, 1.0)):
        logits = (generator.normal(size=5000) * spread).astype(np.float32).round(2)  # rounded: many are equal
        uniforms = generator.random(40).tolist()
        cases.append({"logits": logits.tolist(), "temperature": 0.8, "top_k": top_k, "top_p": top_p, "uniforms": uniforms})
        expected.append([next_token(logits, Sampling(0.8, top_k, top_p), Given(uniform)) for uniform in uniforms])
    assert onnx_library.ask("sample", cases=cases) == expected


def test_senseless_options_and_broken_logits_are_refused(onnx_library):
    case = {"logits": [1.0, 2.0], "temperature": 1.0, "top_k": 0, "top_p": 1.0, "uniforms": [0.5]}
    for change, said in (
        ({"temperature": -1.0}, "temperature"),
        ({"top_k": -1}, "topK"),
        ({"top_p": 0.0}, "topP"),
        ({"top_p": 1.5}, "topP"),
    ):
        assert said in onnx_library.ask("sample", cases=[{**case, **change}])[0]["illegal"]
    assert "NaN or infinite" in onnx_library.ask("sample", cases=[{**case, "logits": [1.0, 1e39]}])[0]["refused"]


@SLOW
@given(seeds=st.lists(st.integers(0, 2**63 - 1) | st.integers(0, 5), min_size=1, max_size=8))
def test_a_seed_draws_numpys_numbers(onnx_library, seeds):
    assert onnx_library.ask("random", seeds=seeds) == [np.random.default_rng(seed).random(20).tolist() for seed in seeds]


@SLOW
@given(
    seed=st.integers(0, 2**32),
    sizes=st.tuples(st.integers(1, 70), st.integers(1, 140), st.sampled_from([16, 32, 64])),
    form=st.sampled_from(["8 bits", "8 bits with row scale", "4 bits", "4 bits with zeros", "8 bits with zeros"]),
)
def test_prompt_matrices_are_those_that_python_makes(onnx_library, tmp_path_factory, seed, sizes, form):
    generator = np.random.default_rng(seed)
    inputs, outputs, block = sizes
    blocks, bits = -(-inputs // block), int(form[0])
    row_scale = generator.uniform(0.5, 2, outputs).astype("<f4")
    scales = (row_scale[:, None] * generator.uniform(0.1, 0.45, (outputs, blocks))).astype("<f4")
    parts = {"codes": generator.integers(0, 256, outputs * blocks * block * bits // 8).astype(np.uint8), "scales": scales}
    if form != "8 bits":
        parts["row_scale"] = row_scale
    if form.endswith("zeros"):
        parts["zeros"] = generator.integers(0, 256, outputs * -(-blocks * bits // 8)).astype(np.uint8)
    data, offsets = bytearray(b"\0" * 64), {}
    for name, values in parts.items():
        offsets[name] = len(data)
        data += values.tobytes() + b"\0" * (-values.nbytes % 64)
    file = tmp_path_factory.mktemp("weights") / "weights.data"
    file.write_bytes(data)
    matrix = Matrix("", inputs, outputs, blocks, block, bits, offsets)
    asked = {key: value for key, value in dataclasses.asdict(matrix).items() if key not in ("name", "offsets")}
    found = onnx_library.ask("matrices", data=str(file), matrices=[{**asked, **offsets}])[0]
    assert found == as_int8(np.frombuffer(bytes(data), np.uint8), matrix).reshape(-1).tolist()


def test_arrays_of_numpy_are_read(onnx_library, tmp_path):
    generator = np.random.default_rng(0)
    arrays = {
        "floats": generator.normal(size=(3, 4, 5)).astype(np.float32),
        "ints": generator.integers(-9, 9, (7, 2)).astype(np.int32),
        "longs": generator.integers(-9, 9, 6),
        "scalar": np.int32(41),
    }
    wanted = [{"name": name, "type": "float" if name == "floats" else "int"} for name in arrays]
    for name, save in (("stored", np.savez), ("deflated", np.savez_compressed)):
        save(tmp_path / f"{name}.npz", **arrays)
        found = onnx_library.ask("npz", file=str(tmp_path / f"{name}.npz"), arrays=wanted)
        for key, array in arrays.items():
            assert found[key]["shape"] == list(array.shape)
            assert np.array_equal(np.array(found[key]["values"], array.dtype), array.reshape(-1)), key


def test_damaged_arrays_are_refused_with_their_name(onnx_library, tmp_path):
    def refused(file: str, array: str = "a") -> str:
        return onnx_library.ask("npz", file=str(tmp_path / file), arrays=[{"name": array, "type": "float"}])["refused"]

    np.savez(tmp_path / "doubles.npz", a=np.zeros(3))
    np.savez(tmp_path / "columns.npz", a=np.asfortranarray(np.zeros((2, 3), np.float32)))
    np.savez(tmp_path / "ints.npz", a=np.zeros(3, np.int32))
    (tmp_path / "text.npz").write_text("no zip")
    (tmp_path / "short.npz").write_bytes((tmp_path / "ints.npz").read_bytes()[:-60])
    assert "arrays are float32, int32 or int64" in refused("doubles.npz") and "C order" in refused("columns.npz")
    assert "not float32" in refused("ints.npz") and "has no b" in refused("ints.npz", "b")
    for name in ("none.npz", "text.npz", "short.npz"):
        assert name in refused(name)


def manifest(files: dict[str, bytes]) -> dict:
    listed = [
        {"path": path, "sha256": hashlib.sha256(data).hexdigest(), "bytes": len(data), "role": "artifact"} for path, data in files.items()
    ]
    return {"format_version": 2, "name": "tiny", "artifacts": [], "tokenizer": {"file": "tokenizer/tokenizer.json"}, "files": listed}


FILES = {"onnx/model.onnx": b"the proved model" * 5000, "tokenizer/tokenizer.json": b"{}"}


@pytest.fixture
def phone(tmp_path):
    for path, data in FILES.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes(data)
    (tmp_path / "manifest.json").write_text(json.dumps(manifest(FILES)))
    return tmp_path


def test_proved_files_are_taken(onnx_library, phone):
    assert onnx_library.ask("verify", root=str(phone), paths=list(FILES)) == [str(phone / path) for path in FILES]


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (lambda data: data[:7000] + b"!" + data[7001:], "changed (SHA-256"),
        (lambda data: data[:-1], "79999 bytes, the manifest says 80000"),
        (lambda data: data + b"!", "80001 bytes, the manifest says 80000"),
        (lambda data: None, "missing in"),
    ],
)
def test_another_file_is_refused_by_name(onnx_library, phone, spoil, said):
    path = phone / "onnx/model.onnx"
    data = spoil(path.read_bytes())
    path.unlink() if data is None else path.write_bytes(data)
    refused = onnx_library.ask("verify", root=str(phone), paths=["onnx/model.onnx"])[0]["refused"]
    assert refused.startswith("onnx/model.onnx: ") and said in refused


def test_a_file_that_nobody_proved_is_refused(onnx_library, phone):
    (phone / "onnx/other.onnx").write_bytes(b"x")
    assert "not in manifest.json" in onnx_library.ask("verify", root=str(phone), paths=["onnx/other.onnx"])[0]["refused"]


@pytest.mark.parametrize("path", ["../outside", "/etc/passwd", "a//b", "a/./b", "C:x", "a\\b", ""])
def test_a_manifest_that_leaves_its_folder_is_refused(onnx_library, phone, path):
    record = manifest(FILES)
    record["files"][0]["path"] = path
    (phone / "manifest.json").write_text(json.dumps(record))
    assert "is no plain path" in onnx_library.ask("verify", root=str(phone), paths=[path])[0]["refused"]


def test_a_manifest_that_is_none_is_refused(onnx_library, phone):
    for text, said in (("{", "no JSON"), ("[]", "JSON object is expected"), ('{"files": []}', "a JSON object is expected")):
        (phone / "manifest.json").write_text(text)
        assert said in onnx_library.ask("verify", root=str(phone), paths=["x"])[0]["refused"]
    (phone / "manifest.json").unlink()
    assert "manifest.json: cannot be read" in onnx_library.ask("verify", root=str(phone), paths=["x"])[0]["refused"]
