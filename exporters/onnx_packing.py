"""q, k and v from one product: three matrices that read the same input become one, and a split that the operator undoes goes.

Where q and k reach the attention operator untouched it takes the packed numbers as they are; where they are normalised or rotated
on the way, one Split hands them out. Weights stay lazy: a packed matrix is made when it is written.
"""

import numpy as np
import onnx_ir as ir

from exporters.onnx_head_order import in_order
from exporters.onnx_values import Linear, attribute, covers, linear_of, slice_of

FOR_EACH_HEAD = ("Reshape", "Transpose", "SimplifiedLayerNormalization", "LayerNormalization", "RotaryEmbedding", "Pad", "Mul")


def pack_qkv(graph: ir.Graph, attention: ir.Node) -> bool:
    """One MatMul (and one bias) in place of three that read the same input; or undo the split of one that is packed already."""
    query, key, value = attention.inputs[:3]
    packed = _unsplit(query, key, value) or in_order(graph, attention)
    if packed is not None:
        _feed_packed(attention, packed)
        return True
    linears = [linear_of(tensor) for tensor in (query, key, value)]
    direct = None not in linears
    if not direct:
        linears = [_linear_behind(tensor) for tensor in (query, key, value)]
    if None in linears or len({(linear.source, linear.bias is None) for linear in linears}) != 1:
        return False
    if direct:
        _feed_packed(attention, _packed_linear(graph, linears, attention))
    else:
        _split_packed(graph, linears)
    return True


def _unsplit(query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value | None:
    """What was cut into exactly q, k and v, in this order, along the last axis."""
    split = query.producer()
    if split is not None and split.op_type == "Split":
        return split.inputs[0] if tuple(split.outputs) == (query, key, value) and attribute(split, "axis", 0) in (2, -1) else None
    return covers([slice_of(part) for part in (query, key, value)])


def _linear_behind(value: ir.Value) -> Linear | None:
    """Walk up through what is done to each head, and through factors, to the linear layer that gives all heads."""
    if (linear := linear_of(value)) is not None:
        return linear
    node = value.producer()
    if node is None or node.op_type not in FOR_EACH_HEAD or len(value.uses()) != 1:
        return None
    sources = node.inputs if node.op_type == "Mul" else node.inputs[:1]
    return next(filter(None, map(_linear_behind, sources)), None)


def _feed_packed(attention: ir.Node, packed: ir.Value) -> None:
    for index, tensor in enumerate((packed, None, None)):
        attention.replace_input_with(index, tensor)


def _split_packed(graph: ir.Graph, linears: list[Linear]) -> None:
    """Hand out the packed product to the users of the three."""
    outputs = [linear.output for linear in linears]
    theirs = {node for linear in linears for node in linear.nodes}
    first = next(node for node in graph if node in theirs)
    packed = _packed_linear(graph, linears, first)
    sizes = np.array([output.shape[-1] for output in outputs], np.int64)
    name = f"split_sizes_{len(graph.initializers)}"
    lengths = ir.Value(name=name, shape=ir.Shape([3]), type=ir.TensorType(ir.DataType.INT64), const_value=ir.tensor(sizes, name=name))
    graph.register_initializer(lengths)
    split = ir.Node("", "Split", [packed, lengths], [ir.AttrInt64("axis", -1)], num_outputs=3)
    graph.insert_before(first, split)
    for new, old in zip(split.outputs, outputs, strict=True):
        new.shape, new.dtype = old.shape, old.dtype
        old.replace_all_uses_with(new)


def _packed_linear(graph: ir.Graph, linears: list[Linear], before: ir.Node) -> ir.Value:
    """``[batch, seq, (heads + 2 kv_heads) * head_dim]`` from one matrix; the packed weight is called after q's."""
    weight = _joined(graph, [linear.weight for linear in linears], axis=1)
    product = ir.Node("", "MatMul", [linears[0].source, weight])
    nodes = [product]
    if linears[0].bias is not None:
        nodes.append(ir.Node("", "Add", [product.outputs[0], _joined(graph, [linear.bias for linear in linears], axis=0)]))
    graph.insert_before(before, nodes)
    for node in nodes:
        node.outputs[0].dtype = ir.DataType.FLOAT
        node.outputs[0].shape = ir.Shape([*linears[0].source.shape[:2], weight.shape[1]])
    return nodes[-1].outputs[0]


def _joined(graph: ir.Graph, parts: list[ir.Value], axis: int) -> ir.Value:
    """A new lazy initializer of the parts side by side, called ``...qkv_proj...`` after the first."""
    tensors = [part.const_value for part in parts]
    sizes = list(tensors[0].shape)
    sizes[axis] = sum(tensor.shape[axis] for tensor in tensors)
    name = parts[0].name.replace("q_proj", "qkv_proj")
    if name in graph.initializers:  # equal vectors are stored once: packed ones of other layers need a name of their own
        name = f"{name}.{len(graph.initializers)}"

    def join() -> ir.Tensor:
        return ir.tensor(np.concatenate([tensor.numpy() for tensor in tensors], axis=axis), name=name)

    packed = ir.Value(name=name, shape=ir.Shape(sizes), type=ir.TensorType(ir.DataType.FLOAT))
    packed.const_value = ir.LazyTensor(join, dtype=ir.DataType.FLOAT, shape=ir.Shape(sizes), name=name)
    graph.register_initializer(packed)
    return packed
