"""Graph passes on what lies between projections and attention: turned and cut heads, and shapes that are put together at run time.

Every pass asks for the exact pattern that it replaces and leaves everything else alone.
"""

import numpy as np
import onnx_ir as ir

from exporters.onnx_values import attribute, covers, slice_of

HEADS_AND_TOKENS_SWAPPED = [0, 2, 1, 3]
NORMS = ("SimplifiedLayerNormalization", "LayerNormalization")


def rotations(graph: ir.Graph) -> list[ir.Node]:
    return [node for node in graph if node.op_type == "RotaryEmbedding" and len(node.inputs[0].shape) == 3]


def fix_reshapes(graph: ir.Graph) -> None:
    """Shapes put together at run time become constants where only batch and sequence are unknown, which stay as they are."""
    for node in [node for node in graph if node.op_type == "Reshape" and node.inputs[1].const_value is None]:
        given, wanted = node.inputs[0].shape, node.outputs[0].shape
        if given is None or wanted is None or len(given) < 3 or list(given[:2]) != list(wanted[:2]):
            continue
        if None in (size.value for size in wanted[:2] if not isinstance(size, int)) or not all(
            isinstance(size, int) for size in wanted[2:]
        ):
            continue
        name = "_".join(["shape", *map(str, wanted[2:])])
        if name not in graph.initializers:
            sizes = ir.tensor(np.array([0, 0, *wanted[2:]], np.int64), name=name)
            graph.register_initializer(ir.Value(name=name, shape=sizes.shape, type=ir.TensorType(sizes.dtype), const_value=sizes))
        node.replace_input_with(1, graph.initializers[name])
        node.attributes.pop("allowzero", None)  # 0 means "as it was" here, not "none"


def drop_swaps_around_norms(graph: ir.Graph) -> None:
    """A norm over the last axis does not mind in which order heads and tokens come: no turning before it and back behind it."""
    for norm in [node for node in graph if node.op_type in NORMS and len(node.inputs[1].shape) == 1]:
        before, after = norm.inputs[0].producer(), [user for user, _ in norm.outputs[0].uses()]
        if not after or before is None or not all(map(_swaps_heads, (before, *after))):
            continue
        norm.replace_input_with(0, before.inputs[0])
        norm.outputs[0].shape = before.inputs[0].shape
        for node in after:
            node.outputs[0].replace_all_uses_with(norm.outputs[0])


def rejoin_heads(graph: ir.Graph) -> int:
    """Heads cut for a rotation of their first part and joined again: the operator that rotates takes them whole; count joints."""
    rejoined = 0
    for concat in [node for node in graph if node.op_type == "Concat" and attribute(node, "axis", 0) in (3, -1)]:
        if len(concat.inputs) != 2:
            continue
        rotation = concat.inputs[0].producer()
        rotated = rotation is not None and rotation.op_type == "RotaryEmbedding"
        first = rotation.inputs[0] if rotated else concat.inputs[0]
        whole = covers([slice_of(first), slice_of(concat.inputs[1])])
        if whole is None:
            continue
        if rotated:
            partial = {"num_heads": whole.shape[1], "rotary_embedding_dim": first.shape[-1]}
            attributes = [ir.AttrInt64(name, size) for name, size in partial.items()]
            attributes.append(ir.AttrInt64("interleaved", attribute(rotation, "interleaved", 0)))
            turned = ir.Node("com.microsoft", "RotaryEmbedding", [whole, *rotation.inputs[1:]], attributes)
            turned.outputs[0].shape, turned.outputs[0].dtype = whole.shape, whole.dtype
            graph.insert_before(concat, turned)
            whole = turned.outputs[0]
        concat.outputs[0].replace_all_uses_with(whole)
        graph.remove(concat, safe=True)
        rejoined += 1
    return rejoined


def drop_head_reshapes(attention: ir.Node) -> int:
    """Feed q, k and v from, and hand the output to, where they already are ``[batch, seq, heads * head_dim]``; count removals."""
    removed = drop_reshapes_before(attention, 3)
    output, width = attention.outputs[0], attention.outputs[0].shape[-1]
    for last in _reshaped_ends(output):
        if len(last.shape) == 3 and last.shape[-1] == width:
            last.replace_all_uses_with(output)
            removed += 1
    return removed


def drop_reshapes_before(node: ir.Node, inputs: int) -> int:
    """Feed the first ``inputs`` of ``node`` from where they already have its layout; count removals."""
    removed = 0
    for index in range(inputs):
        source = _flat_source(node.inputs[index])
        if source is not node.inputs[index]:
            node.replace_input_with(index, source)
            removed += 1
    return removed


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(attribute(node, "perm", [])) == HEADS_AND_TOKENS_SWAPPED


def _flat_source(value: ir.Value) -> ir.Value:
    """Walk up through reshapes and pairs of head transposes to the same numbers in the same shape; else ``value`` itself."""
    seen, swaps, width = value, 0, value.shape[-1]
    while (node := seen.producer()) is not None and node.op_type in ("Reshape", "Transpose"):
        if node.op_type == "Transpose":
            if not _swaps_heads(node):
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
