"""What ONNX Runtime really runs of a graph: counted on the graph that it has optimised, not on the file.

A QDQ file says what is meant to be int8. Only after ONNX Runtime's fusions is it visible whether a weight is multiplied as int8,
or dequantised at every step and multiplied in float, which is slower than fp32 and raises no error. As silent are signed int8
activations, which its x86 kernels do not fuse, and a cache that is copied at every step because something stands between it and
the attention.
"""

import tempfile
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnxruntime
from onnx import TensorProto

from exporters.onnx_session import WARNINGS_OFF
from models.errors import GateError

INT8_LINEAR = ("MatMulIntegerToFloat", "QLinearMatMul", "DynamicQuantizeMatMul", "MatMulInteger", "QGemm")
BLOCK_LINEAR = ("MatMulNBits",)
FLOAT_LINEAR = ("MatMul", "FusedMatMul", "Gemm", "FusedGemm")
FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
INDEX_STEPS = ("Reshape", "Cast", "Identity", "Squeeze", "Unsqueeze", "Flatten")
ATTENTION = "GroupQueryAttention"
PASTS, PRESENTS = (3, 4), (1, 2)  # among its inputs and outputs
ORT_FORMAT = b"ORTM"  # after the first four bytes of a flatbuffer


@dataclass(frozen=True)
class Structure:
    """Node names per kind, on the optimised graph."""

    int8_linear: tuple[str, ...]
    block_linear: tuple[str, ...]  # products with a matrix in blocks of few bits
    float_linear: tuple[str, ...]  # float products with a constant matrix
    dequantised_weights: tuple[str, ...]  # weights turned to float at every step
    float_embeddings: tuple[str, ...]  # tables in float that token ids look up
    float_tables: tuple[str, ...]  # other tables in float, such as GPT-2's positions
    signed_activations: tuple[str, ...] = ()  # quantised to int8 where x86 kernels want uint8
    copied_caches: tuple[str, ...] = ()  # pasts that no attention reads in place and writes on


def structure_of(path: Path) -> Structure:
    """Let ONNX Runtime optimise the file at ``path`` as every session does, and read the result. GateError for the ORT format."""
    with path.open("rb") as file:
        if file.read(8)[4:] == ORT_FORMAT:
            raise GateError(f"{path.name} is in ORT format, whose Runtime style is 23 times slower in int8 and shows no graph; keep ONNX")
    with tempfile.TemporaryDirectory() as folder:
        optimised = Path(folder) / "optimised.onnx"
        options = onnxruntime.SessionOptions()
        options.log_severity_level = WARNINGS_OFF
        options.optimized_model_filepath = str(optimised)
        onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        graph = onnx.load(optimised, load_external_data=False).graph
    constants = {tensor.name: tensor for tensor in graph.initializer}
    weights = {name for name, tensor in constants.items() if len(tensor.dims) >= 2}
    float_weights = {name for name in weights if constants[name].data_type in FLOATS}
    producers = {output: node for node in graph.node for output in node.output}
    float_gathers = [node for node in graph.node if node.op_type == "Gather" and node.input[0] in float_weights]
    dequantised = {node.output[0]: node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in weights}
    matrices = float_weights | dequantised.keys()
    return Structure(
        int8_linear=_names(node for node in graph.node if node.op_type in INT8_LINEAR and weights & set(node.input)),
        block_linear=_names(node for node in graph.node if node.op_type in BLOCK_LINEAR and weights & set(node.input)),
        float_linear=_names(node for node in graph.node if node.op_type in FLOAT_LINEAR and matrices & set(node.input)),
        dequantised_weights=tuple(node.input[0] for node in dequantised.values()),
        float_embeddings=tuple(node.input[0] for node in float_gathers if is_token_gather(node, producers)),
        float_tables=tuple(node.input[0] for node in float_gathers if not is_token_gather(node, producers)),
        signed_activations=_names(
            node
            for node in graph.node
            if node.op_type == "QuantizeLinear" and len(node.input) > 2 and constants[node.input[2]].data_type == TensorProto.INT8
        ),
        copied_caches=copied_caches(graph),
    )


def copied_caches(graph: onnx.GraphProto) -> tuple[str, ...]:
    """Pasts of the contract that do not go straight into an attention whose present goes straight out: no buffer can be both."""
    outputs = {value.name for value in graph.output}
    in_place = {
        node.input[past]
        for node in graph.node
        if node.op_type == ATTENTION
        for past, present in zip(PASTS, PRESENTS, strict=True)
        if node.output[present] == node.input[past].replace("past_key_values.", "present.") and node.output[present] in outputs
    }
    readers = Counter(name for node in graph.node for name in node.input)
    pasts = [value.name for value in graph.input if value.name.startswith("past_key_values.")]
    return tuple(name for name in pasts if name not in in_place or readers[name] != 1)


def require_cache_in_place(structure: Structure, artifact: str) -> None:
    """GateError, naming the first, for a cache that cannot be one buffer for past and present."""
    _require_none(structure.copied_caches, "caches that are copied at every step", artifact)


def require_int8(structure: Structure, linear_layers: int, artifact: str) -> None:
    """GateError, naming the node, unless every linear layer and the embedding run as int8."""
    require_no_float(structure, artifact)
    require_count(structure.int8_linear, linear_layers, "int8", artifact)


def require_blocks(structure: Structure, linear_layers: int, artifact: str) -> None:
    """GateError, naming the node, unless every linear layer runs from blocks of few bits, and no embedding is float."""
    require_no_float(structure, artifact)
    require_count(structure.block_linear, linear_layers, "weight-only", artifact)


def require_no_float(structure: Structure, artifact: str) -> None:
    """GateError, naming the node, for a matrix or an embedding that is float, or becomes float at every step."""
    faults = [
        (structure.float_linear, "float products with a constant matrix"),
        (structure.dequantised_weights, "weights dequantised at every step"),
        (structure.float_embeddings, "embedding tables in float"),
    ]
    for names, fault in faults:
        _require_none(names, fault, artifact)
    require_fast_operands(structure, artifact)


def require_fast_operands(structure: Structure, artifact: str) -> None:
    """GateError, naming the node, for what is slow though every layer is in the form that was chosen for it."""
    _require_none(structure.signed_activations, "activations quantised as signed int8 (U8S8 is the form that x86 kernels fuse)", artifact)
    require_cache_in_place(structure, artifact)


def require_count(names: tuple[str, ...], expected: int, kind: str, artifact: str) -> None:
    """GateError, naming those found, unless as many linear layers as ``expected`` are of ``kind``."""
    if len(names) != expected:
        found = f"{len(names)} {kind} linear layers, expected {expected}"
        raise GateError(f"{artifact}: {found}, after ONNX Runtime's optimisation; found: {', '.join(names)}")


def _require_none(names: tuple[str, ...], fault: str, artifact: str) -> None:
    if names:
        raise GateError(f"{artifact}: {len(names)} {fault}, limit 0, after ONNX Runtime's optimisation; first: {names[0]}")


def _names(nodes) -> tuple[str, ...]:
    return tuple(node.name or node.output[0] for node in nodes)


def is_token_gather(node: onnx.NodeProto, producers: dict[str, onnx.NodeProto]) -> bool:
    """Whether ``node`` looks token ids up, perhaps in another shape or integer type. ``producers``: node by output name."""
    if node.op_type != "Gather":
        return False
    index = node.input[1]
    while index in producers and producers[index].op_type in INDEX_STEPS:
        index = producers[index].input[0]
    return index == "input_ids"
