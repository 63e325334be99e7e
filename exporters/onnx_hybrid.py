"""One model as two graphs over one file of weights: static int8 for prompts, few bits weight-only for single tokens.

A prompt is bound by arithmetic, which is fastest with int8 activations; a single token is bound by the bytes of the weights, which
MatMulNBits reads fastest. Both graphs have the same cache tensors, so one set of buffers serves both. The decode graph,
``<name>.onnx``, is whole by itself: any ONNX Runtime opens it and feeds it prompts too. The prompt graph, ``<name>.prompt.onnx``,
gives keys and values of all tokens and the logits of the last one alone, by the decode graph's own matrices
(`exporters.onnx_prompt_graph`).

The prompt graph holds no weights. Those that both graphs read as they are (the embedding, positions, rotary tables, the matrices
behind the last attention) it takes from the same file; its int8 matrices are the decode graph's numbers in another order, and the
host makes them when it loads: ``int8[in, out] = rint((code - zero) * scale / row_scale)`` transposed. The sidecar says where each
lies.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx as onnx_format
from onnx import TensorProto, numpy_helper

from exporters.artifact import read_sidecar, write_sidecar
from exporters.onnx_agreement import COMPARED_WINDOWS, compare_hybrid
from exporters.onnx_calibration import Feeds
from exporters.onnx_files import External, compact, refer, save_one_file, write_external
from exporters.onnx_int8 import calibration_windows, static_int8
from exporters.onnx_kv_cache import cache_bytes_per_token, described_tensors, kv_scales, store_as_int8
from exporters.onnx_prompt_graph import give_last_logits, keep_cache_only
from exporters.onnx_qdq import DEQUANTISED, linear_layers
from exporters.onnx_structure import Structure, require_blocks, require_count, require_no_float, structure_of
from exporters.onnx_weight_only import ACCURACY_LEVEL, Variant, bits_per_weight, by_input, insert, quantised_matrices, stored, token_tables
from exporters.settings import OnnxHybridInt4Settings, OnnxHybridInt8Settings, OnnxInt8Settings, StaticInt8Settings
from exporters.weight_blocks import Blocks, Layout, covering_grid, quantise_matrix
from models.errors import GateError

PARENT = "onnx_fp32"
LIBRARIES = ("onnx", "onnxruntime", "numpy", "scipy")
GIVEN_BY_THE_HOST = "given-by-the-host"  # no file of this name exists: a runtime that is not given the matrices does not open the graph
INT8_MAX = 127


@dataclass(frozen=True)
class Hybrid:
    """What is made. ``linear`` None: the decode graph has the very numbers of the static one, in blocks of ``settings.block``."""

    name: str
    settings: OnnxHybridInt8Settings | OnnxHybridInt4Settings
    linear: Layout | None
    embedding: Layout


@dataclass(frozen=True)
class Graphs:
    """Both graphs with everything in them, the matrices that they share by name, and how many layers have inputs of two steps."""

    decode: onnx_format.ModelProto
    prompt: onnx_format.ModelProto
    matrices: dict[str, Blocks]
    two_step: tuple[str, ...]
    last_token: tuple[str, ...]  # products of the prompt graph that see its last token alone
    cache_scales: dict[str, np.ndarray]  # of an int8 KV cache, by the past's name


def write_artifact(hybrid: Hybrid, out: Path, onnx: Path, text: Path) -> None:
    """Write both graphs, their weights and the sidecar. GateError unless every layer of both runs as it was chosen to."""
    parent = read_sidecar(onnx / f"{PARENT}.json")
    source = onnx / parent["file"]
    windows = calibration_windows(text, hybrid.settings, hybrid.name)
    model = onnx_format.load(source)
    graphs = both_graphs(hybrid, model, windows)
    layers = linear_layers(model)
    del model
    decode, prompt, data = (out / f"{hybrid.name}{suffix}" for suffix in (".onnx", ".prompt.onnx", ".data"))
    whole = prompt.with_suffix(".whole")  # with its matrices inside: what is checked, and not kept
    save_one_file(graphs.prompt, whole, hybrid.name)
    weights = take_weights_out(graphs, data)
    onnx_format.save(graphs.decode, decode)
    onnx_format.save(graphs.prompt, prompt)
    structure, prompt_structure = structure_of(decode), structure_of(whole)
    require_blocks(structure, len(layers), hybrid.name)
    require_prompt(prompt_structure, len(weights) + len(graphs.two_step), graphs.last_token, hybrid.name)
    agreement = compare_hybrid(source, decode, whole, np.load(text / "validation.npy")[:COMPARED_WINDOWS], hybrid.name)
    whole.unlink()
    tensors = described_tensors(parent["tensors"], graphs.cache_scales)
    write_sidecar(
        out,
        hybrid.name,
        "onnx",
        files=[decode, prompt, data],
        interface=parent["interface"],
        tensors=tensors,
        parent=parent["sha256"],
        settings=hybrid.settings,
        measured={
            "linear_layers": len(layers),
            "bits_per_weight": bits_per_weight(list(graphs.matrices.values())),
            "prompt_int8_linear_layers": len(weights),
            "prompt_last_token_layers": len(graphs.last_token),
            "two_step_layers": list(graphs.two_step),
            "accuracy_level": ACCURACY_LEVEL,
            "kv_cache_bytes_per_token": cache_bytes_per_token(tensors),
            "not_int8": [{"name": name, "why": "position table: looked up, not multiplied"} for name in structure.float_tables],
            "against_fp32": asdict(agreement),
        },
        libraries=LIBRARIES,
        prompt={"file": prompt.name, "data": data.name, "weights": weights},
    )


def static_settings(settings: OnnxHybridInt8Settings | OnnxHybridInt4Settings) -> OnnxInt8Settings:
    """The prompt graph's settings in the words of the static artifact."""
    shared = {name: getattr(settings, name) for name in StaticInt8Settings.model_fields}
    # where decoding has 4 bits, its numbers are put in place of whatever rounding gave
    rounding = settings.rounding if isinstance(settings, OnnxHybridInt8Settings) else "nearest"
    return OnnxInt8Settings(mixed_precision=False, rounding=rounding, **shared)


def both_graphs(hybrid: Hybrid, model: onnx_format.ModelProto, windows: np.ndarray) -> Graphs:
    """The two graphs of the fp32 ``model``, which is left as it was. ``windows`` int ``[n, tokens]`` calibrate."""
    settings = static_settings(hybrid.settings)
    feeds = Feeds(windows, settings.decode_steps)
    prompt, scheme = static_int8(model, feeds, settings, embedding=False, artifact=hybrid.name)
    scales = kv_scales(settings.kv_cache, model, feeds, hybrid.name)
    layers, tables = linear_layers(model), token_tables(model.graph)
    weights = {node.input[1]: None for node in model.graph.node if node.name in layers}
    if hybrid.linear is None:
        matrices = {name: same_numbers(prompt, name, hybrid.settings.block) for name in weights}
    else:
        matrices = quantised_matrices(model, Variant(hybrid.name, hybrid.linear, hybrid.embedding, hybrid.settings), windows)
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    for name in tables.keys() - matrices.keys():
        matrices[name] = quantise_matrix(by_input(tensors[name], tables[name]), hybrid.embedding, covering_grid)
    decode = compact(model)
    insert(decode, matrices)
    decode = compact(decode)
    restore_tables(prompt.graph, tensors, tables)
    keep_cache_only(prompt.graph)
    insert(prompt, {name: matrices[name] for name in token_tables(prompt.graph)})
    if hybrid.linear is not None:
        for name in weights:
            take_numbers(prompt.graph, name, matrices[name])
    kept = {node.name for node in prompt.graph.node}
    last_token = give_last_logits(prompt.graph, decode.graph, hybrid.name)
    for graph in (decode, prompt) if scales else ():
        store_as_int8(graph, scales)
    return Graphs(decode, prompt, matrices, tuple(name for name in scheme.two_step if name in kept), last_token, scales)


def same_numbers(quantised: onnx_format.ModelProto, name: str, block: int) -> Blocks:
    """The int8 matrix ``name`` of a QDQ graph as blocks: the same numbers, its scale per output repeated for each block."""
    tensors = {tensor.name: tensor for tensor in quantised.graph.initializer}
    matrix = numpy_helper.to_array(tensors[f"{name}_quantized"])  # [in, out]
    scale = numpy_helper.to_array(tensors[f"{name}_scale"]).reshape(-1)  # [out]
    layout = Layout(bits=8, block=block, symmetric=True)
    inputs, outputs = matrix.shape
    blocks = -(-inputs // block)
    codes = np.full((outputs, blocks * block), layout.middle, np.uint8)
    codes[:, :inputs] = (matrix.T.astype(np.int16) + layout.middle).astype(np.uint8)
    scales = np.repeat(scale[:, None], blocks, axis=1)
    return Blocks(layout, inputs, codes.reshape(outputs, blocks, block), scales, np.full(scales.shape, layout.middle, np.uint8))


def take_numbers(graph: onnx_format.GraphProto, name: str, blocks: Blocks) -> None:
    """Put the numbers of ``blocks`` in place of the int8 matrix ``name``, with one scale per output that just covers them."""
    tensors = {tensor.name: tensor for tensor in graph.initializer}
    if f"{name}_quantized" not in tensors:  # a layer behind the last keys and values
        return
    values = blocks.values()  # [out, in]
    largest = np.abs(values).max(axis=1)
    scale = (np.where(largest > 0, largest, 1) / np.float32(INT8_MAX)).astype(np.float32)
    matrix = as_int8(blocks, scale)
    tensors[f"{name}_quantized"].CopyFrom(numpy_helper.from_array(matrix, f"{name}_quantized"))
    tensors[f"{name}_scale"].CopyFrom(numpy_helper.from_array(scale, f"{name}_scale"))


def as_int8(blocks: Blocks, row_scale: np.ndarray) -> np.ndarray:
    """``blocks`` as int8 ``[in, out]`` with the scales ``row_scale`` ``[out]``: what a host does when it loads the prompt graph."""
    return np.ascontiguousarray(np.rint(blocks.values() / row_scale[:, None]).astype(np.int8).T)


def restore_tables(graph: onnx_format.GraphProto, tensors: dict[str, TensorProto], tables: Iterable[str]) -> None:
    """Have token ids look up the float ``tables`` again, where the QDQ writer put the head's int8 matrix in their place."""
    for name in tables:
        for node in graph.node:
            if node.op_type == "Gather" and node.input[0] == name + DEQUANTISED:
                node.input[0] = name
                graph.initializer.append(tensors[name])


def take_weights_out(graphs: Graphs, data: Path) -> list[dict]:
    """Write the weights of both graphs to ``data`` and have both refer to it; what the host has to make for the prompt graph.

    GateError where that would differ from the prompt graph's own numbers.
    """
    prompt = {tensor.name: tensor for tensor in graphs.prompt.graph.initializer}
    decode = {tensor.name: tensor for tensor in graphs.decode.graph.initializer}
    int8 = {name: prompt[f"{name}_quantized"] for name in graphs.matrices if f"{name}_quantized" in prompt}
    rows = {name: prompt[f"{name}_scale"] for name in int8 if not has_row_scales(graphs.matrices[name])}
    places = write_external([*decode.values(), *rows.values()], data)
    weights = []
    for name, tensor in int8.items():
        blocks, scale = graphs.matrices[name], numpy_helper.to_array(prompt[f"{name}_scale"])
        if not np.array_equal(as_int8(blocks, scale), numpy_helper.to_array(tensor)):
            raise GateError(f"{tensor.name}: what the host would make of the decode graph's numbers differs from the prompt graph's")
        parts = {part: places[f"{name}.{part}"].offset for part in stored(blocks)}
        if name in rows:
            parts["row_scale"] = places[f"{name}_scale"].offset
        outputs, count, _ = blocks.codes.shape
        sizes = {"inputs": blocks.inputs, "outputs": outputs, "blocks": count, "block": blocks.layout.block, "bits": blocks.layout.bits}
        weights.append({"name": tensor.name, **sizes, "offsets": parts})
        refer(tensor, External(GIVEN_BY_THE_HOST, 0, len(tensor.raw_data)))
    for name, place in places.items():
        for tensors in (decode, prompt):
            if name in tensors:
                refer(tensors[name], place)
    return weights


def has_row_scales(blocks: Blocks) -> bool:
    """Whether all blocks of an output have one scale, so that codes less the middle are the prompt graph's int8 numbers."""
    return blocks.layout.bits == 8 and blocks.layout.symmetric and bool((blocks.scales == blocks.scales[:, :1]).all())


def require_prompt(structure: Structure, products: int, last_token: tuple[str, ...], artifact: str) -> None:
    """GateError unless every layer of the prompt graph runs as int8, but for those of its last token, which run as in the decode graph."""
    require_no_float(structure, f"{artifact}, prompt graph")
    require_count(structure.int8_linear, products, "int8", f"{artifact}, prompt graph")
    require_count(structure.block_linear, len(last_token), "weight-only", f"{artifact}, prompt graph")
