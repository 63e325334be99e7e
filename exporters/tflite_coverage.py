"""Which layers of a quantised TFLite file really are int8, read from the flatbuffer and compared with the float parent."""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase

import numpy as np

from exporters.tflite_structure import Operator, Tensor
from models.errors import GateError

WEIGHTED = ("FULLY_CONNECTED", "EMBEDDING_LOOKUP")
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
    return is_named(operator.outputs[0].name, patterns)


def is_named(name: str, patterns: Iterable[str]) -> bool:
    """Whether one of ``patterns``, parts of names or shell patterns, is found in ``name``."""
    return any(fnmatchcase(name, f"*{pattern}*") for pattern in patterns)


def check_coverage(found: list[Operator], expected: Expected, artifact: str) -> Coverage:
    """GateError naming the first layer that is not as it must be, a signature that lost layers, or a weight stored twice."""
    parent, split_layers = expected.parent, expected.split_layers
    for operator in found:
        if operator.name == "FULLY_CONNECTED":
            check_linear(operator, artifact, "float32" if is_dynamic(operator, expected.dynamic) else "int8")
        elif operator.name == "EMBEDDING_LOOKUP" and operator.inputs[1].dtype != "int8":
            raise GateError(f"{artifact}: {operator.where} in {operator.signature} reads a {operator.inputs[1].dtype} table, not int8")
        if operator.name in WEIGHTED and operator.inputs[1].scales != 1:
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


def check_shared(found: list[Operator], artifact: str) -> None:
    """GateError naming a linear layer or an embedding whose weight is stored for one signature and not for another."""
    read: dict[str, dict[int, Operator]] = {}
    for operator in found:
        if operator.name in WEIGHTED:
            read.setdefault(operator.signature, {}).setdefault(operator.inputs[1].buffer, operator)
    for signature, weights in read.items():
        for other, others in read.items():
            alone = [weight for weight in weights if weight not in others]
            if alone:
                raise GateError(
                    f"{artifact}: {weights[alone[0]].where} in {signature} reads a weight that {other} does not read; it is stored twice"
                )


def check_packed_once(found: list[Operator], artifact: str) -> None:
    """GateError naming a linear layer that LiteRT's weight cache would compute with the numbers of another one.

    XNNPACK folds the scales and zero points of inputs and outputs into the weight that it packs, and its cache finds a packed weight by
    the weight and the bias alone. So wherever these two are the same, the scales must be.
    """
    first: dict[tuple[int, int | None], Operator] = {}
    for operator in (operator for operator in found if operator.name == "FULLY_CONNECTED"):
        weight, bias = (*operator.inputs[1:3], None)[:2]
        known = first.setdefault((weight.buffer, None if bias is None else bias.buffer), operator)
        if [(end.dtype, end.scale) for end in ends(operator)] != [(end.dtype, end.scale) for end in ends(known)]:
            raise GateError(
                f"{artifact}: {operator.where} in {operator.signature} has the weight and the bias of {known.outputs[0].name} in"
                f" {known.signature}, and other scales; LiteRT's weight cache takes both for one and computes one of them wrongly"
            )


def ends(operator: Operator) -> tuple[Tensor, Tensor]:
    """What goes into a linear layer and what comes out."""
    return operator.inputs[0], operator.outputs[0]


def check_last_row(found: list[Operator], artifact: str) -> None:
    """GateError where a signature computes logits for more than one token: hosts read the last one's, and the head is a large part."""
    heads = {operator.signature: operator for operator in found if operator.name == "FULLY_CONNECTED"}  # the last of each
    for signature, head in heads.items():
        rows = int(np.prod(head.outputs[0].shape[:-1]))
        if rows != 1:
            raise GateError(f"{artifact}: {head.where} in {signature} computes {rows} rows of logits, one is read")


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
    return {operator.inputs[1].buffer for operator in found if operator.name in WEIGHTED}
