"""The traps of speed: each is built here, and the check that fails the build must see it.

What is silent about them: the answers are right, and nothing is told but the time. A float head, tables dequantised at every step and
float embeddings are built in ``test_onnx_int8.py``, the same for weight-only in ``test_onnx_weight_only.py``.
"""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper
from onnxruntime.quantization import QuantType

from device_tests.artifact import read_artifact
from device_tests.errors import ArtifactFailure
from device_tests.onnx_model import open_model
from exporters import onnx_export, onnx_hybrid, onnx_hybrid_int8, onnx_int8, onnx_qdq
from exporters.onnx_calibration import Feeds, activation_ranges
from exporters.onnx_mixed import require_mixed
from exporters.onnx_prompt_graph import LAST, give_last_logits, keep_cache_only
from exporters.onnx_qdq import Scheme, linear_layers, quantise
from exporters.onnx_structure import require_cache_in_place, require_int8, structure_of
from exporters.settings import OnnxHybridInt8Settings, OnnxInt8Settings
from models.errors import GateError

LAYERS = 11  # linear ones of the llama


@pytest.fixture(scope="module")
def static(exports, text):
    """A static int8 model with every layer as it should be."""
    model = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    return quantise(model, Scheme(ranges_of(model, text)))


def ranges_of(model, text):
    feeds = Feeds(np.load(text / "calibration.npy")[:2], 4)
    return activation_ranges(model, list(dict.fromkeys(linear_layers(model).values())), feeds, "minmax")


def saved(model, folder):
    onnx.save(model, folder / "model.onnx")
    return folder / "model.onnx"


def test_what_is_right_passes(static, exports, tmp_path):
    structure = structure_of(saved(static, tmp_path))
    require_int8(structure, LAYERS, "x")
    require_mixed(structure, LAYERS, {}, "x")
    assert structure.signed_activations == structure.copied_caches == ()
    require_cache_in_place(structure_of(exports["llama", True] / "onnx_fp32.onnx"), "x")


def test_signed_activations_fail_both_gates(exports, text, tmp_path, monkeypatch):
    """S8S8: on x86 gate and up stay float products of a weight that is dequantised at every step."""
    quantizer = onnx_qdq.QDQQuantizer
    monkeypatch.setattr(onnx_qdq, "QDQQuantizer", lambda model, **said: quantizer(model, **{**said, "activation_qType": QuantType.QInt8}))
    model = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    structure = structure_of(saved(quantise(model, Scheme(ranges_of(model, text))), tmp_path))
    assert structure.signed_activations
    for require in (lambda: require_int8(structure, LAYERS, "x"), lambda: require_mixed(structure, LAYERS, {}, "x")):
        with pytest.raises(GateError, match="^x: "):
            require()
    alone = type(structure)(structure.int8_linear, (), (), (), (), (), structure.signed_activations)
    with pytest.raises(GateError, match=r"x: \d+ activations quantised as signed int8"):
        require_int8(alone, len(structure.int8_linear), "x")


@pytest.mark.parametrize("place", ("before", "behind", "both read it", "crossed"))
def test_a_cache_that_cannot_be_one_buffer_is_found(exports, static, tmp_path, place):
    """Anything between the cache's tensors and the attention means a copy of the whole cache at every step."""
    for source in (onnx.load(exports["llama", True] / "onnx_fp32.onnx"), static):
        model = onnx.ModelProto()
        model.CopyFrom(source)
        first, second = (node for node in model.graph.node if node.op_type == "GroupQueryAttention")
        position = list(model.graph.node).index(first)
        one = helper.make_tensor("one_more", TensorProto.FLOAT, [1], [1.0])
        model.graph.initializer.append(one)
        if place == "before":
            first.input[3] = "scaled"
            model.graph.node.insert(position, helper.make_node("Mul", ["past_key_values.0.key", "one_more"], ["scaled"]))
        elif place == "behind":
            first.output[2] = "scaled"
            model.graph.node.insert(position + 1, helper.make_node("Mul", ["scaled", "one_more"], ["present.0.value"]))
        elif place == "both read it":
            model.graph.node.append(helper.make_node("Mul", ["past_key_values.0.key", "one_more"], ["looked_at"]))
            model.graph.output.append(helper.make_tensor_value_info("looked_at", TensorProto.FLOAT, None))
        else:
            first.output[1], second.output[1] = second.output[1], first.output[1]
        structure = structure_of(saved(model, tmp_path))
        assert f"past_key_values.0.{'value' if place == 'behind' else 'key'}" in structure.copied_caches
        with pytest.raises(GateError, match="x: [12] caches that are copied at every step"):
            require_cache_in_place(structure, "x")
        if source is not static:
            with pytest.raises(GateError, match="model.onnx: [12] caches are copied at every step, limit 0"):
                onnx_export.check(tmp_path / "model.onnx")
        if source is static:
            with pytest.raises(GateError, match="caches that are copied at every step"):
                require_mixed(structure, LAYERS, {}, "x")


def test_the_ort_format_is_refused_where_artifacts_are_made_and_where_they_run(exports, text, tmp_path):
    """A static int8 file saved as a phone's converter would; renamed, because a name proves nothing."""
    out = tmp_path / "out"
    out.mkdir()
    onnx_int8.run(OnnxInt8Settings(windows=2, decode_steps=4, mixed_precision=False), out, onnx=exports["llama", True], text=text)
    artifact = read_artifact(out / "onnx_static_int8.json")
    assert open_model(artifact, onnxruntime, 1).prefill(np.arange(5)).shape == (artifact.interface.vocab_size,)
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "model.ort")
    options.add_session_config_entry("session.save_model_format", "ORT")
    onnxruntime.InferenceSession(str(artifact.path), options, providers=["CPUExecutionProvider"])
    artifact.path.write_bytes((tmp_path / "model.ort").read_bytes())
    with pytest.raises(GateError, match="onnx_static_int8.onnx is in ORT format"):
        structure_of(artifact.path)
    with pytest.raises(ArtifactFailure, match="onnx_static_int8.onnx is in ORT format, which is not what was proved"):
        open_model(artifact, onnxruntime, 1)


def test_a_prompt_graph_that_computes_logits_of_every_token_fails_the_stage(exports, text, tmp_path, monkeypatch):
    """A prompt would pay for logits that nobody reads."""

    def give_all_logits(prompt, decode, artifact):
        taken = give_last_logits(prompt, decode, artifact)
        start = next(tensor for tensor in prompt.initializer if tensor.name == LAST)
        start.CopyFrom(onnx.numpy_helper.from_array(np.array([0], np.int64), LAST))
        return taken

    settings = OnnxHybridInt8Settings(block=32, decode_steps=4, rounding="nearest", two_step_crest=None)
    monkeypatch.setattr(onnx_hybrid, "give_last_logits", give_all_logits)
    with pytest.raises(GateError, match="onnx_hybrid_int8, prompt graph: it gives logits of 20 tokens of a prompt, limit 1"):
        onnx_hybrid_int8.run(settings, tmp_path, onnx=exports["llama", True], text=text)
    assert not list(tmp_path.glob("*.json"))


def test_a_last_token_is_only_taken_where_tokens_lie_along_the_second_axis(exports):
    """Elsewhere the Slice would take a head or a number, without an error."""
    decode = onnx.load(exports["llama", True] / "onnx_fp32.onnx").graph
    prompt = onnx.GraphProto()
    prompt.CopyFrom(decode)
    keep_cache_only(prompt)
    [met] = [value for value in decode.value_info if value.name.startswith("GroupQueryAttention") and value.name in last_attention(decode)]
    met.type.tensor_type.shape.dim.add().dim_value = 4
    with pytest.raises(GateError, match=f"x, prompt graph: {met.name}, where the last token is taken, has sizes .*, not .batch"):
        give_last_logits(prompt, decode, "x")


def last_attention(graph):
    return [node for node in graph.node if node.op_type == "GroupQueryAttention"][-1].output
