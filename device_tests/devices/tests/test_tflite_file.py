"""Signatures read from a TFLite file that LiteRT's own schema wrote."""

from pathlib import Path

import flatbuffers
import numpy as np
import pytest
from ai_edge_litert import schema_py_generated as schema

from device_tests.devices.tflite_file import Tensor, read_signatures
from device_tests.errors import DeviceTestError

FLOAT, INT32, INT8 = schema.TensorType.FLOAT32, schema.TensorType.INT32, schema.TensorType.INT8


def tensor(name: str, kind: int, shape: list[int], scale: tuple[float, ...] = (), zero_point: tuple[int, ...] = ()) -> schema.TensorT:
    quantization = schema.QuantizationParametersT(scale=list(scale), zeroPoint=list(zero_point)) if scale else None
    return schema.TensorT(shape=shape, type=kind, buffer=0, name=name, quantization=quantization)


def write_model(path: Path) -> Path:
    """Two signatures; each names its tensors in another order than its graph has them."""
    first = [tensor("a:0", FLOAT, [1, 3]), tensor("b", INT8, [2, 2, 2], (0.5,), (-3,)), tensor("sum", FLOAT, []), tensor("c", INT32, [5])]
    second = [tensor("w", INT8, [4], (0.1, 0.2, 0.3, 0.4), (0, 0, 0, 0)), tensor("x", schema.TensorType.INT64, [0, 7])]
    graphs = [
        schema.SubGraphT(tensors=first, inputs=[3, 0, 1], outputs=[2, 1], operators=[]),
        schema.SubGraphT(tensors=second, inputs=[1], outputs=[0], operators=[]),
    ]

    def names(**places: int) -> list[schema.TensorMapT]:
        return [schema.TensorMapT(name=name, tensorIndex=place) for name, place in places.items()]

    signatures = [
        schema.SignatureDefT(inputs=names(k=0), outputs=names(k=0), signatureKey="later", subgraphIndex=1),
        schema.SignatureDefT(inputs=names(x=0, y=1, z=3), outputs=names(same=1, total=2), signatureKey="first", subgraphIndex=0),
    ]
    signatures[0].inputs[0].tensorIndex = 1
    model = schema.ModelT(version=3, operatorCodes=[], subgraphs=graphs, buffers=[schema.BufferT()], signatureDefs=signatures)
    builder = flatbuffers.Builder()
    builder.Finish(model.Pack(builder), file_identifier=b"TFL3")
    path.write_bytes(bytes(builder.Output()))
    return path


def test_tensors_stand_in_the_order_of_the_graph_with_the_names_of_the_signature(tmp_path):
    found = read_signatures(write_model(tmp_path / "m.tflite"))
    assert sorted(found) == ["first", "later"]
    a, b = (
        Tensor("x", "a:0", np.dtype(np.float32), (1, 3), (0.0, 0)),
        Tensor("y", "b", np.dtype(np.int8), (2, 2, 2), (0.5, -3)),
    )
    assert found["first"].inputs == [Tensor("z", "c", np.dtype(np.int32), (5,), (0.0, 0)), a, b]
    assert found["first"].outputs[0] == Tensor("total", "sum", np.dtype(np.float32), (), (0.0, 0))
    assert [each.key for each in found["first"].outputs] == ["total", "same"]
    assert found["later"].inputs == [Tensor("k", "x", np.dtype(np.int64), (0, 7), (0.0, 0))]
    assert found["later"].outputs[0].quantization == (0.0, 0), "one scale per channel is no scale of the tensor"
    assert [each.bytes for each in found["first"].inputs + found["first"].outputs[:1] + found["later"].inputs] == [20, 12, 8, 4, 0]


@pytest.mark.parametrize("damage", ["empty", "another", "cut", "missing"])
def test_another_file_is_told_in_one_line(tmp_path, damage):
    data = write_model(tmp_path / "m.tflite").read_bytes()
    path = tmp_path / "x.tflite"
    if damage != "missing":
        path.write_bytes({"empty": b"", "another": b"PK\x03\x04" + bytes(400), "cut": data[:100]}[damage])
    with pytest.raises(DeviceTestError, match="not a TFLite file that can be fed") as told:
        read_signatures(path)
    assert "\n" not in str(told.value)
