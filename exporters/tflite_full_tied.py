"""Stores a tied embedding once in a full-integer TFLite file: the converter gives the looked-up table and the head's weight a copy each."""

from ai_edge_litert import schema_py_generated as schema

from exporters.tflite_edit import WEIGHT
from exporters.tflite_full_ranges import MOVING, operator_name

SPLITS_SCALES = "CONCATENATION"  # joins tensors that must have one scale, so one of them cannot be changed alone


def share_tied_tables(quantised: schema.ModelT, calibrated: schema.ModelT) -> int:
    """Let look-ups read the int8 weight of the linear layer whose float buffer they shared in ``calibrated``; how many were changed.

    Nothing is requantised: the scale of what is looked up becomes the weight's, and int8 operators take inputs of any scale.
    """
    changed = 0
    for before, after in zip(calibrated.subgraphs, quantised.subgraphs, strict=True):
        weights = {
            before.tensors[old.inputs[WEIGHT]].buffer: after.tensors[new.inputs[WEIGHT]]
            for old, new in pairs(calibrated, before, quantised, after, "FULLY_CONNECTED")
        }
        for old, new in pairs(calibrated, before, quantised, after, "GATHER"):
            weight = weights.get(before.tensors[old.inputs[0]].buffer)
            table = after.tensors[new.inputs[0]]
            moved = moved_from(quantised, after, int(new.outputs[0]))
            if weight is None or moved is None or list(weight.shape) != list(table.shape):
                continue
            table.buffer, table.quantization = weight.buffer, weight.quantization
            for index in moved:
                after.tensors[index].quantization = weight.quantization
            changed += 1
    return changed


def pairs(calibrated, before, quantised, after, name: str) -> list[tuple[schema.OperatorT, schema.OperatorT]]:
    """The operators of that name in the same subgraph before and after quantisation, which keeps their order."""
    old = [operator for operator in before.operators if operator_name(calibrated, operator) == name]
    new = [operator for operator in after.operators if operator_name(quantised, operator) == name]
    return list(zip(old, new, strict=True))


def moved_from(model: schema.ModelT, subgraph: schema.SubGraphT, tensor: int) -> set[int] | None:
    """``tensor`` and all that is only moved from it; None where that is joined with others."""
    found = {tensor}
    for operator in subgraph.operators:
        name = operator_name(model, operator)
        if name in MOVING and found & {int(index) for index in operator.inputs}:
            if name == SPLITS_SCALES:
                return None
            found |= {int(index) for index in operator.outputs}
    return found
