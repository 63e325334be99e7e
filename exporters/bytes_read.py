"""How many bytes of weights a decoded token reads, counted in the exported file: what memory bandwidth is held against.

Every constant of the graph is read once per token, but for tables of which only a row or two are picked: an embedding that is no
head, rotary angles. A matrix that two operators multiply counts once, because the second finds it in a cache if there is one that
holds it. Bytes are as stored: a runtime that unpacks weights when it loads them reads more.
"""

from collections import defaultdict
from pathlib import Path

import onnx
from onnx.external_data_helper import uses_external_data

from exporters.tflite_structure import operators, read_model

# operator -> the inputs of which it picks rows
ONNX_TABLES = {"Gather": (0,), "GatherBlockQuantized": (0, 2, 3), "GroupQueryAttention": (7, 8), "RotaryEmbedding": (2, 3)}
TFLITE_TABLES = {"GATHER": (0,), "EMBEDDING_LOOKUP": (1,), "GATHER_ND": (0,)}


def bytes_read_per_token(path: Path, form: str) -> int:
    """Bytes for the model file at ``path``; ``form`` is onnx or tflite."""
    return onnx_bytes(path) if form == "onnx" else tflite_bytes(path)


def onnx_bytes(path: Path) -> int:
    """Of an ONNX graph, its weights inside or beside it."""
    graph = onnx.load(path, load_external_data=False).graph
    picked: dict[str, list[bool]] = defaultdict(list)
    for node in graph.node:
        for place, name in enumerate(node.input):
            picked[name].append(place in ONNX_TABLES.get(node.op_type, ()))
    return sum(stored_bytes(tensor) for tensor in graph.initializer if not all(picked[tensor.name]))


def stored_bytes(tensor: onnx.TensorProto) -> int:
    """Bytes of an initializer's numbers, wherever they lie."""
    if uses_external_data(tensor):
        return int(next(entry.value for entry in tensor.external_data if entry.key == "length"))
    return len(tensor.raw_data) or tensor.ByteSize()


def tflite_bytes(path: Path) -> int:
    """Of a TFLite file's ``decode`` signature."""
    model = read_model(path)
    picked: dict[int, list[bool]] = defaultdict(list)
    for operator in operators(model):
        if operator.signature == "decode":
            for place, tensor in enumerate(operator.inputs):
                if tensor is not None and tensor.constant:
                    picked[tensor.buffer].append(place in TFLITE_TABLES.get(operator.name, ()))
    read = [model.buffers[index] for index, rows_only in picked.items() if not all(rows_only)]
    return sum(len(buffer.data) if buffer.data is not None else buffer.size for buffer in read)
