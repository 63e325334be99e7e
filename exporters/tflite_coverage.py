"""Which layers of a quantised TFLite file really are int8, read from the flatbuffer and compared with the float parent."""

from collections import Counter
from dataclasses import dataclass

from exporters.tflite_structure import Operator
from models.errors import GateError

ATTENTION_STAYS_FLOAT = "attention, norms, activations and residuals stay float: quantised, they cost quality on both runtimes"


@dataclass(frozen=True)
class Coverage:
    """Linear layers per signature, how many are int8, and what computes in float (operators of decode) with the reason."""

    linear_layers: int
    int8_linear_layers: int
    embedding_int8: bool
    float_operators: dict[str, int]
    float_reason: str


def check_coverage(found: list[Operator], parent: list[Operator], artifact: str, split_layers: int) -> Coverage:
    """GateError naming the first layer that is not as it must be, a signature that lost layers, or a weight stored twice.

    ``split_layers`` layers are meant to run as two operators on one weight.
    """
    for operator in found:
        if operator.name == "FULLY_CONNECTED":
            check_linear(operator, artifact)
        elif operator.name == "EMBEDDING_LOOKUP" and operator.inputs[1].dtype != "int8":
            raise GateError(f"{artifact}: {operator.where} in {operator.signature} reads a {operator.inputs[1].dtype} table, not int8")
        if operator.name in ("FULLY_CONNECTED", "EMBEDDING_LOOKUP") and operator.inputs[1].scales != 1:
            raise GateError(
                f"{artifact}: {operator.where} has {operator.inputs[1].scales} scales; tflite-runtime 2.14 computes only one rightly"
            )
    for signature in sorted({operator.signature for operator in parent}):
        count, expected = linear_count(found, signature) - split_layers, linear_count(parent, signature)
        if count != expected:
            raise GateError(f"{artifact}: {count} linear layers in {signature}, {expected} in the float file")
    stored, expected = len(weight_buffers(found)), len(weight_buffers(parent))
    if stored != expected:
        raise GateError(f"{artifact}: {stored} weights stored, {expected} in the float file; a shared weight was duplicated")
    decode = [operator for operator in found if operator.signature == "decode"]
    floats = Counter(operator.name for operator in decode if operator.name != "DEQUANTIZE" and operator.outputs[0].dtype == "float32")
    int8 = sum(operator.name == "FULLY_CONNECTED" and operator.inputs[1].dtype == "int8" for operator in decode)
    return Coverage(
        linear_layers=linear_count(parent, "decode"),
        int8_linear_layers=int8 - split_layers,
        embedding_int8=all(operator.inputs[1].dtype == "int8" for operator in found if operator.name == "EMBEDDING_LOOKUP"),
        float_operators=dict(sorted(floats.items())),
        float_reason=ATTENTION_STAYS_FLOAT,
    )


def check_linear(operator: Operator, artifact: str) -> None:
    """GateError unless input, weight and output are int8."""
    types = {
        "input": operator.inputs[0].dtype,
        "weight": operator.inputs[1].dtype,
        "output": operator.outputs[0].dtype,
    }
    wrong = [f"{part} is {dtype}" for part, dtype in types.items() if dtype != "int8"]
    if wrong:
        raise GateError(f"{artifact}: {operator.where} in {operator.signature} is not int8: {', '.join(wrong)}")


def linear_count(found: list[Operator], signature: str) -> int:
    return sum(operator.name == "FULLY_CONNECTED" and operator.signature == signature for operator in found)


def weight_buffers(found: list[Operator]) -> set[int]:
    """Distinct stored weights of linear layers and embeddings; a tied table counts once."""
    return {operator.inputs[1].buffer for operator in found if operator.name in ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")}
