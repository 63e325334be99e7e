"""An int8 KV cache: the attention operator itself rounds what it appends, and reads int8.

GroupQueryAttention takes one scale for each channel of each head (ORT's docs/ContribOperators.md): number = code * scale, codes from
-128 to 127. Values keep their channels, so the largest magnitude of each on the calibration text is its range. Keys lie rotated in the
cache: a pair of channels turns with the position, in some pairs so slowly that windows of calibration text show only a part of the
turn. What does not change is the length of the pair, and it is the range of both: it holds at any position.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper, numpy_helper

from exporters.onnx_calibration import Feeds, run_window
from exporters.onnx_files import compact
from exporters.onnx_session import open_session_of, present_name
from exporters.onnx_structure import ATTENTION
from models.errors import GateError, UserError
from models.progress import track

INT8_MAX = 127
HEADROOM = 1.1  # over what the calibration text reached: what is cut off costs more than steps that are wider by as much
PLACES = {"key": (3, 12), "value": (4, 13)}  # of past and of its scales among the operator's inputs
ROTARY_TABLE = 7  # cosines, where the operator rotates
HANDED_ON = ("Reshape", "Transpose", "Pad", "Split")  # change no number on the way to the attention
NORMS = ("SimplifiedLayerNormalization", "LayerNormalization")
LINEAR = ("MatMul", "Add")  # with a constant: a plain rotation ends in an Add too, but of two products


@dataclass(frozen=True)
class Turn:
    """Which channels of a head turn in pairs: the first ``rotated``, neighbours where ``interleaved``, else half of them apart."""

    rotated: int
    interleaved: bool

    def ranges(self, values: np.ndarray) -> np.ndarray:
        """Of ``[..., head_dim]`` the magnitude that each may have at any position: the length of its pair, else its own."""
        ranges, turning = np.abs(values), np.abs(values[..., : self.rotated])
        shape = (*values.shape[:-1], *((self.rotated // 2, 2) if self.interleaved else (2, self.rotated // 2)))
        pairs = turning.reshape(shape)
        lengths = np.linalg.norm(pairs, axis=-1 if self.interleaved else -2, keepdims=True)
        ranges[..., : self.rotated] = np.broadcast_to(lengths, shape).reshape(turning.shape)
        return ranges


def kv_scales(kind: Literal["float32", "int8"], model: onnx.ModelProto, feeds: Feeds, artifact: str) -> dict[str, np.ndarray]:
    """What a stage's setting ``kv_cache`` asks for: ``cache_scales``, or nothing where the cache stays float."""
    return cache_scales(model, feeds, artifact) if kind == "int8" else {}


def cache_scales(model: onnx.ModelProto, feeds: Feeds, artifact: str) -> dict[str, np.ndarray]:
    """float32 ``[1, kv_heads, 1, head_dim]`` for each past of the fp32 ``model``, by the input's name. The model is left as it was.

    UserError, naming ``artifact``, where the graph does not say how keys are rotated; GateError for NaN or infinity in the cache.
    """
    turns = {node.input[PLACES["key"][0]]: turn_of(model.graph, node, artifact) for node in attentions(model.graph)}
    largest: dict[str, np.ndarray] = {}
    for name, held in caches(model, feeds):
        found = turns.get(name, Turn(0, False)).ranges(held).max(axis=(0, 2))  # [kv_heads, head_dim]
        if not np.isfinite(found).all():
            raise GateError(f"{artifact}: {present_name(name)} holds NaN or infinity on the calibration text; check the fp32 model")
        largest[name] = np.maximum(largest.get(name, 0), found)
    steps = INT8_MAX / HEADROOM
    return {name: (np.where(found > 0, found, 1) / steps).astype(np.float32)[None, :, None] for name, found in largest.items()}


def store_as_int8(model: onnx.ModelProto, scales: dict[str, np.ndarray]) -> None:
    """Have the graph keep its cache as int8 with ``scales`` by the past's name. Pasts that the graph does not have are left out."""
    graph = model.graph
    for node in attentions(graph):
        node.input.extend([""] * (max(scale for _, scale in PLACES.values()) + 1 - len(node.input)))
        for kind, (past, scale) in PLACES.items():
            name = node.input[past]
            node.input[scale] = f"{name}.scale"
            graph.initializer.append(numpy_helper.from_array(scales[name], f"{name}.scale"))
            node.attribute.append(helper.make_attribute(f"{kind[0]}_quant_type", "PER_CHANNEL"))
        node.attribute.append(helper.make_attribute("kv_cache_bit_width", 8))
    for value in (*graph.input, *graph.output, *graph.value_info):
        if value.name.startswith(("past_key_values.", "present.")):
            value.type.tensor_type.elem_type = TensorProto.INT8


def with_int8_cache(model: onnx.ModelProto, scales: dict[str, np.ndarray]) -> onnx.ModelProto:
    """``model`` itself where there are no scales, else a copy that keeps its cache as int8."""
    if not scales:
        return model
    copy = compact(model)
    store_as_int8(copy, scales)
    return copy


def described_tensors(tensors: dict, scales: dict[str, np.ndarray]) -> dict:
    """A sidecar's ``tensors`` with the cache's type as it is stored."""
    names = {*scales, *map(present_name, scales)}

    def described(tensor: dict) -> dict:
        return tensor | {"dtype": "int8"} if tensor["name"] in names else tensor

    return {side: [described(tensor) for tensor in listed] for side, listed in tensors.items()}


def cache_bytes_per_token(tensors: dict) -> int:
    """Bytes of keys and values that a token adds, of a sidecar's ``tensors``: what every later token reads again."""
    pasts = [tensor for tensor in tensors["inputs"] if tensor["name"].startswith("past_key_values.")]
    return sum(np.dtype(tensor["dtype"]).itemsize * tensor["shape"][1] * tensor["shape"][3] for tensor in pasts)


def attentions(graph: onnx.GraphProto) -> list[NodeProto]:
    return [node for node in graph.node if node.op_type == ATTENTION]


def caches(model: onnx.ModelProto, feeds: Feeds) -> Iterator[tuple[str, np.ndarray]]:
    """Each past's name with what it holds float32 ``[1, kv_heads, tokens, head_dim]`` after each window, fed as prompt and as steps."""
    session = open_session_of(model)
    for window in track(feeds.windows, "calibrating the KV cache", total=len(feeds.windows)):
        for _, cache in run_window(session, [], window, feeds.decode_steps):
            held = cache
        yield from held.items()


def turn_of(graph: onnx.GraphProto, attention: NodeProto, artifact: str) -> Turn:
    """How the keys of ``attention`` are rotated: by itself, by an operator before it, or not at all."""
    sizes = {tensor.name: tensor.dims for tensor in graph.initializer}
    if _number(attention, "do_rotary"):
        return Turn(2 * sizes[attention.input[ROTARY_TABLE]][-1], bool(_number(attention, "rotary_interleaved")))
    producers = {output: node for node in graph.node for output in node.output if output}
    node, normed = producers.get(attention.input[1]), False
    while node is not None and node.op_type in (*HANDED_ON, *NORMS):
        normed |= node.op_type in NORMS
        node = producers.get(node.input[0])
    if node is None or (node.op_type in LINEAR and sizes.keys() & set(node.input)):  # None: q, k and v reach the operator packed
        return Turn(0, False)
    if node.op_type == "RotaryEmbedding" and not normed:  # a norm behind it would weigh the two of a pair differently
        return Turn(2 * sizes[node.input[2]][-1], bool(_number(node, "interleaved")))
    raise UserError(f"{artifact}: the graph does not say how the keys of {attention.name} are rotated; leave kv_cache at float32")


def _number(node: NodeProto, name: str) -> int:
    return next((attribute.i for attribute in node.attribute if attribute.name == name), 0)
