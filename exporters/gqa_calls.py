"""What one attention layer asks of GroupQueryAttention and RotaryEmbedding, and the two ways of answering: as operators in a
trace, and as plain PyTorch with the operators' semantics, against which a model is proved before it is traced.

Operators: ORT's docs/ContribOperators.md. What ORT 1.32's CPU kernels really take was measured by running them: windows, soft
caps, sinks, interleaved and partial rotation all work; norms of q and k inside the operator are refused (CUDA and WebGPU only).
"""

from dataclasses import dataclass

import torch
from torch.nn import functional

HEAD_SIZE_STEP = 8  # what the attention kernel takes
ROTARY_STEP = 16  # with rotation inside, of the head and of its rotated part; RotaryEmbedding takes any even size

Table = tuple[torch.Tensor, torch.Tensor]  # cos and sin, each [context, rotated / 2]


@dataclass(frozen=True)
class AttentionCall:
    """Causal attention of new tokens. ``query`` ``[batch, heads, seq, head_dim]``, ``key`` and ``value`` with kv_heads.

    ``window`` counts the keys that a token sees, itself included; ``sinks`` ``[heads]`` are logits of no key; with a ``table``
    query and key are still to be rotated, ``interleaved`` or in two halves.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    scale: float
    window: int | None = None
    softcap: float | None = None
    sinks: torch.Tensor | None = None
    table: Table | None = None
    interleaved: bool = False


@dataclass(frozen=True)
class Timeline:
    """Where the new tokens stand. ``seqlens_k`` int32 ``[batch]`` counts real tokens less one; ``positions`` ``[batch, seq]``."""

    seqlens_k: torch.Tensor
    total_length: torch.Tensor  # int32 scalar
    total_tokens: int
    positions: torch.Tensor


def emit_attention(call: AttentionCall, past: list[torch.Tensor], at: Timeline) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The operator in a trace: output ``[batch, seq, heads * head_dim]``, and the new key and value of the whole sequence."""
    batch, heads, seq, head_dim = call.query.shape
    kv_heads = call.key.shape[1]
    flat = [tensor.transpose(1, 2).reshape(batch, seq, -1) for tensor in (call.query, call.key, call.value)]
    inputs = [*flat, *past, at.seqlens_k, at.total_length]
    attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": call.scale}
    if call.table is not None:
        inputs += call.table
        attributes["do_rotary"] = 1
        if call.interleaved:
            attributes["rotary_interleaved"] = 1
    if call.window is not None:
        attributes["local_window_size"] = call.window
    if call.softcap is not None:
        attributes["softcap"] = float(call.softcap)
    if call.sinks is not None:
        inputs += [None] * (11 - len(inputs)) + [call.sinks]  # behind the tables, positions and a bias
    present = (batch, kv_heads, at.total_tokens, head_dim)
    return torch.onnx.ops.symbolic_multi_out(
        "com.microsoft::GroupQueryAttention",
        inputs,
        attributes,
        dtypes=(call.query.dtype,) * 3,
        shapes=((batch, seq, heads * head_dim), present, present),
        version=1,
    )


def emit_rotation(values: torch.Tensor, positions: torch.Tensor, table: Table, interleaved: bool) -> torch.Tensor:
    """RotaryEmbedding in a trace, on ``[batch, heads, seq, head_dim]``; what stands behind the rotated part stays as it is."""
    batch, heads, seq, head_dim = values.shape
    flat = values.transpose(1, 2).reshape(batch, seq, heads * head_dim)  # as the projections give it: no turning at run time
    attributes = {"num_heads": heads, "rotary_embedding_dim": 2 * table[0].shape[-1], "interleaved": int(interleaved)}
    turned = torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding",
        (flat, positions, *table),
        attributes,
        dtype=values.dtype,
        shape=flat.shape,
        version=1,
    )
    return turned.reshape(batch, seq, heads, head_dim).transpose(1, 2)


def emit_rotation_of_part(values: torch.Tensor, positions: torch.Tensor, table: Table, interleaved: bool) -> torch.Tensor:
    """As ``emit_rotation``, for heads of which the model has cut the rotated part out: a pass rotates the whole heads instead."""
    return torch.onnx.ops.symbolic(
        "com.microsoft::RotaryEmbedding",
        (values, positions, *table),
        {"interleaved": int(interleaved)},
        dtype=values.dtype,
        shape=values.shape,
        version=1,
    )


def attend_plainly(call: AttentionCall, positions: torch.Tensor) -> torch.Tensor:
    """What GroupQueryAttention computes without a past: ``[batch, seq, heads * head_dim]``."""
    query, key = call.query, call.key
    if call.table is not None:
        query, key = (rotate_plainly(values, positions, call.table, call.interleaved) for values in (query, key))
    batch, heads, seq, _ = query.shape
    key, value = (values.repeat_interleave(heads // values.shape[1], dim=1) for values in (key, call.value))
    scores = query @ key.transpose(2, 3) * call.scale  # [batch, heads, seq, seq]
    if call.softcap is not None:
        scores = call.softcap * torch.tanh(scores / call.softcap)
    ages = torch.arange(seq)[:, None] - torch.arange(seq)[None]
    hidden = (ages < 0) | (ages >= (call.window or seq))
    scores = scores.masked_fill(hidden, -torch.inf)
    if call.sinks is not None:
        scores = torch.cat([scores, call.sinks.reshape(1, -1, 1, 1).expand(batch, -1, seq, 1)], dim=-1)
    weights = functional.softmax(scores, dim=-1)[..., :seq]
    return (weights @ value).transpose(1, 2).reshape(batch, seq, -1)


def rotate_plainly(values: torch.Tensor, positions: torch.Tensor, table: Table, interleaved: bool) -> torch.Tensor:
    """What RotaryEmbedding computes on ``[batch, heads, seq, head_dim]`` at ``positions`` ``[batch, seq]``."""
    cos, sin = (part[positions][:, None] for part in table)  # [batch, 1, seq, rotated / 2]
    turned, rest = values.split([2 * cos.shape[-1], values.shape[-1] - 2 * cos.shape[-1]], dim=-1)
    first, second = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    parts = first * cos - second * sin, second * cos + first * sin
    joined = torch.stack(parts, dim=-1).flatten(-2) if interleaved else torch.cat(parts, dim=-1)
    return torch.cat([joined, rest], dim=-1)
