"""Graph passes on the exported decoder: weights laid out for MatMul, q, k and v packed, Add and norm in one operator.

Every pass asks for the exact pattern that it replaces and leaves everything else alone; the numbers are proved afterwards, on the
finished file. Weights stay lazy: a transposed or packed matrix is made when it is written, one at a time.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes
from onnxscript.optimizer import optimize_ir

FOLDED_ELEMENTS = 1024  # constants up to this size are computed at export: shapes and scalars, never weights
HEADS_AND_TOKENS_SWAPPED = [0, 2, 1, 3]
SKIP_NORMS = {"SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization", "LayerNormalization": "SkipLayerNormalization"}
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class PassCounts:
    """How often each fusion was done."""

    qkv_packed: int
    skip_norms: int
    head_reshapes_removed: int


def fuse(model: ir.Model) -> PassCounts:
    """All passes, in order, in place. Names are deterministic afterwards and no trace of this machine remains."""
    common_passes.InlinePass()(model)
    fold_weight_transposes(model.graph)
    optimize_ir(model, input_size_limit=FOLDED_ELEMENTS, output_size_limit=FOLDED_ELEMENTS)
    reshapes = sum(drop_head_reshapes(node) for node in attention_nodes(model.graph))
    common_passes.RemoveUnusedNodesPass()(model)  # dead reshapes still count as users of q, k and v
    packed = sum(pack_qkv(model.graph, node) for node in attention_nodes(model.graph))
    norms = fuse_skip_norms(model.graph)
    common_passes.RemoveUnusedNodesPass()(model)
    name_everything(model)
    common_passes.ClearMetadataAndDocStringPass()(model)
    return PassCounts(qkv_packed=packed, skip_norms=norms, head_reshapes_removed=reshapes)


def attention_nodes(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "GroupQueryAttention"]


def fold_weight_transposes(graph: ir.Graph) -> None:
    """Store every matrix that is only used transposed as ``[in, out]``, which is how MatMul wants it.

    A table that is embedding and head at once becomes ``[hidden, vocab]`` too, and the embedding picks columns: one copy
    in the file, and no transpose of it at run time.
    """
    transposes = [node for node in graph if node.op_type == "Transpose" and node.inputs[0].is_initializer()]
    for weight in dict.fromkeys(node.inputs[0] for node in transposes):
        if len(weight.const_value.shape) != 2:
            continue
        users = [user for user, _ in weight.uses()]
        turned = [user for user in users if user.op_type == "Transpose"]
        gathers = [user for user in users if user.op_type == "Gather" and _attribute(user, "axis", 0) == 0]
        if len(turned) + len(gathers) != len(users):
            continue
        _replace_initializer(weight, _transposed(weight.const_value))
        for node in turned:
            node.outputs[0].replace_all_uses_with(weight)
            graph.remove(node, safe=True)
        for node in gathers:
            _gather_columns(graph, node)


def drop_head_reshapes(attention: ir.Node) -> int:
    """Feed q, k and v from, and hand the output to, where they already are ``[batch, seq, heads * head_dim]``; count removals."""
    removed = 0
    for index in range(3):
        source = _flat_source(attention.inputs[index])
        if source is not attention.inputs[index]:
            attention.replace_input_with(index, source)
            removed += 1
    output, width = attention.outputs[0], attention.outputs[0].shape[-1]
    for last in _reshaped_ends(output):
        if len(last.shape) == 3 and last.shape[-1] == width:
            last.replace_all_uses_with(output)
            removed += 1
    return removed


def pack_qkv(graph: ir.Graph, attention: ir.Node) -> bool:
    """One MatMul (and one bias) in place of three that read the same input; or undo the split of one that is packed already."""
    query, key, value = attention.inputs[:3]
    if query.producer().op_type == "Split":
        packed = _unsplit(query, key, value)
    else:
        linears = [_linear_of(tensor) for tensor in (query, key, value)]
        if None in linears or len({(id(linear.source), linear.bias is None) for linear in linears}) != 1:
            return False
        packed = _packed_linear(graph, linears, attention)
    if packed is None:
        return False
    for index, tensor in enumerate((packed, None, None)):
        attention.replace_input_with(index, tensor)
    return True


def fuse_skip_norms(graph: ir.Graph) -> int:
    """Add (with a bias before it, if there is one) and the norm that follows become one operator that also gives the sum."""
    fused = 0
    for norm in [node for node in graph if node.op_type in SKIP_NORMS]:
        total = norm.inputs[0]
        add = total.producer()
        if add is None or add.op_type != "Add" or any(tensor.is_initializer() for tensor in add.inputs):
            continue
        first, second = add.inputs
        (first, bias), second = _without_bias(first), second
        if bias is None:
            second, bias = _without_bias(second)
        scales = list(norm.inputs[1:])  # gamma, and for LayerNormalization beta
        attributes = {"epsilon": ir.AttrFloat32("epsilon", _attribute(norm, "epsilon", 1e-5))}
        skip = ir.Node(MICROSOFT, SKIP_NORMS[norm.op_type], [first, second, *scales, bias], attributes.values(), num_outputs=4)
        for new, old in ((skip.outputs[0], norm.outputs[0]), (skip.outputs[3], total)):
            new.shape, new.dtype = old.shape, old.dtype
        # The sum's other users come after the Add, but perhaps before the norm: the operator takes the place of the Add.
        graph.insert_after(add, skip)
        norm.outputs[0].replace_all_uses_with(skip.outputs[0])
        graph.remove(norm, safe=True)
        total.replace_all_uses_with(skip.outputs[3])
        graph.remove(add, safe=True)
        fused += 1
    return fused


def name_everything(model: ir.Model) -> None:
    """Linear layers are called as in the checkpoint, all else by operator and running number."""
    graph, counters, taken = model.graph, {}, set()
    for index, (name, value) in enumerate(sorted(graph.initializers.items())):
        if name.startswith("model."):
            value.name = name.removeprefix("model.")
        elif not name.endswith("_cache"):
            value.name = f"constant_{index}"
    kept = {value for value in (*graph.inputs, *graph.outputs)}
    for node in graph:
        matrices = [value for value in node.inputs if node.op_type == "MatMul" and value.is_initializer()]
        counters[node.op_type] = counters.get(node.op_type, -1) + 1
        running = f"{node.op_type}_{counters[node.op_type]}"
        weight_name = matrices[0].name.removesuffix(".weight") if matrices else running
        node.name = running if weight_name in taken else weight_name  # equal matrices are stored once, under one name
        taken.add(node.name)
        for index, value in enumerate(node.outputs):
            if value not in kept and value.uses():
                value.name = node.name + (f".{index}" if len(node.outputs) > 1 else "") + ".output"
            elif value not in kept:
                value.name = ""


@dataclass(frozen=True)
class _Linear:
    """``source @ weight + bias``: weight ``[in, out]`` and bias ``[out]`` are initializers."""

    source: ir.Value
    weight: ir.Value
    bias: ir.Value | None


def _linear_of(output: ir.Value) -> _Linear | None:
    product, bias = _without_bias(output)
    node = product.producer()
    if node is None or node.op_type != "MatMul" or not node.inputs[1].is_initializer() or len(product.uses()) != 1:
        return None
    return _Linear(node.inputs[0], node.inputs[1], bias)


def _without_bias(value: ir.Value) -> tuple[ir.Value, ir.Value | None]:
    """``(product, bias)`` where ``value`` is a MatMul plus a vector and used once; else ``(value, None)``."""
    add = value.producer()
    if add is None or add.op_type != "Add" or len(value.uses()) != 1:
        return value, None
    for product, bias in (add.inputs, reversed(add.inputs)):
        matmul = product.producer()
        if bias.is_initializer() and len(bias.const_value.shape) == 1 and matmul is not None and matmul.op_type == "MatMul":
            return product, bias
    return value, None


def _packed_linear(graph: ir.Graph, linears: list[_Linear], before: ir.Node) -> ir.Value:
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


def _unsplit(query: ir.Value, key: ir.Value, value: ir.Value) -> ir.Value | None:
    """What was split into exactly q, k and v, in this order, along the last axis."""
    split = query.producer()
    if tuple(split.outputs) != (query, key, value) or _attribute(split, "axis", 0) not in (2, -1):
        return None
    return split.inputs[0]


def _flat_source(value: ir.Value) -> ir.Value:
    """Walk up through reshapes and pairs of head transposes to the same numbers in the same shape; else ``value`` itself."""
    seen, swaps, width = value, 0, value.shape[-1]
    while (node := seen.producer()) is not None and node.op_type in ("Reshape", "Transpose"):
        if node.op_type == "Transpose":
            if list(_attribute(node, "perm", [])) != HEADS_AND_TOKENS_SWAPPED:
                return value
            swaps += 1
        seen = node.inputs[0]
        if swaps % 2 == 0 and seen.shape is not None and len(seen.shape) == 3 and seen.shape[-1] == width:
            return seen
    return value


def _reshaped_ends(value: ir.Value) -> list[ir.Value]:
    """What becomes of ``value`` after one reshape and after each further one."""
    ends = []
    for node in [user for user, index in value.uses() if user.op_type == "Reshape" and index == 0]:
        ends += [node.outputs[0], *_reshaped_ends(node.outputs[0])]
    return ends


def _gather_columns(graph: ir.Graph, gather: ir.Node) -> None:
    """Rows of the table were wanted; they are columns now: ``[hidden, batch, seq]``, turned to ``[batch, seq, hidden]``."""
    columns = ir.Node("", "Gather", list(gather.inputs), [ir.AttrInt64("axis", 1)])
    turned = ir.Node("", "Transpose", [columns.outputs[0]], [ir.AttrInt64s("perm", [1, 2, 0])])
    turned.outputs[0].shape, turned.outputs[0].dtype = gather.outputs[0].shape, gather.outputs[0].dtype
    columns.outputs[0].dtype = gather.outputs[0].dtype
    graph.insert_before(gather, [columns, turned])
    gather.outputs[0].replace_all_uses_with(turned.outputs[0])
    graph.remove(gather, safe=True)


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


def _transposed(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    shape = ir.Shape(list(tensor.shape)[::-1])

    def turn() -> ir.Tensor:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=tensor.name)

    return ir.LazyTensor(turn, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _replace_initializer(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    value.const_value, value.shape = tensor, tensor.shape


def _attribute(node: ir.Node, name: str, default):
    return node.attributes[name].value if name in node.attributes else default
