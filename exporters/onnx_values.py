"""What the graph passes ask of a value: which linear layer it is the result of, which part of what, what constants made it."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir


@dataclass(frozen=True)
class Linear:
    """``source @ weight + bias``, computed by ``nodes``: weight ``[in, out]`` and bias ``[out]`` are initializers."""

    source: ir.Value
    weight: ir.Value
    bias: ir.Value | None
    nodes: tuple[ir.Node, ...]

    @property
    def output(self) -> ir.Value:
        return self.nodes[-1].outputs[0]


def linear_of(output: ir.Value) -> Linear | None:
    """The linear layer that ``output`` is the result of, and nothing but its bias reads its product."""
    product, bias = without_bias(output)
    node = product.producer()
    if node is None or node.op_type != "MatMul" or not node.inputs[1].is_initializer() or len(product.uses()) != 1:
        return None
    return Linear(node.inputs[0], node.inputs[1], bias, (node,) if bias is None else (node, output.producer()))


def without_bias(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """``(product, bias)`` where ``value`` is a MatMul plus a vector and used once; else ``(value, None)``."""
    add = value.producer()
    if add is None or add.op_type != "Add" or len(value.uses()) != 1:
        return value, None
    for product, bias in (add.inputs, reversed(add.inputs)):
        matmul = product.producer()
        if bias.is_initializer() and len(bias.const_value.shape) == 1 and matmul is not None and matmul.op_type == "MatMul":
            return product, bias
    return value, None


def attribute(node: ir.Node, name: str, default):
    return node.attributes[name].value if name in node.attributes else default


def constants_of(node: ir.Node) -> list[np.ndarray] | None:
    """All inputs but the first, where they are constants; else None."""
    given = [value for value in node.inputs[1:] if value is not None]
    return None if any(value.const_value is None for value in given) else [value.const_value.numpy() for value in given]


def slice_of(value: ir.Value) -> tuple[ir.Value, int, int, int] | None:
    """``(source, axis, start, end)`` where ``value`` is a part of ``source`` along one axis, without steps; counted from 0."""
    node = value.producer()
    if node is None or node.op_type != "Slice" or (numbers := constants_of(node)) is None:
        return None
    source = node.inputs[0]
    if len(numbers) < 3 or any(part.size != 1 for part in numbers) or (len(numbers) == 4 and int(numbers[3][0]) != 1):
        return None
    start, end, axis = (int(part[0]) for part in numbers[:3])
    axis %= len(source.shape)
    size = source.shape[axis]
    if not isinstance(size, int):
        return None
    return source, axis, *(min(edge, size) if edge >= 0 else size + edge for edge in (start, end))


def covers(parts: list[tuple[ir.Value, int, int, int] | None]) -> ir.Value | None:
    """What ``parts`` lie side by side to, in order and without a gap, along the last axis; None where they are not its whole."""
    if None in parts or len({(source, axis) for source, axis, _, _ in parts}) != 1:
        return None
    source, axis, first, _ = parts[0]
    whole = axis == len(source.shape) - 1 and first == 0 and parts[-1][3] == source.shape[axis]
    joined = all(left[3] == right[2] for left, right in zip(parts, parts[1:], strict=False))
    return source if whole and joined else None
