"""Weight-only quantisation of the fp32 graph: every matrix in blocks of few bits, activations come and go in fp32.

A linear layer becomes MatMulNBits, the embedding GatherBlockQuantized. A table that is embedding and head at once is stored once:
both operators read the same bytes, ``[vocab, blocks, block]`` with the hidden size cut into blocks, the second one as a table of
three dimensions. Only zeros of 4-bit tables lie there twice, because the two pack them differently.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx as onnx_format
from onnx import helper, numpy_helper

from exporters.artifact import read_sidecar, write_sidecar
from exporters.onnx_agreement import COMPARED_WINDOWS, compare
from exporters.onnx_files import compact, save_one_file
from exporters.onnx_qdq import drop_unused_initializers, linear_layers
from exporters.onnx_rounding import weight_grams
from exporters.onnx_structure import Structure, is_token_gather, require_blocks, structure_of
from exporters.settings import OnnxWeightOnlySettings
from exporters.weight_blocks import (
    Blocks,
    Layout,
    covering_grid,
    importance_of,
    packed,
    quantise_compensated,
    quantise_matrix,
    searched_grid,
)

PARENT = "onnx_fp32"
LIBRARIES = ("onnx", "onnxruntime", "numpy", "scipy")
MICROSOFT = "com.microsoft"
# Inside the product activations become int8, block by block. On the demo model that costs 0.0004 nats of KL; without it the
# 8-bit product is taken apart to float at every step, and decodes 24 times slower (4 bits: 6 times).
ACCURACY_LEVEL = 4


@dataclass(frozen=True)
class Variant:
    """What is made. ``embedding`` is the layout of the embedding, and of the head where the two are one table."""

    name: str
    linear: Layout
    embedding: Layout
    settings: OnnxWeightOnlySettings


def write_artifact(variant: Variant, out: Path, onnx: Path, text: Path) -> None:
    """Write the graph and its sidecar. GateError unless every linear layer and the embedding run from blocks."""
    parent = read_sidecar(onnx / f"{PARENT}.json")
    source, path = onnx / parent["file"], out / f"{variant.name}.onnx"
    model = onnx_format.load(source)
    layers = linear_layers(model)
    matrices = quantised_matrices(model, variant, np.load(text / "calibration.npy")[: variant.settings.windows])
    shared = insert(model, matrices)
    model = compact(model)
    save_one_file(model, path, variant.name)
    del model
    structure = structure_of(path)
    require_blocks(structure, len(layers), variant.name)
    agreement = compare(source, path, np.load(text / "validation.npy")[:COMPARED_WINDOWS], variant.name)
    write_sidecar(
        out,
        variant.name,
        "onnx",
        files=[path],
        interface=parent["interface"],
        tensors=parent["tensors"],
        parent=parent["sha256"],
        settings=variant.settings,
        measured={**describe(structure, matrices, shared), "against_fp32": asdict(agreement)},
        libraries=LIBRARIES,
    )


def quantised_matrices(model: onnx_format.ModelProto, variant: Variant, windows: np.ndarray) -> dict[str, Blocks]:
    """The matrix of every linear layer and every embedding, by the name of its initializer; the model is left as it was."""
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    tables = token_tables(model.graph)
    layers = linear_layers(model)
    linear = dict.fromkeys(node.input[1] for node in model.graph.node if node.name in layers)
    rounding, made = variant.settings.rounding, {}
    if rounding != "nearest":
        for name, gram in weight_grams(model, layers, windows):
            layout, weight = variant.embedding if name in tables else variant.linear, numpy_helper.to_array(tensors[name])
            if rounding == "compensated":
                made[name] = quantise_compensated(weight, layout, searched_grid, gram)
            else:
                made[name] = quantise_matrix(weight, layout, searched_grid, importance_of(gram))
    fit = covering_grid if rounding == "nearest" else searched_grid
    for name in (linear | tables).keys() - made.keys():
        made[name] = quantise_matrix(
            by_input(tensors[name], tables.get(name, 1)), variant.embedding if name in tables else variant.linear, fit
        )
    return {name: made[name] for name in linear | tables}


def by_input(tensor: onnx_format.TensorProto, token_axis: int) -> np.ndarray:
    """A matrix as ``[in, out]``; of a table that lies by tokens, which are its outputs, the other way round."""
    weight = numpy_helper.to_array(tensor)
    return weight if token_axis else weight.T


def token_tables(graph: onnx_format.GraphProto) -> dict[str, int]:
    """The tables that token ids look up, with the axis along which tokens lie."""
    constants = {tensor.name for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    gathers = [node for node in graph.node if is_token_gather(node, producers) and node.input[0] in constants]
    return {node.input[0]: _axis(node) for node in gathers}


def insert(model: onnx_format.ModelProto, matrices: dict[str, Blocks]) -> dict[str, int]:
    """Put ``matrices`` in place of the float ones. Bytes stored twice, by the name of each table that a head reads too."""
    graph, tables, layers = model.graph, token_tables(model.graph), linear_layers(model)
    readers = {node.input[1] for node in graph.node if node.name in layers}
    producers = {output: node for node in graph.node for output in node.output}
    for name, blocks in matrices.items():
        graph.initializer.extend(_tensors(name, blocks, name in readers, name in tables))
    for node in list(graph.node):
        if node.name in layers and node.input[1] in matrices:
            _replace(graph, [node], [_product(node, matrices[node.input[1]])])
        elif is_token_gather(node, producers) and node.input[0] in matrices:
            turned = [user for user in graph.node if node.output[0] in user.input] if _axis(node) == 1 else []
            _replace(graph, [node, *turned], _lookup(graph, node, [node, *turned][-1].output[0], matrices[node.input[0]]))
    drop_unused_initializers(graph)
    if all(entry.domain != MICROSOFT for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    return {name: 0 if matrices[name].layout.symmetric else matrices[name].zeros.size for name in tables.keys() & readers & matrices.keys()}


def describe(structure: Structure, matrices: dict[str, Blocks], shared: dict[str, int]) -> dict:
    """Coverage as found on the optimised graph, and bits per weight: all bytes of the matrices over their numbers."""
    return {
        "linear_layers": len(structure.block_linear),
        "bits_per_weight": bits_per_weight(list(matrices.values())),
        "matrices": [
            {"name": name, "bits": blocks.layout.bits, "block": blocks.layout.block, "bits_per_weight": bits_per_weight([blocks])}
            for name, blocks in matrices.items()
        ],
        "embedding_float": bool(structure.float_embeddings),
        "tables_shared_with_the_head": [{"name": name, "bytes_twice": twice} for name, twice in shared.items()],
        "accuracy_level": ACCURACY_LEVEL,
        "not_int8": [{"name": name, "why": "position table: looked up, not multiplied"} for name in structure.float_tables],
    }


def stored(blocks: Blocks) -> dict[str, np.ndarray]:
    """The arrays of one matrix as MatMulNBits wants them. Zeros only where they are not always the middle code."""
    arrays = {"codes": packed(blocks.codes, blocks.layout.bits), "scales": blocks.scales}
    return arrays if blocks.layout.symmetric else arrays | {"zeros": packed(blocks.zeros, blocks.layout.bits)}


def bits_per_weight(matrices: list[Blocks]) -> float:
    """All stored bits of the matrices over their numbers."""
    held = sum(array.nbytes for blocks in matrices for array in stored(blocks).values())
    return 8 * held / sum(blocks.inputs * len(blocks.codes) for blocks in matrices)


def _tensors(name: str, blocks: Blocks, multiplied: bool, looked_up: bool) -> list[onnx_format.TensorProto]:
    arrays = stored(blocks)
    if looked_up and not blocks.layout.symmetric:  # a byte for each, where MatMulNBits packs two 4-bit zeros of a row
        arrays["lookup_zeros"] = blocks.zeros[..., None]
    if not multiplied:
        arrays.pop("zeros", None)
    return [numpy_helper.from_array(array, f"{name}.{part}") for part, array in arrays.items()]


def _product(node: onnx_format.NodeProto, blocks: Blocks) -> onnx_format.NodeProto:
    """MatMulNBits in place of the MatMul ``node``, under its name."""
    weight, layout = node.input[1], blocks.layout
    inputs = [node.input[0], *(f"{weight}.{part}" for part in stored(blocks))]
    sizes = {"K": blocks.inputs, "N": len(blocks.codes), "bits": layout.bits, "block_size": layout.block}
    return helper.make_node("MatMulNBits", inputs, [node.output[0]], node.name, domain=MICROSOFT, accuracy_level=ACCURACY_LEVEL, **sizes)


def _lookup(graph: onnx_format.GraphProto, gather: onnx_format.NodeProto, output: str, blocks: Blocks) -> list[onnx_format.NodeProto]:
    """Nodes that give ``output`` ``[batch, seq, hidden]`` for the token ids of ``gather``."""
    table, stem, layout = gather.input[0], gather.name, blocks.layout
    shapes = {"last_axis": [-1], "hidden": [0, 0, -1], "start": [0], "end": [blocks.inputs]}
    graph.initializer.extend(numpy_helper.from_array(np.array(value, np.int64), f"{stem}.{key}") for key, value in shapes.items())
    inputs = [f"{table}.codes", gather.input[1], f"{stem}.scales"]
    if not layout.symmetric:
        inputs.append(f"{table}.lookup_zeros")
    sizes = {"bits": layout.bits, "block_size": layout.block, "gather_axis": 0, "quantize_axis": 2}
    nodes = [
        helper.make_node("Unsqueeze", [f"{table}.scales", f"{stem}.last_axis"], [f"{stem}.scales"], f"{stem}_scales"),
        helper.make_node("GatherBlockQuantized", inputs, [f"{stem}.blocks"], f"{stem}_blocks", domain=MICROSOFT, **sizes),
    ]
    padding = blocks.codes[0].size - blocks.inputs
    rows = f"{stem}.padded" if padding else output
    nodes.append(helper.make_node("Reshape", [f"{stem}.blocks", f"{stem}.hidden"], [rows], f"{stem}_rows"))
    if padding:
        ends = [f"{stem}.start", f"{stem}.end", f"{stem}.last_axis"]
        nodes.append(helper.make_node("Slice", [rows, *ends], [output], f"{stem}_cut"))
    return nodes


def _replace(graph: onnx_format.GraphProto, old: list[onnx_format.NodeProto], new: list[onnx_format.NodeProto]) -> None:
    position = list(graph.node).index(old[0])
    for node in old:
        graph.node.remove(node)
    for offset, node in enumerate(new):
        graph.node.insert(position + offset, node)


def _axis(gather: onnx_format.NodeProto) -> int:
    return next((attribute.i for attribute in gather.attribute if attribute.name == "axis"), 0)
