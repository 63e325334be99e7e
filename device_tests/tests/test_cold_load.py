"""A load is called cold only where the bytes really came from storage."""

import os

from device_tests import cold_load
from device_tests.cold_load import cold_load_ms, forget, storage_bytes_read
from device_tests.devices.job import Run
from device_tests.devices.local import run_local
from device_tests.tests.toy import ToyModel, write_onnx, write_vectors


def test_forgotten_files_are_read_again_from_storage(tmp_path):
    """Where the system lets go of pages at all; on a RAM disk it does not, and then nothing is called cold."""
    path = tmp_path / "weights"
    path.write_bytes(b"1" * (4 << 20))
    with path.open("rb") as file:
        os.fsync(file.fileno())
    forget(path)
    before = storage_bytes_read()
    path.read_bytes()
    fetched = storage_bytes_read() - before
    assert fetched == 0 or fetched >= path.stat().st_size


def test_a_load_that_read_nothing_is_not_cold(tmp_path, monkeypatch, capsys):
    sidecar = write_onnx(ToyModel(), tmp_path / "toy.onnx")
    for fetched, cold in ((0, False), (10**9, True)):
        counts = iter([0, fetched])
        monkeypatch.setattr(cold_load, "storage_bytes_read", lambda counts=counts: next(counts))
        assert cold_load.main([str(sidecar), "onnxruntime", "1"]) == 0
        assert ('"load_cold_ms": null' in capsys.readouterr().out) is not cold


def test_a_record_has_both_loads_and_a_broken_artifact_has_none(tmp_path):
    sidecar = write_onnx(ToyModel(), tmp_path / "toy.onnx")
    write_vectors(tmp_path, ToyModel(), ToyModel(1))
    device = run_local(sidecar, tmp_path, Run("onnxruntime", decode_tokens=8))["device"]
    assert device["load_ms"] > 0 and (device["load_cold_ms"] is None or device["load_cold_ms"] > 0)
    (tmp_path / "toy.onnx").write_bytes(b"no model")
    assert cold_load_ms(sidecar, "onnxruntime", 1) is None
