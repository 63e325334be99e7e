"""A model whose weights lie beside its graph, as those of large models do, on the whole ONNX road."""

import json

import numpy as np
import pytest

from conftest import tiny_model
from exporters import onnx_dynamic_int8, onnx_export, onnx_hybrid_int4, onnx_hybrid_int8, onnx_int8, onnx_session, onnx_weight_only_int8
from exporters.settings import (
    OnnxDynamicInt8Settings,
    OnnxHybridInt4Settings,
    OnnxHybridInt8Settings,
    OnnxInt8Settings,
    OnnxSettings,
    OnnxWeightOnlyInt8Settings,
)

LARGE_BYTES = 50_000  # so that the tiny model is a large one
STEPS = {"windows": 2, "decode_steps": 4}
STAGES = [
    (onnx_int8, OnnxInt8Settings(**STEPS)),
    (onnx_dynamic_int8, OnnxDynamicInt8Settings()),
    (onnx_weight_only_int8, OnnxWeightOnlyInt8Settings(windows=2)),
    (onnx_hybrid_int8, OnnxHybridInt8Settings(**STEPS)),
    (onnx_hybrid_int4, OnnxHybridInt4Settings(**STEPS)),
]


@pytest.fixture(scope="module")
def parents(text, tmp_path_factory):
    """The same model exported as one file, and with its weights in a second file."""
    folder, made = tmp_path_factory.mktemp("large"), {}
    tiny_model("llama", tied=True).save_pretrained(folder / "model")
    for name in ("small", "large"):
        (folder / name).mkdir()
        with pytest.MonkeyPatch.context() as patched:
            if name == "large":
                patched.setattr(onnx_export, "EXTERNAL_DATA_BYTES", LARGE_BYTES)
            onnx_export.run(OnnxSettings(greedy_tokens=4), folder / name, model=folder / "model", text=text)
        made[name] = folder / name
    return made


def test_its_export_is_two_files_and_nothing_else_is_left(parents):
    files = {"genai_config.json", "onnx_fp32.json", "onnx_fp32.onnx"}
    assert {path.name for path in parents["small"].iterdir()} == files
    assert {path.name for path in parents["large"].iterdir()} == files | {"onnx_fp32.onnx.data"}


def test_its_matrices_are_not_copied_out_of_the_file(parents, monkeypatch):
    entries = [onnx_session.open_session(parents["large"] / "onnx_fp32.onnx").get_session_options()]
    monkeypatch.setattr(onnx_session, "LARGE_BYTES", LARGE_BYTES)
    entries.append(onnx_session.open_session(parents["large"] / "onnx_fp32.onnx").get_session_options())
    with pytest.raises(RuntimeError, match="disable_prepacking"):
        entries[0].get_session_config_entry("session.disable_prepacking")
    assert entries[1].get_session_config_entry("session.disable_prepacking") == "1"


@pytest.mark.parametrize(("stage", "settings"), STAGES, ids=lambda value: getattr(value, "NAME", ""))
def test_every_quantisation_makes_the_same_of_it(stage, settings, parents, text, tmp_path, monkeypatch):
    made = {}
    for name, parent in parents.items():
        (tmp_path / name).mkdir()
        with monkeypatch.context() as patched:
            if name == "large":
                patched.setattr(onnx_session, "LARGE_BYTES", LARGE_BYTES)
            stage.run(settings, tmp_path / name, onnx=parent, text=text)
        made[name] = json.loads((tmp_path / name / f"{stage.NAME}.json").read_text())
    measured = [made[name]["measured"]["against_fp32"] for name in ("small", "large")]
    assert made["large"]["bytes"] == pytest.approx(made["small"]["bytes"], abs=100)  # a message keeps a note of where its bytes were
    np.testing.assert_allclose(list(measured[1].values()), list(measured[0].values()), rtol=0.05, atol=1e-6)
