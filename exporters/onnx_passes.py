"""Graph passes on the exported decoder, in their order: weights laid out for MatMul, Add and norm in one operator, names.

Every pass asks for the exact pattern that it replaces and leaves everything else alone; the numbers are proved afterwards, on the
finished file. Weights stay lazy: a transposed or packed matrix is made when it is written, one at a time.
"""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common as common_passes
from onnxscript.optimizer import optimize_ir

from exporters.onnx_head_passes import (
    drop_head_reshapes,
    drop_reshapes_before,
    drop_swaps_around_norms,
    fix_reshapes,
    rejoin_heads,
    rotations,
)
from exporters.onnx_packing import pack_qkv
from exporters.onnx_values import attribute, without_bias

FOLDED_ELEMENTS = 1024  # constants up to this size are computed at export: shapes and scalars, never weights
SKIP_NORMS = {"SimplifiedLayerNormalization": "SkipSimplifiedLayerNormalization", "LayerNormalization": "SkipLayerNormalization"}
ROW_BY_ROW = ("LayerNormalization", "SimplifiedLayerNormalization", "MatMul", "Add", "Mul", "Relu", "Gelu", "Tanh", "Sigmoid")
MICROSOFT = "com.microsoft"


@dataclass(frozen=True)
class PassCounts:
    """How often each fusion was done."""

    qkv_packed: int
    skip_norms: int
    head_reshapes_removed: int
    heads_rejoined: int  # cut into a rotated and a plain part where the operator rotates a part by itself


def fuse(model: ir.Model) -> PassCounts:
    """All passes, in order, in place. Names are deterministic afterwards and no trace of this machine remains."""
    common_passes.InlinePass()(model)
    fold_weight_transposes(model.graph)
    optimize_ir(model, input_size_limit=FOLDED_ELEMENTS, output_size_limit=FOLDED_ELEMENTS)
    keep_batches(model.graph)
    rejoined = rejoin_heads(model.graph)
    drop_swaps_around_norms(model.graph)
    reshapes = sum(drop_head_reshapes(node) for node in attention_nodes(model.graph))
    reshapes += sum(drop_reshapes_before(node, 1) for node in rotations(model.graph))
    common_passes.RemoveUnusedNodesPass()(model)  # dead reshapes still count as users of q, k and v
    fix_reshapes(model.graph)
    packed = sum(pack_qkv(model.graph, node) for node in attention_nodes(model.graph))
    norms = fuse_skip_norms(model.graph)
    common_passes.RemoveUnusedNodesPass()(model)
    name_everything(model)
    common_passes.ClearMetadataAndDocStringPass()(model)
    return PassCounts(qkv_packed=packed, skip_norms=norms, head_reshapes_removed=reshapes, heads_rejoined=rejoined)


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
        gathers = [user for user in users if user.op_type == "Gather" and attribute(user, "axis", 0) == 0]
        if len(turned) + len(gathers) != len(users):
            continue
        _replace_initializer(weight, _transposed(weight.const_value))
        for node in turned:
            node.outputs[0].replace_all_uses_with(weight)
            graph.remove(node, safe=True)
        for node in gathers:
            _gather_columns(graph, node)


def keep_batches(graph: ir.Graph) -> None:
    """Where a model flattens batch and sequence for its FFN (OPT does) and parts them again, row by row nothing needs it.

    Left flat, its norms could not take the residual in, and ONNX Runtime would make Gemm of products that are to be int8.
    """
    for start in [node for node in graph if node.op_type == "Reshape"]:
        given, flat = start.inputs[0].shape, start.outputs[0].shape
        if given is None or flat is None or (len(given), len(flat)) != (3, 2) or given[-1] != flat[-1]:
            continue
        inner, ends = _row_by_row(start.outputs[0])
        if not ends or any(end.outputs[0].shape is None or list(end.outputs[0].shape) != list(given) for end in ends):
            continue
        for node in inner:
            node.outputs[0].shape = ir.Shape([*given[:2], node.outputs[0].shape[-1]])
        for end in ends:
            end.outputs[0].replace_all_uses_with(end.inputs[0])
        start.outputs[0].replace_all_uses_with(start.inputs[0])


def _row_by_row(start: ir.Value) -> tuple[list[ir.Node], list[ir.Node]]:
    """Nodes that work on each row of ``start`` alone, and the reshapes where they end; no ends where something else reads them."""
    inner, ends, waiting = [], [], [start]
    while waiting:
        for node, _ in waiting.pop().uses():
            if node.op_type == "Reshape":
                ends.append(node)
            elif node.op_type not in ROW_BY_ROW:
                return [], []
            elif node not in inner:
                inner.append(node)
                waiting.append(node.outputs[0])
    known = {start, *(node.outputs[0] for node in inner)}
    foreign = any(value not in known and not value.is_initializer() for node in inner for value in node.inputs)
    return ([], []) if foreign else (inner, list(dict.fromkeys(ends)))


def fuse_skip_norms(graph: ir.Graph) -> int:
    """Add (with a bias before it, if there is one) and the norm that follows become one operator that also gives the sum."""
    fused = 0
    for norm in [node for node in graph if node.op_type in SKIP_NORMS]:
        total = norm.inputs[0]
        add = total.producer()
        if add is None or add.op_type != "Add" or any(tensor.is_initializer() for tensor in add.inputs):
            continue
        if not _of_one_shape(add) or len(norm.inputs[1].shape) != 1:
            continue
        first, second = add.inputs
        (first, bias), second = without_bias(first), second
        if bias is None:
            second, bias = without_bias(second)
        scales = list(norm.inputs[1:])  # gamma, and for LayerNormalization beta
        attributes = {"epsilon": ir.AttrFloat32("epsilon", attribute(norm, "epsilon", 1e-5))}
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


def _of_one_shape(add: ir.Node) -> bool:
    """Whether nothing is broadcast: the operator's own kernels check that, and say so only at run time."""
    shapes = [tensor.shape for tensor in add.inputs]
    return None not in shapes and len(shapes[0]) == 3 and list(shapes[0]) == list(shapes[1])


def _gather_columns(graph: ir.Graph, gather: ir.Node) -> None:
    """Rows of the table were wanted; they are columns now: ``[hidden, batch, seq]``, turned to ``[batch, seq, hidden]``."""
    columns = ir.Node("", "Gather", list(gather.inputs), [ir.AttrInt64("axis", 1)])
    turned = ir.Node("", "Transpose", [columns.outputs[0]], [ir.AttrInt64s("perm", [1, 2, 0])])
    turned.outputs[0].shape, turned.outputs[0].dtype = gather.outputs[0].shape, gather.outputs[0].dtype
    columns.outputs[0].dtype = gather.outputs[0].dtype
    graph.insert_before(gather, [columns, turned])
    gather.outputs[0].replace_all_uses_with(turned.outputs[0])
    graph.remove(gather, safe=True)


def _transposed(tensor: ir.TensorProtocol) -> ir.LazyTensor:
    shape = ir.Shape(list(tensor.shape)[::-1])

    def turn() -> ir.Tensor:
        return ir.tensor(np.ascontiguousarray(tensor.numpy().T), name=tensor.name)

    return ir.LazyTensor(turn, dtype=tensor.dtype, shape=shape, name=tensor.name)


def _replace_initializer(value: ir.Value, tensor: ir.TensorProtocol) -> None:
    value.const_value, value.shape = tensor, tensor.shape
