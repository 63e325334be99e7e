"""Writes the quantised graph: QDQ around every MatMul with a constant matrix, and an int8 embedding.

The embedding is no MatMul: its rows are picked as int8 and multiplied by their own scales, so that no DequantizeLinear runs
over the table at every step. A table that is embedding and head at once is stored once: the head's scales per output channel
are the embedding's scales per row, and one scale of the head's whole matrix is that of the whole table.

An activation with rare large values (the product inside a gated FFN is one) leaves its ordinary values a handful of the 256
steps. It is quantised in two steps: the value, and what rounding left of it, whose range is known to be half a step each way.
Both meet the same int8 matrix, and the sum is as exact as with 16 bits.
"""

import math
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationMethod, QuantType
from onnxruntime.quantization.calibrate import TensorsData
from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

from exporters.onnx_calibration import Range
from exporters.onnx_files import compact
from exporters.onnx_structure import is_token_gather

INT8_MAX, INT7_MAX = 127, 63
SAFE_RANGE = (0.0, 1.0)  # for an activation that was zero on the whole text: any scale represents zero exactly
HEADROOM = 2.0  # of the range seen, for inputs of two steps: a clipped value costs more than a step twice as wide
UINT8_STEPS, UINT8_MIDDLE = 255, 128
DEQUANTISED = "_DequantizeLinear_Output"  # how the QDQ writer calls what comes out of a pair


@dataclass(frozen=True)
class Scheme:
    """What is done to the graph. ``two_step`` and ``exclude`` name linear layers; ``reduce_range``: 7-bit weights.

    ``per_channel``: a weight scale per output channel, else one per matrix (and per embedding that is tied to the head).
    """

    ranges: dict[str, Range]
    two_step: tuple[str, ...] = ()
    exclude: tuple[str, ...] = ()
    reduce_range: bool = False
    per_channel: bool = True
    embedding: bool = True


def linear_layers(model: onnx.ModelProto) -> dict[str, str]:
    """Input tensor by node name of every MatMul with a constant matrix, in the graph's order."""
    constants = {tensor.name for tensor in model.graph.initializer}
    return {node.name: node.input[0] for node in model.graph.node if node.op_type == "MatMul" and node.input[1] in constants}


def quantise(model: onnx.ModelProto, scheme: Scheme) -> onnx.ModelProto:
    """The int8 graph: every linear layer but those in ``scheme.exclude``, and the embedding where ``scheme.embedding``."""
    two_step_inputs = {value for name, value in linear_layers(model).items() if name in scheme.two_step}
    ends = {name: represented(found, name in two_step_inputs) for name, found in scheme.ranges.items()}
    data = TensorsData(CalibrationMethod.MinMax, ends)
    quantizer = QDQQuantizer(
        model,
        per_channel=scheme.per_channel,
        reduce_range=scheme.reduce_range,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,
        tensors_range=data,
        nodes_to_quantize=[name for name in linear_layers(model) if name not in scheme.exclude],
        nodes_to_exclude=list(scheme.exclude),  # said twice: an empty list of nodes to quantise means all of them
        op_types_to_quantize=["MatMul"],
        # Products stay float: they feed norms, attention and the caller, where another rounding costs and saves nothing.
        extra_options={"OpTypesToExcludeOutputQuantization": ["MatMul"]},
    )
    quantizer.quantize_model()
    quantised = quantizer.model.model
    for name in scheme.two_step:
        add_remainder(quantised.graph, name)
    if scheme.embedding:
        quantise_embeddings(quantised.graph, INT7_MAX if scheme.reduce_range else INT8_MAX)
    drop_unused_initializers(quantised.graph)
    return compact(quantised)


def represented(found: Range, two_step: bool) -> tuple[np.float32, np.float32]:
    """The ends that int8 spans. Two steps have steps to spare, so values beyond those of the calibration text fit as well."""
    if found.low == found.high == 0:
        return tuple(map(np.float32, SAFE_RANGE))
    margin = HEADROOM if two_step else 1.0
    return np.float32(found.low * margin), np.float32(found.high * margin)


def add_remainder(graph: onnx.GraphProto, name: str) -> None:
    """Second step of the linear layer ``name``: the rounding error of its input, quantised finely, times the same matrix."""
    product = next(node for node in graph.node if node.name == name)
    rounded, matrix, output = *product.input, product.output[0]
    value = rounded.removesuffix(DEQUANTISED)
    coarse = next(tensor for tensor in graph.initializer if tensor.name == f"{value}_scale")
    fine = (numpy_helper.to_array(coarse) / UINT8_STEPS).astype(np.float32)
    stem = f"{name}.remainder"
    graph.initializer.append(numpy_helper.from_array(fine, f"{stem}.scale"))
    graph.initializer.append(numpy_helper.from_array(np.array(UINT8_MIDDLE, np.uint8), f"{stem}.zero_point"))
    quantisation = [f"{stem}.scale", f"{stem}.zero_point"]
    product.output[0] = f"{name}.value"
    nodes = [
        helper.make_node("Sub", [value, rounded], [f"{stem}.input"], f"{stem}.input"),
        helper.make_node("QuantizeLinear", [f"{stem}.input", *quantisation], [f"{stem}.int8"], f"{stem}.quantise"),
        helper.make_node("DequantizeLinear", [f"{stem}.int8", *quantisation], [f"{stem}.rounded"], f"{stem}.dequantise"),
        helper.make_node("MatMul", [f"{stem}.rounded", matrix], [f"{stem}.output"], stem),
        helper.make_node("Add", [f"{name}.value", f"{stem}.output"], [output], f"{name}.sum"),
    ]
    position = list(graph.node).index(product) + 1
    for offset, node in enumerate(nodes):
        graph.node.insert(position + offset, node)


def quantise_embeddings(graph: onnx.GraphProto, largest: int) -> None:
    """Every table that token ids look up in float becomes an int8 look-up times a look-up of scales."""
    constants = {tensor.name: tensor for tensor in graph.initializer}
    producers = {output: node for node in graph.node for output in node.output}
    for node in [node for node in graph.node if is_token_gather(node, producers)]:
        axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
        source = producers.get(node.input[0])
        names = f"{node.input[0]}_quantized", f"{node.input[0]}_scale"
        if source is not None and source.op_type == "DequantizeLinear":  # the head's matrix: per column, so per token already
            names = source.input[0], source.input[1]
        elif node.input[0] in constants and names[0] not in constants:  # else it is the head's matrix, with no pair before it
            table = numpy_helper.to_array(constants[node.input[0]])
            graph.initializer.extend(_quantised_table(table, axis, largest, names))
        elif names[0] not in constants:
            continue
        _replace_gather(graph, node, names, axis)


def drop_unused_initializers(graph: onnx.GraphProto) -> None:
    used = {name for node in graph.node for name in node.input}
    kept = [tensor for tensor in graph.initializer if tensor.name in used]
    del graph.initializer[:]
    graph.initializer.extend(kept)


def numbers_in(graph: onnx.GraphProto) -> int:
    """How many numbers a graph stores."""
    return sum(math.prod(tensor.dims) for tensor in graph.initializer)


def bits_per_weight(graph: onnx.GraphProto, numbers: int) -> float:
    """Everything that ``graph`` stores, scales and zero points too, over the ``numbers_in`` its fp32 parent."""
    return 8 * sum(numpy_helper.to_array(tensor).nbytes for tensor in graph.initializer) / numbers


def _quantised_table(table: np.ndarray, axis: int, largest: int, names: tuple[str, str]) -> list[TensorProto]:
    """Symmetric int8 with one scale per token; tokens lie along ``axis`` of ``table``. A row of zeros gets scale 1."""
    magnitude = np.abs(table).max(axis=1 - axis, keepdims=True)  # [vocab, 1] or [1, vocab]
    scale = np.where(magnitude > 0, magnitude / largest, 1).astype(np.float32)
    rounded = np.clip(np.rint(table / scale), -largest, largest).astype(np.int8)
    return [numpy_helper.from_array(rounded, names[0]), numpy_helper.from_array(scale.reshape(-1), names[1])]


def _replace_gather(graph: onnx.GraphProto, gather: NodeProto, names: tuple[str, str], axis: int) -> None:
    """Put the int8 look-up where ``gather`` was; after a table by columns, the Transpose that follows is taken along."""
    index, output, stem = gather.input[1], gather.output[0], gather.name
    position = list(graph.node).index(gather)
    follower = next((node for node in graph.node if output in node.input), None)
    picked = f"{stem}.int8"
    nodes = [helper.make_node("Gather", [names[0], index], [picked], f"{stem}_int8", axis=axis)]
    graph.node.remove(gather)
    if axis == 1:  # [hidden, batch, seq], and its Transpose to [batch, seq, hidden] follows: turn the bytes, not the floats
        nodes.append(helper.make_node("Transpose", [picked], [f"{picked}.turned"], f"{stem}_int8_turned", perm=[1, 2, 0]))
        picked, output = f"{picked}.turned", follower.output[0]
        graph.node.remove(follower)
    nodes.append(helper.make_node("Cast", [picked], [f"{stem}.float"], f"{stem}_float", to=TensorProto.FLOAT))
    scale = names[1]
    if next(np.prod(tensor.dims) for tensor in graph.initializer if tensor.name == scale) > 1:  # one for each token
        scale = f"{stem}.scale_last"
        nodes += [
            helper.make_node("Gather", [names[1], index], [f"{stem}.scale"], f"{stem}_scale", axis=0),
            helper.make_node("Unsqueeze", [f"{stem}.scale", f"{stem}.last_axis"], [scale], f"{stem}_scale_last"),
        ]
        graph.initializer.append(numpy_helper.from_array(np.array([-1], np.int64), f"{stem}.last_axis"))
    nodes.append(helper.make_node("Mul", [f"{stem}.float", scale], [output], f"{stem}_dequantised"))
    for offset, node in enumerate(nodes):
        graph.node.insert(position + offset, node)
