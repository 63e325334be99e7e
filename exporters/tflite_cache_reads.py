"""Lets attention read the host's cache where it lies, at whatever length the host gives it.

The converter writes a product over four dimensions as one over three between two reshapes, and the transposed keys as an operator.
XNNPACK copies in each of them, so the whole cache was copied in every call, and the constants of the reshapes tied the graph to one
length of the cache. BATCH_MATMUL takes four dimensions and transposes by itself: without the reshapes nothing in the graph knows
the cache's length any more, and a host may resize the inputs ``k_*``, ``v_*`` and ``mask`` to as much of it as holds tokens.
"""

import copy
import re

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from exporters.tflite_edit import add_integers, operator_name, place_of
from exporters.tflite_structure import Operator
from models.errors import GateError

LAST_TWO_SWAPPED = [0, 1, 3, 2]
CACHE = re.compile(r"[kv]_\d+")
IN_PLACE = ("BATCH_MATMUL", "CONCATENATION")  # a concatenation copies too, but it is of values that a product would pack anyway


def read_cache_in_place(model: schema.ModelT) -> int:
    """Rewrite every product over three dimensions of ``model`` as one over four, in place; how many there were."""
    changed = 0
    for subgraph in model.subgraphs:
        made_by = {int(output): operator for operator in subgraph.operators for output in operator.outputs}
        for operator in list(subgraph.operators):
            if operator_name(model, operator) == "BATCH_MATMUL" and len(subgraph.tensors[operator.inputs[0]].shape) == 3:
                changed += lift(model, subgraph, operator, made_by)
        drop_unread(subgraph)
    return changed


def lift(model: schema.ModelT, subgraph: schema.SubGraphT, operator: schema.OperatorT, made_by: dict[int, schema.OperatorT]) -> bool:
    """Give a product a leading dimension of one; False where its inputs or what becomes of its output does not allow it."""
    sources = [made_by.get(int(tensor)) for tensor in operator.inputs]
    output = int(operator.outputs[0])
    users = [other for other in subgraph.operators if output in map(int, other.inputs)]
    if any(other is None or operator_name(model, other) != "RESHAPE" for other in (*sources, *users)):
        return False
    left, right = (lifted_input(model, subgraph, source) for source in sources)
    transpose = made_by.get(right)
    if transpose is not None and permutation(model, subgraph, transpose) == LAST_TWO_SWAPPED:
        right = int(transpose.inputs[0])
        operator.builtinOptions = copy.copy(operator.builtinOptions)
        operator.builtinOptions.adjY = not operator.builtinOptions.adjY
    operator.inputs = [left, right]
    subgraph.tensors[output].shape = [1, *map(int, subgraph.tensors[output].shape)]
    for reshape in users:
        redirect(subgraph, int(reshape.outputs[0]), output)
    return True


def lifted_input(model: schema.ModelT, subgraph: schema.SubGraphT, reshape: schema.OperatorT) -> int:
    """The tensor of four dimensions that ``reshape`` drops the first of, or a new one that is reshaped to them."""
    source, shape = int(reshape.inputs[0]), [1, *map(int, subgraph.tensors[reshape.outputs[0]].shape)]
    if list(map(int, subgraph.tensors[source].shape)) == shape:
        return source
    twin, tensor = copy.copy(reshape), copy.copy(subgraph.tensors[reshape.outputs[0]])
    tensor.shape = shape
    subgraph.tensors.append(tensor)
    twin.outputs = [len(subgraph.tensors) - 1]
    twin.inputs = [source, add_integers(model, subgraph, shape)]
    twin.builtinOptions = copy.copy(reshape.builtinOptions)
    if twin.builtinOptions is not None:
        twin.builtinOptions.newShape = np.array(shape, np.int32)
    subgraph.operators.insert(place_of((subgraph, reshape)), twin)
    return twin.outputs[0]


def redirect(subgraph: schema.SubGraphT, old: int, new: int) -> None:
    """Let the readers of ``old`` read ``new``, where that has the same shape and the graph does not give ``old`` out."""
    same = list(map(int, subgraph.tensors[old].shape)) == list(map(int, subgraph.tensors[new].shape))
    if same and old not in map(int, subgraph.outputs):
        for operator in subgraph.operators:
            operator.inputs = [new if int(tensor) == old else int(tensor) for tensor in operator.inputs]


def permutation(model: schema.ModelT, subgraph: schema.SubGraphT, transpose: schema.OperatorT) -> list[int]:
    """The constant order of dimensions of a TRANSPOSE, nothing for other operators."""
    if operator_name(model, transpose) != "TRANSPOSE":
        return []
    data = model.buffers[subgraph.tensors[transpose.inputs[1]].buffer].data
    return [] if data is None else data.view(np.int32).tolist()


def drop_unread(subgraph: schema.SubGraphT) -> None:
    """Remove operators whose results nothing reads any more, until none is left."""
    while True:
        read = {int(tensor) for tensor in subgraph.outputs} | {int(tensor) for op in subgraph.operators for tensor in op.inputs}
        kept = [operator for operator in subgraph.operators if any(int(output) in read for output in operator.outputs)]
        if len(kept) == len(subgraph.operators):
            return
        subgraph.operators = kept


def check_cache_reads(found: list[Operator], inputs: dict[str, dict[str, int]], artifact: str) -> None:
    """GateError naming an operator that copies or reshapes a cache before it is attended to.

    ``inputs`` are the index of each input tensor by name, of every signature.
    """
    caches = {(signature, index): name for signature, names in inputs.items() for name, index in names.items() if CACHE.fullmatch(name)}
    for operator in found:
        for tensor in operator.inputs:
            name = None if tensor is None else caches.get((operator.signature, tensor.index))
            if name and operator.name not in IN_PLACE:
                raise GateError(
                    f"{artifact}: {operator.where} in {operator.signature} copies the cache {name} in every call; attention must read it"
                    " as it is"
                )
