"""Weight-only ONNX in 8 and 4 bits: the format, the roundings, and what ONNX Runtime makes of the file."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from conftest import VOCABULARY
from exporters import onnx_weight_only, onnx_weight_only_int4, onnx_weight_only_int8
from exporters.artifact import sha256_of
from exporters.onnx_calibration import Feeds
from exporters.onnx_files import ONE_FILE_BYTES, save_one_file
from exporters.onnx_qdq import linear_layers
from exporters.onnx_rounding import gram_matrices
from exporters.onnx_session import empty_past, open_session, run_tokens
from exporters.onnx_structure import require_blocks, structure_of
from exporters.settings import OnnxWeightOnlyInt4Settings, OnnxWeightOnlyInt8Settings
from exporters.tests.conftest import CASES, WINDOW
from exporters.weight_blocks import (
    Layout,
    covering_grid,
    importance_of,
    packed,
    quantise_compensated,
    quantise_matrix,
    searched_grid,
)
from models.errors import GateError, UserError

LINEAR_PER_LAYER = {"llama": 5, "qwen3": 5, "gpt2": 4}  # packed q, k and v are one; the head comes on top
LAYOUTS = [Layout(8, 32, True), Layout(8, 16, False), Layout(4, 16, False), Layout(4, 32, True)]


VARIANTS = {
    "8": (onnx_weight_only_int8, OnnxWeightOnlyInt8Settings(block=32)),
    "8 padded": (onnx_weight_only_int8, OnnxWeightOnlyInt8Settings(block=128)),  # 64 inputs: half of each block is filled up
    "4": (onnx_weight_only_int4, OnnxWeightOnlyInt4Settings(block=16)),
    "4 all": (onnx_weight_only_int4, OnnxWeightOnlyInt4Settings(embedding_bits=4, rounding="searched")),
}


@pytest.fixture(scope="module")
def quantised(exports, text, tmp_path_factory):
    """The sidecar's folder by case and variant, made when first asked for."""
    made = {}

    def get(case, variant):
        if (case, variant) not in made:
            module, settings = VARIANTS[variant]
            made[case, variant] = tmp_path_factory.mktemp("nbits")
            module.run(settings, made[case, variant], onnx=exports[case], text=text)
        return made[case, variant]

    return get


def file_of(folder):
    return next(folder.glob("*.onnx"))


def unpacked(array, bits, count):
    """The numbers in ``array`` uint8 ``[..., bytes]``, one by one: 4-bit ones low half first."""
    if bits == 8:
        return array[..., :count].astype(int)
    numbers = np.empty((*array.shape[:-1], 2 * array.shape[-1]), int)
    for row in np.ndindex(array.shape):
        low, high = int(array[row]) % 16, int(array[row]) // 16
        numbers[(*row[:-1], 2 * row[-1])], numbers[(*row[:-1], 2 * row[-1] + 1)] = low, high
    return numbers[..., :count]


def written_matrix(tensors, node):
    """The matrix ``[in, out]`` that the MatMulNBits ``node`` stands for, number by number as the operator's text says."""
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    bits, block, inputs, outputs = (sizes[key] for key in ("bits", "block_size", "K", "N"))
    codes, scales = tensors[node.input[1]], tensors[node.input[2]]
    blocks = -(-inputs // block)
    assert codes.dtype == np.uint8 and codes.shape == (outputs, blocks, block * bits // 8) and scales.shape == (outputs, blocks)
    middle = np.full((outputs, blocks), 2 ** (bits - 1))
    zeros = unpacked(tensors[node.input[3]], bits, blocks) if len(node.input) > 3 else middle
    numbers = unpacked(codes, bits, block)
    matrix = np.empty((inputs, outputs), np.float32)
    for i in range(inputs):
        at = i // block
        matrix[i] = (numbers[:, at, i % block] - zeros[:, at]) * scales[:, at]
    return matrix


def written_matrices(path):
    graph = onnx.load(path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    return {node.name: written_matrix(tensors, node) for node in graph.node if node.op_type == "MatMulNBits"}


def floats_of(folder):
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(folder / "onnx_fp32.onnx").graph.initializer}


def logits_of(path, tokens):
    """Of a prompt, and of the steps after it, one at a time."""
    session = open_session(path)
    prompt, past = run_tokens(session, tokens[:, :30], empty_past(session, 1))
    steps = []
    for position in range(30, tokens.shape[1]):
        logits, past = run_tokens(session, tokens[:, position : position + 1], past)
        steps.append(logits)
    return np.concatenate([prompt, *steps], axis=1)[0]


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_every_matrix_is_in_blocks_and_the_sidecar_says_what_was_found(case, variant, quantised, exports):
    out = quantised(case, variant)
    sidecar = json.loads(next(out.glob("*.json")).read_text())
    measured = sidecar["measured"]
    assert measured["linear_layers"] == 2 * LINEAR_PER_LAYER[case[0]] + 1
    assert not measured["embedding_float"]
    assert [entry["name"] for entry in measured["not_int8"]] == (["transformer.wpe.weight"] if case[0] == "gpt2" else [])
    assert len(measured["tables_shared_with_the_head"]) == (1 if case[1] else 0)
    assert sidecar["sha256"] == sha256_of(out / sidecar["file"])
    assert sidecar["parent"] == sha256_of(exports[case] / "onnx_fp32.onnx")
    structure = structure_of(out / sidecar["file"])
    assert len(structure.block_linear) == measured["linear_layers"]
    assert structure.float_linear == structure.float_embeddings == structure.dequantised_weights == ()


@pytest.mark.parametrize(("variant", "expected"), [("8", 8 + 32 / 32), ("8 padded", None), ("4", None), ("4 all", 4 + 32 / 32 + 4 / 32)])
def test_bits_per_weight_are_those_of_the_bytes_in_the_file(variant, expected, quantised):
    out = quantised(("llama", True), variant)
    measured = json.loads(next(out.glob("*.json")).read_text())["measured"]
    graph = onnx.load(file_of(out)).graph
    held, numbers = 0, 0
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "MatMulNBits":
            held += sum(tensors[name].nbytes for name in node.input[1:])
            numbers += written_matrix(tensors, node).size
    assert measured["bits_per_weight"] == pytest.approx(8 * held / numbers)
    if expected:
        assert measured["bits_per_weight"] == pytest.approx(expected)


def test_a_tied_table_is_stored_once_and_both_operators_read_it(quantised):
    for variant in VARIANTS:
        out = quantised(("llama", True), variant)
        graph = onnx.load(file_of(out)).graph
        tables = [tensor for tensor in graph.initializer if tensor.dims and tensor.dims[0] == VOCABULARY and tensor.name.endswith("codes")]
        assert len(tables) == 1
        assert {node.op_type for node in graph.node if tables[0].name in node.input} == {"MatMulNBits", "GatherBlockQuantized"}
        (shared,) = json.loads(next(out.glob("*.json")).read_text())["measured"]["tables_shared_with_the_head"]
        twice = [tensor for tensor in graph.initializer if tensor.name.endswith("lookup_zeros")]
        assert shared["bytes_twice"] == sum(len(tensor.raw_data) for tensor in twice)
        assert bool(twice) == (variant == "4 all")
    untied = onnx.load(file_of(quantised(("llama", False), "4"))).graph.initializer
    assert sum(1 for tensor in untied if tensor.dims and tensor.dims[0] == VOCABULARY and tensor.name.endswith("codes")) == 2


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_nearest_errs_by_half_a_step_at_most(layout):
    weight = np.random.default_rng(0).normal(size=(72, 24)).astype(np.float32)
    weight[:, 3] = 0
    weight[16:32, 4] = 0.7  # a block of one sign
    blocks = quantise_matrix(weight, layout, covering_grid)
    steps = np.repeat(blocks.scales, layout.block, axis=1)[:, :72]
    assert (np.abs(blocks.values() - weight.T) <= steps / 2 * (1 + 1e-5)).all()
    assert (blocks.values()[3] == 0).all()
    assert blocks.codes.max() <= 2**layout.bits - 1


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_searched_blocks_err_no_more_than_nearest_and_mostly_less(layout):
    draws = np.random.default_rng(1)
    weight = (draws.standard_t(3, size=(128, 48)) * 0.1).astype(np.float32)
    importance = draws.uniform(0.1, 3, size=128)
    errors = []
    for fit in (covering_grid, searched_grid):
        square = importance * np.square(quantise_matrix(weight, layout, fit, importance).values() - weight.T)  # [out, in]
        errors.append(square.reshape(48, -1, layout.block).sum(-1))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all()
    assert errors[1].sum() < errors[0].sum() * 0.95


def test_search_finds_what_trying_every_scale_and_zero_finds():
    """Against a reference that tries 400 scales with each of the 16 zeros."""
    draws = np.random.default_rng(2)
    weight, importance = draws.normal(size=(16, 20)), draws.uniform(0.5, 2, size=16)
    found = quantise_matrix(weight.astype(np.float32), Layout(4, 16, False), searched_grid, importance).values().T
    got = importance @ np.square(found - weight)
    for column in range(20):
        least, span = np.inf, np.ptp(np.append(weight[:, column], 0))
        for zero in range(16):
            for scale in np.linspace(0.3, 1.6, 400) * span / 15:
                rounded = (np.clip(np.rint(weight[:, column] / scale) + zero, 0, 15) - zero) * scale
                least = min(least, importance @ np.square(rounded - weight[:, column]))
        assert got[column] <= least * 1.1


def test_compensated_blocks_lower_the_error_of_the_outputs():
    draws = np.random.default_rng(0)
    inputs = (draws.normal(size=(500, 16)) @ draws.normal(size=(16, 72)) + draws.normal(size=(500, 72)) * 0.2).astype(np.float32)
    weight = draws.normal(size=(72, 32)).astype(np.float32)
    gram, layout = inputs.T @ inputs, Layout(4, 32, False)
    made = [quantise_matrix(weight, layout, searched_grid, importance_of(gram)), quantise_compensated(weight, layout, searched_grid, gram)]
    errors = [np.square(inputs @ (blocks.values().T - weight)).mean() for blocks in made]
    assert errors[1] < errors[0] / 2


def test_compensation_lowers_the_error_of_the_layers_outputs_in_the_file(exports, text, tmp_path):
    parent = onnx.load(exports["llama", False] / "onnx_fp32.onnx")
    layers, originals = linear_layers(parent), floats_of(exports["llama", False])
    weights = {node.name: node.input[1] for node in parent.graph.node if node.name in layers}
    grams = gram_matrices(parent, list(dict.fromkeys(layers.values())), Feeds(np.load(text / "calibration.npy"), 0))
    errors = {}
    for rounding in ("nearest", "compensated"):
        (tmp_path / rounding).mkdir()
        settings = OnnxWeightOnlyInt4Settings(rounding=rounding, windows=6)
        onnx_weight_only_int4.run(settings, tmp_path / rounding, onnx=exports["llama", False], text=text)
        for name, matrix in written_matrices(file_of(tmp_path / rounding)).items():
            apart = matrix.astype(np.float64) - originals[weights[name]]
            errors[rounding, name] = np.einsum("io,ij,jo->", apart, grams[layers[name]], apart)
    assert all(errors["compensated", name] < errors["nearest", name] for name in layers)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_a_float_graph_with_the_written_weights(case, variant, quantised, exports, tmp_path):
    """The float graph gets, number by number, what stands in the file; apart are only the activations inside the products."""
    path, model = file_of(quantised(case, variant)), onnx.load(exports[case] / "onnx_fp32.onnx")
    matrices, layers = written_matrices(path), linear_layers(model)
    weights = {node.input[1]: matrices[node.name] for node in model.graph.node if node.name in layers}
    if not case[1]:
        weights["model.embed_tokens.weight"] = written_table(path, "model.embed_tokens.weight", 64)
    for tensor in model.graph.initializer:
        if tensor.name in weights:
            tensor.CopyFrom(numpy_helper.from_array(weights.pop(tensor.name), tensor.name))
    assert not weights
    onnx.save(model, tmp_path / "float.onnx")
    tokens = np.random.default_rng(7).integers(0, VOCABULARY, (1, WINDOW))
    expected = logits_of(tmp_path / "float.onnx", tokens)
    exact = onnx.load(path)  # the same file with the products in float
    for node in exact.graph.node:
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    onnx.save(exact, tmp_path / "exact.onnx")
    np.testing.assert_allclose(logits_of(tmp_path / "exact.onnx", tokens), expected, atol=2e-4 * np.abs(expected).max())
    noise = np.square(logits_of(path, tokens) - expected).mean() / np.square(expected).mean()
    assert noise < 2e-3


def written_table(path, name, hidden):
    """The embedding ``[vocab, hidden]`` that GatherBlockQuantized reads under ``name``."""
    graph = onnx.load(path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    node = next(node for node in graph.node if f"{name}.codes" in node.input)
    sizes = {attribute.name: attribute.i for attribute in node.attribute}
    numbers = unpacked(tensors[f"{name}.codes"], sizes["bits"], sizes["block_size"])  # [vocab, blocks, block]
    zeros = tensors.get(f"{name}.lookup_zeros", np.uint8(2 ** (sizes["bits"] - 1))).astype(int)
    return ((numbers - zeros) * tensors[f"{name}.scales"][..., None]).reshape(len(numbers), -1)[:, :hidden].astype(np.float32)


def test_a_float_matrix_left_in_the_graph_fails_the_gate(exports, tmp_path, monkeypatch):
    model = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    matrices = {
        name: quantise_matrix(weight, Layout(4, 32, False), covering_grid)
        for name, weight in floats_of(exports["llama", True]).items()
        if weight.ndim == 2 and not name.endswith("_cache")
    }
    head = next(name for name in matrices if "lm_head" in name)
    kept = {name: blocks for name, blocks in matrices.items() if name != head}
    replaced = {layer: value for layer, value in linear_layers(model).items() if layer != "lm_head"}
    with monkeypatch.context() as patch:
        patch.setattr(onnx_weight_only, "linear_layers", lambda _: replaced)
        onnx_weight_only.insert(model, kept)
    onnx.save(model, tmp_path / "model.onnx")
    structure = structure_of(tmp_path / "model.onnx")
    assert structure.float_linear == ("lm_head",)
    with pytest.raises(GateError, match="x: 1 float products with a constant matrix.*first: lm_head"):
        require_blocks(structure, 11, "x")


def test_a_float_embedding_and_a_missing_layer_fail_the_gate(quantised, exports, tmp_path):
    path = file_of(quantised(("llama", False), "4"))
    with pytest.raises(GateError, match="x: 11 weight-only linear layers, expected 12"):
        require_blocks(structure_of(path), 12, "x")
    model, source = onnx.load(path), onnx.load(exports["llama", False] / "onnx_fp32.onnx")
    table = "model.embed_tokens.weight"
    gather = next(node for node in source.graph.node if table in node.input)
    first = next(node for node in model.graph.node if node.op_type == "GatherBlockQuantized")
    last = next(node for node in model.graph.node if gather.output[0] in node.output)
    nodes = list(model.graph.node)
    lookup = nodes[nodes.index(first) : nodes.index(last) + 1]
    for node in lookup:
        model.graph.node.remove(node)
    model.graph.node.insert(nodes.index(first), gather)
    model.graph.initializer.append(next(tensor for tensor in source.graph.initializer if tensor.name == table))
    onnx.save(model, tmp_path / "model.onnx")
    with pytest.raises(GateError, match="x: 1 embedding tables in float.*embed_tokens"):
        require_blocks(structure_of(tmp_path / "model.onnx"), 11, "x")


def test_two_runs_are_byte_identical(quantised, exports, text, tmp_path):
    module, settings = VARIANTS["4"]
    module.run(settings, tmp_path, onnx=exports["gpt2", True], text=text)
    for path in quantised(("gpt2", True), "4").iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_packing_puts_the_low_half_first():
    np.testing.assert_array_equal(packed(np.array([[1, 2, 15]], np.uint8), 4), [[0x21, 0x0F]])
    np.testing.assert_array_equal(packed(np.array([[1, 2, 15]], np.uint8), 8), [[1, 2, 15]])


def test_what_does_not_fit_in_one_file_is_the_user_s_mistake(tmp_path):
    class Large:
        def ByteSize(self):
            return ONE_FILE_BYTES + 200_000_000

    with pytest.raises(UserError, match="x: 2.0 GB do not fit in one ONNX file"):
        save_one_file(Large(), tmp_path / "x.onnx", "x")
