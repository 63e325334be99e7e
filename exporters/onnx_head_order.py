"""A packed product whose heads lie in another order than the attention operator's (q, k and v of each head in turn): the columns
of its matrix are put in order at export, and nothing is moved at run time. Where each number goes is computed, not recognised."""

import numpy as np
import onnx_ir as ir

from exporters.onnx_values import Linear, attribute, constants_of, linear_of, slice_of

MOVES = ("Reshape", "Unsqueeze", "Transpose", "Split", "Slice", "Gather")
SIZES = {"batch": 1, "sequence": 2}  # two tokens, so that what mixes tokens is seen


def in_order(graph: ir.Graph, attention: ir.Node) -> ir.Value | None:
    """The product that q, k and v are cut from, its columns now in the operator's order; None where that is not all it gives."""
    parts = attention.inputs[:3]
    root = parts[0]
    while (node := root.producer()) is not None and node.op_type in MOVES:
        root = node.inputs[0]
    linear = linear_of(root)
    if linear is None:
        return None
    moved = [moved_columns(part, root) for part in parts]
    if any(columns is None for columns in moved):
        return None
    width = root.shape[-1]
    if any(columns.ndim != 3 or not np.array_equal(columns[0, 0] + width, columns[0, 1]) for columns in moved):
        return None
    order = np.concatenate([columns[0, 0] for columns in moved])
    if sorted(order) != list(range(width)):  # some numbers go elsewhere, or nowhere
        return None
    if not np.array_equal(order, np.arange(len(order))):
        _reorder(graph, linear, order)
    return root


def moved_columns(value: ir.Value, root: ir.Value) -> np.ndarray | None:
    """Which number of ``root`` each number of ``value`` is, for two tokens; None where it is not merely moved."""
    if value is root:
        return np.arange(2 * root.shape[-1]).reshape(1, 2, -1)  # [batch, seq, columns]
    node = value.producer()
    if node is None or node.op_type not in MOVES:
        return None
    given = moved_columns(node.inputs[0], root)
    if given is None:
        return None
    if node.op_type in ("Reshape", "Unsqueeze"):
        sizes = [size if isinstance(size, int) else SIZES.get(size.value) for size in value.shape]
        return None if None in sizes or np.prod(sizes) != given.size else given.reshape(sizes)
    constants = constants_of(node)
    if constants is None:
        return None
    if node.op_type == "Transpose":
        return given.transpose(attribute(node, "perm", None))
    if node.op_type == "Gather":
        return np.take(given, constants[0], axis=attribute(node, "axis", 0))
    if node.op_type == "Slice":
        cut = slice_of(value)
        return None if cut is None else np.take(given, range(*cut[2:]), axis=cut[1])
    axis = attribute(node, "axis", 0)
    edges = np.cumsum(constants[0])[:-1] if constants else len(node.outputs)
    return np.split(given, edges, axis=axis)[node.outputs.index(value)]


def _reorder(graph: ir.Graph, linear: Linear, order: np.ndarray) -> None:
    for old in filter(None, (linear.weight, linear.bias)):
        name = old.name if len(old.uses()) == 1 else f"{old.name}.{len(graph.initializers)}"  # equal vectors are stored once
        tensor = _taken(old.const_value, order, name)
        if name == old.name:
            old.const_value = tensor
            continue
        new = ir.Value(name=name, shape=old.shape, type=ir.TensorType(ir.DataType.FLOAT), const_value=tensor)
        graph.register_initializer(new)
        for node in linear.nodes:
            for index, value in enumerate(node.inputs):
                if value is old:
                    node.replace_input_with(index, new)


def _taken(tensor: ir.TensorProtocol, order: np.ndarray, name: str) -> ir.LazyTensor:
    def take() -> ir.Tensor:
        return ir.tensor(np.ascontiguousarray(tensor.numpy()[..., order]), name=name)

    return ir.LazyTensor(take, dtype=tensor.dtype, shape=tensor.shape, name=name)
