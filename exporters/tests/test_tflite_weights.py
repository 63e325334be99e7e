"""Dynamic and weight-only int8 TFLite on tiny random models: what is stored, what it computes, where it is claimed to be right."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema
from ai_edge_quantizer import qtyping

from conftest import VOCABULARY
from exporters import tflite_dynamic_int8, tflite_export, tflite_weight_only_int8
from exporters.settings import TfliteDynamicInt8Settings, TfliteSettings, TfliteWeightOnlyInt8Settings
from exporters.tflite_edit import WEIGHT, add_constant, is_linear, set_weight, weight_of, weight_users
from exporters.tflite_parity import agreement
from exporters.tflite_replay import Replay, replay_all
from exporters.tflite_structure import operators, read_model, write_model
from exporters.tflite_weight_coverage import check_weights
from exporters.tflite_weights import Kind, compare, quantise, quantised_bytes
from models.errors import GateError

DYNAMIC, WEIGHT_ONLY = tflite_dynamic_int8.KIND, tflite_weight_only_int8.KIND
KINDS = pytest.mark.parametrize("kind", [DYNAMIC, WEIGHT_ONLY], ids=lambda kind: kind.name)


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tflite_weights_text")
    for seed, name in enumerate(("calibration", "validation")):
        np.save(folder / f"{name}.npy", np.random.default_rng(seed).integers(0, VOCABULARY, (4, 40)).astype(np.int32))
    return folder


@pytest.fixture(scope="module", params=["llama", "qwen3", "gpt2"])
def float_folder(request, tmp_path_factory, text_folder, checkpoints) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(f"tflite_weights_{request.param}")
    tflite_export.run(TfliteSettings(prefill_tokens=12, context_tokens=48), folder, model=checkpoints[request.param], text=text_folder)
    return folder


@pytest.fixture(scope="module")
def int8_folder(float_folder, text_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tflite_weights_int8")
    tflite_dynamic_int8.run(TfliteDynamicInt8Settings(), folder, tflite=float_folder, text=text_folder)
    tflite_weight_only_int8.run(TfliteWeightOnlyInt8Settings(), folder, tflite=float_folder, text=text_folder)
    return folder


@pytest.fixture(scope="module")
def rounded(float_folder, tmp_path_factory) -> Path:
    """The float file with every weight rounded to 127 steps of its row's largest magnitude, row by row: the naive reference."""
    graph = read_model(float_folder / "tflite_fp32.tflite")
    for users in weight_users(graph).values():
        weight = weight_of(graph, users[0]).copy()
        for row in weight:
            step = max(abs(float(row.min())), abs(float(row.max()))) / 127
            row[:] = np.round(row / step) * step
        set_weight(graph, users[0], weight)
    path = tmp_path_factory.mktemp("rounded") / "rounded.tflite"
    write_model(graph, path)
    return path


def run_litert(path: Path) -> np.ndarray:
    tokens = np.random.default_rng(7).integers(0, VOCABULARY, (3, 34)).astype(np.int32)
    return replay_all(Replay(litert.Interpreter(str(path), num_threads=1)), tokens, np.array([20, 12, 5], np.int32))


def bytes_of(path: Path, graph, buffer: int) -> np.ndarray:
    """A buffer's bytes, in the flatbuffer or behind it."""
    stored = graph.buffers[buffer]
    return (
        stored.data if stored.data is not None else np.frombuffer(path.read_bytes(), np.uint8)[stored.offset : stored.offset + stored.size]
    )


@KINDS
def test_sidecar_tells_what_is_int8_and_where_it_is_right(int8_folder, float_folder, kind):
    sidecar = json.loads((int8_folder / f"{kind.name}.json").read_text())
    measured, coverage = sidecar["measured"], sidecar["measured"]["coverage"]
    assert sidecar["runtimes"] == ["litert", "tflite"] and measured["left_out"] == {}
    assert coverage["linear_layers"] == coverage["int8_linear_layers"] > 8 and coverage["embedding_int8"]
    for runtime in sidecar["runtimes"]:
        found = measured["agreement_with_parent"][runtime]
        assert found["top1"] > 0.8 and 0 < found["kl"] < 0.02  # random weights: flat logits, so the first place is often close
        assert 0 < abs(found["perplexity_change"]) < 0.05 and 0 < found["perplexity_change_error"] < 0.05
    graph = read_model(float_folder / "tflite_fp32.tflite")
    weights = [weight_of(graph, users[0]) for users in weight_users(graph).values()]
    assert coverage["weights"] == sum(weight.size for weight in weights)
    assert coverage["scales"] == (sum(len(weight) for weight in weights) if kind.dequantised else len(weights))


@KINDS
def test_stored_weights_are_within_half_a_step(int8_folder, float_folder, kind):
    path, parent = int8_folder / f"{kind.name}.tflite", read_model(float_folder / "tflite_fp32.tflite")
    graph = read_model(path)
    originals = [weight_of(parent, users[0]) for users in weight_users(parent).values()]
    unmatched = {tensor.buffer: tensor for tensor in graph.subgraphs[0].tensors if tensor.type == schema.TensorType.INT8}
    assert len(unmatched) == len(originals)  # a tied table once
    for original in originals:
        largest = np.abs(original).max(1, keepdims=True)
        for buffer, tensor in unmatched.items():
            numbers = bytes_of(path, graph, buffer).view(np.int8).astype(np.float64)
            if numbers.size != original.size or tuple(tensor.shape) != original.shape:
                continue
            scale = np.asarray(tensor.quantization.scale)[:, None] * (1 if kind.dequantised else largest)  # the rest is a MUL
            if np.abs(numbers.reshape(original.shape) * scale - original).max() <= (scale / 2).max() * 1.001:
                del unmatched[buffer]
                break
    assert not unmatched


def test_weight_only_computes_with_rounded_weights_and_nothing_else(int8_folder, rounded):
    np.testing.assert_allclose(run_litert(int8_folder / f"{WEIGHT_ONLY.name}.tflite"), run_litert(rounded), atol=2e-4)


def test_dynamic_is_near_the_rounded_weights(int8_folder, rounded):
    """Only the rounding of activations is between them; more than with scales for whole tensors would be an error."""
    found = agreement(run_litert(int8_folder / f"{DYNAMIC.name}.tflite"), run_litert(rounded))
    assert found.top1 > 0.8 and 0 < found.kl < 0.02


def test_same_bytes_twice(int8_folder, float_folder, text_folder, tmp_path):
    tflite_dynamic_int8.run(TfliteDynamicInt8Settings(), tmp_path, tflite=float_folder, text=text_folder)
    for suffix in ("tflite", "json"):
        assert (tmp_path / f"{DYNAMIC.name}.{suffix}").read_bytes() == (int8_folder / f"{DYNAMIC.name}.{suffix}").read_bytes()


@KINDS
def test_zeroed_weights_are_caught(int8_folder, float_folder, text_folder, tmp_path, kind):
    source, broken = int8_folder / f"{kind.name}.tflite", tmp_path / "broken.tflite"
    content, graph = bytearray(source.read_bytes()), read_model(source)
    for buffer in {tensor.buffer for tensor in graph.subgraphs[0].tensors if tensor.type == schema.TensorType.INT8}:
        stored = bytes_of(source, graph, buffer).tobytes()
        at = content.find(stored)
        content[at : at + len(stored)] = bytes(len(stored))
    broken.write_bytes(content)
    interface = json.loads((float_folder / "tflite_fp32.json").read_text())["interface"]
    with pytest.raises(GateError, match="ai_edge_litert.*all zero.*tflite_runtime.*all zero"):
        compare(broken, float_folder / "tflite_fp32.tflite", np.load(text_folder / "validation.npy"), interface)


def test_a_runtime_that_returns_zeros_is_left_out(float_folder, text_folder, tmp_path):
    """Scales per channel: right in LiteRT, all zeros in tflite-runtime 2.14, which says nothing."""
    parent, path = float_folder / "tflite_fp32.tflite", tmp_path / "channels.tflite"
    path.write_bytes(quantised_bytes(parent, DYNAMIC, qtyping.QuantGranularity.CHANNELWISE))
    interface = json.loads((float_folder / "tflite_fp32.json").read_text())["interface"]
    compared = compare(path, parent, np.load(text_folder / "validation.npy"), interface)
    assert compared.runtimes == ("litert",) and compared.agreement.keys() == {"litert"}
    assert "all zero" in compared.left_out["tflite"]
    with pytest.raises(GateError, match="scales; tflite-runtime 2.14 returns zeros"):
        check_weights(operators(read_model(path)), operators(read_model(parent)), path.stem, dequantised=False)


def test_wrong_files_are_named(int8_folder, float_folder, tmp_path):
    parent = float_folder / "tflite_fp32.tflite"
    expected = operators(read_model(parent))

    def check(path: Path, kind: Kind) -> None:
        check_weights(operators(read_model(path)), expected, "file", kind.dequantised)

    with pytest.raises(GateError, match="float32 weight, not a stored int8 one"):
        check(parent, DYNAMIC)
    with pytest.raises(GateError, match="without DEQUANTIZE"):
        check(int8_folder / f"{DYNAMIC.name}.tflite", WEIGHT_ONLY)
    with pytest.raises(GateError, match="computes in float"):
        check(int8_folder / f"{WEIGHT_ONLY.name}.tflite", DYNAMIC)
    graph = read_model(parent)
    subgraph, lookup = next(user for user in max(weight_users(graph).values(), key=len) if not is_linear(graph, user))
    subgraph.tensors[lookup.inputs[WEIGHT]] = table = copy.copy(subgraph.tensors[lookup.inputs[WEIGHT]])
    table.buffer = add_constant(graph, graph.buffers[table.buffer].data.view(np.float32))
    write_model(graph, tmp_path / "twice.tflite")
    quantise(WEIGHT_ONLY, tmp_path / "twice.tflite", tmp_path / "duplicated.tflite")
    with pytest.raises(GateError, match="duplicated"):
        check(tmp_path / "duplicated.tflite", WEIGHT_ONLY)


def test_tied_tables_have_two_kinds_of_users(float_folder):
    """What the checks of duplicates rest on: one buffer is read by the lookup and by the head, in both signatures."""
    graph = read_model(float_folder / "tflite_fp32.tflite")
    users = max(weight_users(graph).values(), key=len)
    assert {is_linear(graph, user) for user in users} == {True, False} and len(users) == 4
