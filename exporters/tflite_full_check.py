"""What makes a TFLite file strictly full-integer, read from the flatbuffer: types, operators, and scales that host and graph share."""

from dataclasses import dataclass

from ai_edge_litert import schema_py_generated as schema

from exporters.tflite_structure import TYPE_NAMES, Operator
from models.errors import GateError

INTEGERS = ("int8", "int16", "int32", "int64", "bool")  # int64 and bool: arithmetic on indices
FLOAT_OPERATORS = ("DEQUANTIZE", "FAKE_QUANT")
NOT_BUILTIN = ("CUSTOM", "STABLEHLO_COMPOSITE")  # FLEX operators are custom ones


@dataclass(frozen=True)
class Scale:
    """How an int8 tensor is read: value = (number - zero_point) * scale."""

    scale: float
    zero_point: int


def check_strict(found: list[Operator], artifact: str) -> None:
    """GateError naming the first operator that is not pure integer, no builtin, or computes in more than int8."""
    for operator in found:
        if operator.name in NOT_BUILTIN or operator.name.startswith("STABLEHLO_"):
            raise GateError(f"{artifact}: {operator.where} in {operator.signature} is no builtin operator of full-integer runtimes")
        if operator.name in FLOAT_OPERATORS:
            raise GateError(f"{artifact}: {operator.where} in {operator.signature} turns integers into floats")
        tensors = [tensor for tensor in (*operator.inputs, *operator.outputs) if tensor is not None]
        for tensor in tensors:
            if tensor.dtype not in INTEGERS:
                raise GateError(f"{artifact}: {operator.where} in {operator.signature} has the {tensor.dtype} tensor {tensor.name}")
            if tensor.dtype == "int16":
                raise GateError(f"{artifact}: {operator.where} in {operator.signature} computes in int16, not int8")
            if tensor.dtype == "int8" and tensor.scales != 1:
                raise GateError(f"{artifact}: {operator.where} in {operator.signature}: {tensor.name} has {tensor.scales} scales, not one")


def check_types_and_scales(model: schema.ModelT, artifact: str) -> dict[str, Scale]:
    """The scale of every int8 tensor of the contract, by name.

    GateError where a mask, a cache or the logits are not int8, or where the same name means different numbers: in the other
    signature, or as ``new_k_0`` and ``k_0``, between which the host copies.
    """
    scales: dict[str, Scale] = {}
    for signature in model.signatureDefs:
        tensors = model.subgraphs[signature.subgraphIndex].tensors
        for entry in (*signature.inputs, *signature.outputs):
            tensor, name = tensors[entry.tensorIndex], entry.name.decode()
            where = f"{artifact}: {name} of {signature.signatureKey.decode()}"
            wanted = "int32" if name in ("tokens", "positions", "last") else "int8"
            if TYPE_NAMES[tensor.type] != wanted:
                raise GateError(f"{where} is {TYPE_NAMES[tensor.type]}, not {wanted}")
            if wanted == "int32":
                continue
            scale = Scale(float(tensor.quantization.scale[0]), int(tensor.quantization.zeroPoint[0]))
            known = scales.setdefault(name.removeprefix("new_"), scale)
            if known != scale:
                raise GateError(f"{where} has {scale}, elsewhere {known}; the host copies between them, so they must be equal")
    return scales
