"""Files for ONNX Runtime's small builds: all operators are listed, and no file of Runtime style, which is silently wrong, gets through."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.tools.reduced_build_config_parser import parse_config

from device_tests.tests.toy import INTERFACE, ToyModel, write_onnx
from models.errors import GateError
from pipeline import ort_format
from pipeline.ort_format import Graph, check_fixed_style, probe, save, write_ort, write_required_operators

SIZES = {"kv_heads": INTERFACE.kv_heads, "head_dim": INTERFACE.head_dim, "vocab_size": INTERFACE.vocab_size}
SIZES |= {"context_tokens": INTERFACE.context_tokens}


@pytest.fixture
def toy(tmp_path):
    write_onnx(ToyModel(0), tmp_path / "model.onnx")
    return tmp_path / "model.onnx"


@pytest.fixture
def int8(tmp_path):
    """A linear layer in static int8 as the quantiser writes it: Q, DQ, MatMul with a dequantised weight, Q, DQ."""
    weight = np.random.default_rng(0).integers(-127, 128, (16, 8)).astype(np.int8)
    constants = {"weight": weight, "scale": np.float32(0.01), "zero": np.int8(0), "x_scale": np.float32(0.05), "x_zero": np.uint8(128)}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["x_q"]),
        helper.make_node("DequantizeLinear", ["x_q", "x_scale", "x_zero"], ["x_dq"]),
        helper.make_node("DequantizeLinear", ["weight", "scale", "zero"], ["w_dq"]),
        helper.make_node("MatMul", ["x_dq", "w_dq"], ["y"]),
        helper.make_node("QuantizeLinear", ["y", "x_scale", "x_zero"], ["y_q"]),
        helper.make_node("DequantizeLinear", ["y_q", "x_scale", "x_zero"], ["out"]),
    ]
    inputs = [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["rows", 16])]
    outputs = [helper.make_tensor_value_info("out", TensorProto.FLOAT, ["rows", 8])]
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "int8", inputs, outputs, initializers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "int8.onnx")
    return tmp_path / "int8.onnx"


def listed(config) -> set[tuple[str, str]]:
    required, _ = parse_config(str(config))
    return {(domain, op) for domain, versions in required.items() for ops in versions.values() for op in ops}


def test_every_operator_is_listed_before_and_after_fusing_and_no_path(toy, int8, tmp_path):
    write_required_operators([Graph(toy), Graph(int8)], tmp_path / "required_operators.config")
    found = listed(tmp_path / "required_operators.config")
    for path in (toy, int8):
        for node in onnx.load(path).graph.node:
            assert (node.domain or "ai.onnx", node.op_type) in found, node.op_type
    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "optimised.onnx")
    onnxruntime.InferenceSession(str(int8), options, providers=["CPUExecutionProvider"])
    fused = {(node.domain or "ai.onnx", node.op_type) for node in onnx.load(tmp_path / "optimised.onnx").graph.node}
    assert fused <= found and fused - {(node.domain or "ai.onnx", node.op_type) for node in onnx.load(int8).graph.node}
    text = (tmp_path / "required_operators.config").read_text()
    assert str(tmp_path) not in text and text.startswith("# Operators of int8.onnx, model.onnx, before and after optimisation.")


def test_the_same_graphs_give_the_same_list_in_whatever_order(toy, int8, tmp_path):
    write_required_operators([Graph(toy), Graph(int8)], tmp_path / "first")
    write_required_operators([Graph(int8), Graph(toy)], tmp_path / "second")
    first, second = (path.read_text().replace("first", "").replace("second", "") for path in (tmp_path / "first", tmp_path / "second"))
    assert first == second


def test_weights_that_the_host_gives_are_no_hindrance(toy, tmp_path):
    model = onnx.load(toy)
    (head,) = [tensor for tensor in model.graph.initializer if tensor.name == "head"]
    values = numpy_helper.to_array(head).copy()
    head.ClearField("raw_data")
    head.data_location = TensorProto.EXTERNAL
    head.external_data.append(onnx.StringStringEntryProto(key="location", value="given_by_the_host"))
    toy.write_bytes(model.SerializeToString())
    write_required_operators([Graph(toy, {"head": values})], tmp_path / "list")
    assert ("com.microsoft", "GroupQueryAttention") in listed(tmp_path / "list")


def test_a_model_in_ort_format_answers_the_same_to_the_bit(toy):
    target = write_ort(toy, SIZES)
    assert target.name == "model.ort" and target.read_bytes()[4:8] == b"ORTM"
    for one, other in zip(probe(toy, SIZES), probe(target, SIZES), strict=True):
        assert np.array_equal(one, other) and np.abs(one).max() > 0


def test_a_file_that_answers_otherwise_is_refused(toy, tmp_path, monkeypatch):
    write_onnx(ToyModel(1), tmp_path / "other.onnx")
    monkeypatch.setattr(ort_format, "save", lambda graph, path, level: save(Graph(tmp_path / "other.onnx"), path, level))
    with pytest.raises(GateError, match="model.ort: its outputs differ by up to"):
        write_ort(toy, SIZES)


def saved_as_runtime_style(model, target):
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    options.optimized_model_filepath = str(target)
    options.add_session_config_entry("session.save_model_format", "ORT")
    options.add_session_config_entry("optimization.minimal_build_optimizations", "save")
    onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def test_runtime_style_is_refused_and_fixed_style_is_not(int8, tmp_path):
    save(Graph(int8), tmp_path / "fixed.ort", ort_format.LEVELS["optimised"])
    check_fixed_style(tmp_path / "fixed.ort")
    saved_as_runtime_style(int8, tmp_path / "runtime.ort")
    with pytest.raises(GateError, match="runtime.ort: .*Runtime style.*use Fixed"):
        check_fixed_style(tmp_path / "runtime.ort")


def test_int8_weights_that_were_not_fused_are_refused_whatever_the_notes_say(int8, tmp_path):
    save(Graph(int8), tmp_path / "plain.ort", ort_format.LEVELS["plain"])
    with pytest.raises(GateError, match="plain.ort: weight is dequantised in every call"):
        check_fixed_style(tmp_path / "plain.ort")


def test_another_format_is_refused(toy):
    with pytest.raises(GateError, match="model.onnx: not in ORT format"):
        check_fixed_style(toy)
