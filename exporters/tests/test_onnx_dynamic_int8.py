"""Dynamic int8 of the ONNX export: what ONNX Runtime makes of it, and that the numbers are those of the format."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from conftest import VOCABULARY
from exporters import onnx_dynamic_int8
from exporters.artifact import sha256_of
from exporters.onnx_qdq import linear_layers
from exporters.onnx_session import empty_past, open_session, open_session_of, run_tokens
from exporters.onnx_structure import require_int8, structure_of
from exporters.settings import OnnxDynamicInt8Settings
from exporters.tests.conftest import CASES, WINDOW
from models.errors import GateError

LINEAR_PER_LAYER = {"llama": 5, "qwen3": 5, "gpt2": 4}
FILE = "onnx_dynamic_int8.onnx"


@pytest.fixture(scope="module")
def quantised(exports, text, tmp_path_factory):
    made = {}
    for case in CASES:
        made[case] = tmp_path_factory.mktemp("dynamic")
        onnx_dynamic_int8.run(OnnxDynamicInt8Settings(), made[case], onnx=exports[case], text=text)
    return made


@pytest.mark.parametrize("case", CASES, ids=str)
def test_everything_is_int8_and_the_sidecar_says_what_was_found(case, quantised, exports):
    sidecar = json.loads((quantised[case] / "onnx_dynamic_int8.json").read_text())
    measured = sidecar["measured"]
    assert measured["linear_layers"] == measured["int8_linear_layers"] == 2 * LINEAR_PER_LAYER[case[0]] + 1
    assert measured["embedding_int8"]
    assert [entry["name"] for entry in measured["not_int8"]] == (["transformer.wpe.weight"] if case[0] == "gpt2" else [])
    assert sidecar["parent"] == sha256_of(exports[case] / "onnx_fp32.onnx")
    # A scale and a zero point for each of the few inputs of a tiny layer; GPT-2 has a position table in float beside them.
    assert 8 < measured["bits_per_weight"] < 10.5
    assert measured["against_fp32"]["kl"] < 0.5
    tables = [t for t in onnx.load(quantised[case] / FILE).graph.initializer if VOCABULARY in t.dims and len(t.dims) == 2]
    assert [t.data_type for t in tables] == [onnx.TensorProto.INT8] * (1 if case[1] else 2)


def int8_product(values, matrix):
    """``values @ matrix`` as dynamic quantisation has it: uint8 between the least and the greatest value, zero representable."""
    low, high = min(values.min(), 0), max(values.max(), 0)
    step = np.float32((high - low) / 255)
    zero = np.clip(np.rint(-low / step), 0, 255)
    rounded = np.clip(np.rint(values / step) + zero, 0, 255) - zero
    scale = np.abs(matrix).max(0) / 127
    return (rounded * step) @ (np.clip(np.rint(matrix / scale), -127, 127) * scale)


def test_a_layer_s_output_is_that_of_int8_numbers(quantised, exports):
    """The first layer's product, from the input that the graph itself had, against the format written out in numpy."""
    parent = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    name, source = next(iter(linear_layers(parent).items()))
    matrix = next(numpy_helper.to_array(t) for t in parent.graph.initializer if t.name == f"{name}.weight")
    output = next(node.output[0] for node in parent.graph.node if node.name == name)
    model = onnx.load(quantised["llama", True] / FILE)
    model.graph.output.extend(onnx.helper.make_tensor_value_info(value, 1, None) for value in (source, output))
    session = open_session_of(model)
    tokens = np.random.default_rng(7).integers(0, VOCABULARY, (1, WINDOW))
    feeds = {"input_ids": tokens, "attention_mask": np.ones_like(tokens), **empty_past(session, 1)}
    values, got = session.run([source, output], feeds)
    expected = int8_product(values[0], matrix)
    np.testing.assert_allclose(got[0], expected, atol=2e-3 * np.abs(expected).max())
    assert np.abs(got[0] - values[0] @ matrix).max() > 1e-4  # and not the float product


@pytest.mark.parametrize("changes", [{"per_channel": False}, {"reduce_range": True}], ids=str)
@pytest.mark.parametrize("case", [("llama", True), ("llama", False)], ids=str)
def test_every_option_changes_the_file_and_stays_int8(case, changes, quantised, exports, text, tmp_path):
    onnx_dynamic_int8.run(OnnxDynamicInt8Settings(**changes), tmp_path, onnx=exports[case], text=text)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(tmp_path / FILE).graph.initializer}
    for name, layer in [(name, name.removesuffix("_quantized")) for name in tensors if name.endswith("proj.weight_quantized")]:
        assert tensors[f"{layer}_scale"].size == (1 if changes == {"per_channel": False} else tensors[name].shape[1])
        assert np.abs(tensors[name]).max() <= (64 if "reduce_range" in changes else 127)
    tokens = np.load(text / "validation.npy")
    logits = [
        run_tokens(session, tokens[:1], empty_past(session, 1))[0]
        for session in map(open_session, (exports[case] / "onnx_fp32.onnx", tmp_path / FILE))
    ]
    assert np.square(logits[1] - logits[0]).mean() / np.square(logits[0]).mean() < 0.05


def test_a_float_embedding_or_a_layer_left_out_fails_the_gate(exports, tmp_path, monkeypatch):
    source = exports["llama", False] / "onnx_fp32.onnx"
    with monkeypatch.context() as patch:
        patch.setattr(onnx_dynamic_int8, "quantise_embeddings", lambda *_: None)
        onnx.save(onnx_dynamic_int8.quantise(onnx.load(source), OnnxDynamicInt8Settings()), tmp_path / "embedding.onnx")
    with pytest.raises(GateError, match="embedding tables in float.*embed_tokens"):
        require_int8(structure_of(tmp_path / "embedding.onnx"), 11, "onnx_dynamic_int8")
    layers = [name for name in linear_layers(onnx.load(source)) if name != "lm_head"]
    monkeypatch.setattr(onnx_dynamic_int8, "linear_layers", lambda _: layers)
    onnx.save(onnx_dynamic_int8.quantise(onnx.load(source), OnnxDynamicInt8Settings()), tmp_path / "head.onnx")
    with pytest.raises(GateError, match="float products with a constant matrix.*first: lm_head"):
        require_int8(structure_of(tmp_path / "head.onnx"), 11, "onnx_dynamic_int8")


def test_two_runs_are_byte_identical(quantised, exports, text, tmp_path):
    onnx_dynamic_int8.run(OnnxDynamicInt8Settings(), tmp_path, onnx=exports["gpt2", True], text=text)
    for path in quantised["gpt2", True].iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()
