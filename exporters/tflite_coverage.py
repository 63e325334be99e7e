"""Which layers of a quantised TFLite file really are int8, read from the flatbuffer and compared with the float parent."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

from exporters.tflite_structure import Operator
from models.errors import GateError

ATTENTION_STAYS_FLOAT = "attention, norms, activations and residuals stay float: quantised, they cost quality on both runtimes"


@dataclass(frozen=True)
class Coverage:
    """Linear layers per signature, how many are int8, and what computes in float (operators of decode) with the reason.

    ``dynamic_linear_layers`` are int8 layers of decode that quantise their inputs in each call.
    """

    linear_layers: int
    int8_linear_layers: int
    dynamic_linear_layers: tuple[str, ...]
    embedding_int8: bool
    float_operators: dict[str, int]
    float_reason: str


@dataclass(frozen=True)
class Expected:
    """The float ``parent``; how many of its layers run as two operators on one weight; patterns of those that are dynamic."""

    parent: list[Operator]
    split_layers: int = 0
    dynamic: tuple[str, ...] = ()


def is_dynamic(operator: Operator, patterns: Iterable[str]) -> bool:
    """Whether one of ``patterns``, parts of names or shell patterns, is found in the name of a linear layer's output."""
    return any(fnmatchcase(operator.outputs[0].name, f"*{pattern}*") for pattern in patterns)


def check_coverage(found: list[Operator], expected: Expected, artifact: str) -> Coverage:
    """GateError naming the first layer that is not as it must be, a signature that lost layers, or a weight stored twice."""
    parent, split_layers = expected.parent, expected.split_layers
    for operator in found:
        if operator.name == "FULLY_CONNECTED":
            check_linear(operator, artifact, "float32" if is_dynamic(operator, expected.dynamic) else "int8")
        elif operator.name == "EMBEDDING_LOOKUP" and operator.inputs[1].dtype != "int8":
            raise GateError(f"{artifact}: {operator.where} in {operator.signature} reads a {operator.inputs[1].dtype} table, not int8")
        if operator.name in ("FULLY_CONNECTED", "EMBEDDING_LOOKUP") and operator.inputs[1].scales != 1:
            raise GateError(
                f"{artifact}: {operator.where} has {operator.inputs[1].scales} scales; tflite-runtime 2.14 computes only one rightly"
            )
    for signature in sorted({operator.signature for operator in parent}):
        count, wanted = linear_count(found, signature) - split_layers, linear_count(parent, signature)
        if count != wanted:
            raise GateError(f"{artifact}: {count} linear layers in {signature}, {wanted} in the float file")
    stored, wanted = len(weight_buffers(found)), len(weight_buffers(parent))
    if stored != wanted:
        raise GateError(f"{artifact}: {stored} weights stored, {wanted} in the float file; a shared weight was duplicated")
    decode = [operator for operator in found if operator.signature == "decode"]
    floats = Counter(operator.name for operator in decode if operator.name != "DEQUANTIZE" and operator.outputs[0].dtype == "float32")
    int8 = sum(operator.name == "FULLY_CONNECTED" and operator.inputs[1].dtype == "int8" for operator in decode)
    return Coverage(
        linear_layers=linear_count(parent, "decode"),
        int8_linear_layers=int8 - split_layers,
        dynamic_linear_layers=tuple(
            dict.fromkeys(
                operator.where for operator in decode if operator.name == "FULLY_CONNECTED" and operator.inputs[0].dtype == "float32"
            )
        ),
        embedding_int8=all(operator.inputs[1].dtype == "int8" for operator in found if operator.name == "EMBEDDING_LOOKUP"),
        float_operators=dict(sorted(floats.items())),
        float_reason=ATTENTION_STAYS_FLOAT,
    )


def check_linear(operator: Operator, artifact: str, activations: str) -> None:
    """GateError unless the weight is int8 and input and output are ``activations``: int8, or float32 in a dynamic layer."""
    types = {
        "input": operator.inputs[0].dtype,
        "weight": operator.inputs[1].dtype,
        "output": operator.outputs[0].dtype,
    }
    wanted = {"weight": "int8", "input": activations, "output": activations}
    wrong = [f"{part} is {dtype}" for part, dtype in types.items() if dtype != wanted[part]]
    if wrong:
        kind = "int8" if activations == "int8" else "dynamic int8"
        raise GateError(f"{artifact}: {operator.where} in {operator.signature} is not {kind}: {', '.join(wrong)}")


def linear_count(found: list[Operator], signature: str) -> int:
    return sum(operator.name == "FULLY_CONNECTED" and operator.signature == signature for operator in found)


def weight_buffers(found: list[Operator]) -> set[int]:
    """Distinct stored weights of linear layers and embeddings; a tied table counts once."""
    return {operator.inputs[1].buffer for operator in found if operator.name in ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")}
