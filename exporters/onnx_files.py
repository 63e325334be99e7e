"""ONNX models on disk: what fits in one file, and weights in a file of their own."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto

from models.errors import UserError

ONE_FILE_BYTES = 1_800_000_000  # protobuf ends at 2 GiB, headers and graph included
ALIGNMENT = 64  # bytes; vector registers are no wider


@dataclass(frozen=True)
class External:
    """Where the bytes of a tensor lie: a file beside the graph, and a part of it."""

    file: str
    offset: int
    length: int


def write_external(tensors: Iterable[TensorProto], path: Path) -> dict[str, External]:
    """Write the bytes of all tensors one after another to ``path``; where each lies, by name.

    Left out are single numbers and int64, shapes and axes: what is known of a graph before it runs comes from them.
    """
    places: dict[str, External] = {}
    with path.open("wb") as file:
        for tensor in tensors:
            array = onnx.numpy_helper.to_array(tensor)
            if array.size == 1 or array.dtype == np.int64:
                continue
            data = array.tobytes()
            file.write(bytes(-file.tell() % ALIGNMENT))
            places[tensor.name] = External(path.name, file.tell(), len(data))
            file.write(data)
    return places


def compact(model: onnx.ModelProto) -> onnx.ModelProto:
    """The same model in as little memory as it takes: a message keeps the memory of what was removed from it as long as it lives."""
    fresh = onnx.ModelProto()
    fresh.CopyFrom(model)
    return fresh


def save_with_data(model: onnx.ModelProto, path: Path) -> None:
    """Write ``model`` to ``path`` and its weights to a file beside it, whatever their size. The model is left as it was, and not copied."""
    places = write_external(model.graph.initializer, path.with_name(path.name + ".data"))
    graph = onnx.GraphProto(name=model.graph.name)
    for field in ("node", "input", "output", "value_info"):
        getattr(graph, field).extend(getattr(model.graph, field))
    for tensor in model.graph.initializer:
        if tensor.name in places:
            graph.initializer.add(name=tensor.name, data_type=tensor.data_type, dims=tensor.dims)
            refer(graph.initializer[-1], places[tensor.name])
        else:
            graph.initializer.append(tensor)
    light = onnx.ModelProto(ir_version=model.ir_version, opset_import=model.opset_import, functions=model.functions, graph=graph)
    path.write_bytes(light.SerializeToString())


def refer(tensor: TensorProto, place: External) -> None:
    """Have ``tensor`` say where its bytes lie instead of holding them."""
    for field in ("raw_data", "float_data", "int32_data", "int64_data"):
        tensor.ClearField(field)
    tensor.data_location = TensorProto.EXTERNAL
    del tensor.external_data[:]
    for key, value in (("location", place.file), ("offset", place.offset), ("length", place.length)):
        tensor.external_data.add(key=key, value=str(value))


def save_one_file(model: onnx.ModelProto, path: Path, artifact: str) -> None:
    """Write ``model`` with its weights inside. UserError where they are too many for that."""
    size = model.ByteSize()
    if size > ONE_FILE_BYTES:
        raise UserError(f"{artifact}: {size / 1e9:.1f} GB do not fit in one ONNX file (1.8 GB); use fewer bits or a smaller model")
    onnx.save(model, path)
