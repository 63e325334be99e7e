"""Which weights of a dynamic or weight-only TFLite file really are int8 and what computes with them, read from the flatbuffer."""

from collections import Counter
from dataclasses import dataclass

import numpy as np

from exporters.tflite_coverage import WEIGHTED, linear_count, weight_buffers
from exporters.tflite_structure import Operator, Tensor
from models.errors import GateError

HYBRID = "hybrid: float activations and int8 weights go in, the runtime quantises the activations of each call"
DEQUANTISED = "float: DEQUANTIZE makes the weights float when they are loaded, activations are never quantised"


@dataclass(frozen=True)
class WeightCoverage:
    """Operators of decode; ``weights`` numbers are stored in ``stored_weights`` matrices, ``scales`` of them in all."""

    linear_layers: int
    int8_linear_layers: int
    embedding_int8: bool
    kernels: str
    weights: int
    stored_weights: int
    scales: int
    float_operators: dict[str, int]


def check_weights(found: list[Operator], parent: list[Operator], artifact: str, dequantised: bool) -> WeightCoverage:
    """GateError naming the first layer whose weight is not int8 or is used in the wrong way, or a weight stored twice."""
    sources = stored_tensors(found)
    stored: dict[int, Tensor] = {}
    for operator in (operator for operator in found if operator.name in WEIGHTED):
        weight = stored_weight(operator, sources, artifact, dequantised)
        stored[weight.buffer] = weight
    for signature in sorted({operator.signature for operator in parent}):
        count, expected = linear_count(found, signature), linear_count(parent, signature)
        if count != expected:
            raise GateError(f"{artifact}: {count} linear layers in {signature}, {expected} in the float file")
    expected = len(weight_buffers(parent))
    if len(stored) != expected:
        raise GateError(f"{artifact}: {len(stored)} weights stored, {expected} in the float file; a shared weight was duplicated")
    decode = [operator for operator in found if operator.signature == "decode"]
    lookups = [operator for operator in decode if operator.name == "EMBEDDING_LOOKUP"]
    linear = linear_count(found, "decode")
    return WeightCoverage(
        linear_layers=linear,
        int8_linear_layers=linear,  # stored_weight has refused any other
        embedding_int8=bool(lookups),
        kernels=DEQUANTISED if dequantised else HYBRID,
        weights=sum(int(np.prod(weight.shape)) for weight in stored.values()),
        stored_weights=len(stored),
        scales=sum(weight.scales for weight in stored.values()),
        float_operators=dict(sorted(Counter(op.name for op in decode if op.outputs[0].dtype == "float32").items())),
    )


def stored_tensors(found: list[Operator]) -> dict[tuple[str, int], Tensor]:
    """The constant behind each tensor that DEQUANTIZE makes, by signature and the tensor's index."""
    return {
        (operator.signature, operator.outputs[0].index): operator.inputs[0]
        for operator in found
        if operator.name == "DEQUANTIZE" and operator.inputs[0].constant
    }


def stored_weight(operator: Operator, sources: dict[tuple[str, int], Tensor], artifact: str, dequantised: bool) -> Tensor:
    """The int8 tensor that a linear layer or a lookup reads; GateError where it is another or reaches it in another way."""
    where = f"{artifact}: {operator.where} in {operator.signature}"
    read = operator.inputs[1]
    weight = sources.get((operator.signature, read.index), read)
    if weight.dtype != "int8" or not weight.constant:
        raise GateError(f"{where} has a {weight.dtype} weight, not a stored int8 one")
    if dequantised and weight is read:
        raise GateError(f"{where} reads its int8 weight without DEQUANTIZE, so activations would be quantised")
    if not dequantised and weight is not read:
        raise GateError(f"{where} computes in float, its weight is dequantised first")
    if not dequantised and weight.scales != 1:
        raise GateError(f"{where} has {weight.scales} scales; tflite-runtime 2.14 returns zeros for more than one")
    if not weight.scales:
        raise GateError(f"{where} has an int8 weight without a scale")
    if operator.outputs[0].dtype != "float32" or (operator.name == "FULLY_CONNECTED" and operator.inputs[0].dtype != "float32"):
        raise GateError(f"{where} computes {operator.inputs[0].dtype} to {operator.outputs[0].dtype}; activations must stay float")
    return weight
