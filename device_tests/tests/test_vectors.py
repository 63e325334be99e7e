"""Files that are missing, cut, swapped or of another model: one line each, before any work."""

import json
import zipfile

import numpy as np
import pytest

from device_tests.artifact import Interface, read_artifact
from device_tests.errors import DeviceTestError
from device_tests.tests.toy import INTERFACE, VOCABULARY, ToyModel, write_sidecar, write_vectors
from device_tests.vectors import open_evaluation, open_golden, read_rows


@pytest.fixture()
def folder(tmp_path):
    return write_vectors(tmp_path, ToyModel(0), ToyModel(1))


def rewrite(path, **changes):
    arrays = dict(np.load(path))
    arrays.update(changes)
    np.savez(path, **{name: array for name, array in arrays.items() if array is not None})


def test_rows_are_numpys(folder):
    for opener, name in ((open_golden, "golden"), (open_evaluation, "evaluation")):
        expected = np.load(folder / f"{name}.npz")
        names = tuple(key for key in expected.files if key in ("windows", "logits", "top_ids", "top_logprob", "rest_logprob"))
        rows = list(read_rows(opener(folder, INTERFACE), names))
        for key in names:
            np.testing.assert_array_equal(np.stack([row[key] for row in rows]), expected[key])


@pytest.mark.parametrize("kept", [0, 100, 0.5, -1])
def test_a_cut_file_is_told_in_one_line(folder, kept):
    data = (folder / "golden.npz").read_bytes()
    (folder / "golden.npz").write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(DeviceTestError, match="golden.npz: damaged") as caught:
        open_golden(folder, INTERFACE)
    assert "\n" not in str(caught.value)


def test_a_changed_byte_of_the_logits_is_found(folder):
    path = folder / "golden.npz"
    with zipfile.ZipFile(path) as archive:
        offset = archive.getinfo("logits.npy").header_offset
    data = bytearray(path.read_bytes())
    data[offset + 2000] ^= 1
    path.write_bytes(data)
    with pytest.raises(DeviceTestError, match="damaged"):
        list(read_rows(open_golden(folder, INTERFACE), ("logits",)))


@pytest.mark.parametrize(
    "changes",
    [
        {"logits": None},
        {"logits": np.zeros((3, 6, VOCABULARY + 1), np.float32)},
        {"logits": np.zeros((2, 6, VOCABULARY), np.float32)},
        {"logits": np.zeros((3, 6, VOCABULARY), np.int32)},
        {"logits": np.zeros((3, 14, VOCABULARY), np.float32)},
        {"logits": np.array([[["text"]]], dtype=object)},
        {"windows": np.zeros((3, 24, 1), np.int32)},
        {"windows": np.zeros((0, 24), np.int32)},
        {"prompt_tokens": np.int32(24)},
        {"prompt_tokens": np.int32(0)},
        {"greedy_tokens": np.zeros((2, 60), np.int32)},
    ],
)
def test_golden_vectors_that_do_not_fit_are_refused(folder, changes):
    rewrite(folder / "golden.npz", **changes)
    with pytest.raises(DeviceTestError, match=r"golden\.npz"):
        open_golden(folder, INTERFACE)


def test_an_evaluation_that_does_not_fit_is_refused(folder):
    rewrite(folder / "evaluation.npz", target_logprob=np.zeros((3, 12), np.float32))
    with pytest.raises(DeviceTestError, match=r"evaluation\.npz"):
        open_evaluation(folder, INTERFACE)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DeviceTestError, match="no such file"):
        open_golden(tmp_path, INTERFACE)


@pytest.fixture()
def sidecar(tmp_path):
    (tmp_path / "model.onnx").write_bytes(bytes(range(200)))
    return write_sidecar(tmp_path / "model.onnx", "onnx")


def test_a_sound_artifact_is_read(sidecar):
    artifact = read_artifact(sidecar)
    assert artifact.interface == Interface(**{**json.loads(sidecar.read_text())["interface"]})
    assert artifact.path == sidecar.with_name("model.onnx") and artifact.bytes == 200


def test_a_changed_byte_is_found_before_any_runtime_sees_it(sidecar):
    path = sidecar.with_name("model.onnx")
    path.write_bytes(path.read_bytes()[:-1] + b"\0")
    with pytest.raises(DeviceTestError, match="SHA-256 .* differs"):
        read_artifact(sidecar)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda record: record["files"][0].update(bytes=3), "its JSON says 3"),
        (lambda record: record["files"].append({"path": "../more.data", "sha256": "", "bytes": 1}), "beside its JSON"),
        (lambda record: record.update(file="other.onnx"), "not among its files"),
        (lambda record: record.pop("interface"), "no sidecar"),
        (lambda record: record["interface"].pop("kv_heads"), "no sidecar"),
        (lambda record: record["interface"].update(layers=None), "no positive number"),
        (lambda record: record.update(format="tflite"), "no positive number"),  # prefill_tokens is null
        (lambda record: record["files"].append({"path": "more.data", "sha256": "", "bytes": 1}), "more.data: cannot be read"),
    ],
)
def test_a_sidecar_that_is_wrong_is_refused(sidecar, change, words):
    record = json.loads(sidecar.read_text())
    change(record)
    sidecar.write_text(json.dumps(record))
    with pytest.raises(DeviceTestError, match=words):
        read_artifact(sidecar)
