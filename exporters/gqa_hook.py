"""Makes an unmodified transformers decoder say its attention and norms in the operators that ONNX Runtime runs fastest.

transformers models call attention through ``ALL_ATTENTION_FUNCTIONS``: one registered function emits
``com.microsoft::GroupQueryAttention``, whose name is unknown to the mask registry, so no mask is built. Rotation moves into the
operator only where the arguments of the attention call are the very tensors that the rotary function returned: a model that
changes q or k after rotating keeps its own rotation. Operators: ORT's docs/ContribOperators.md.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from models.checkpoint import ModelShape
from models.errors import UserError

ATTENTION_NAME = "pocketlm_group_query_attention"
HEAD_SIZE_STEP = 8  # what the operator's kernel takes; with rotation inside twice that
ROTARY_HEAD_SIZE_STEP = 16
LENGTH_DEPENDENT_ROTARY = ("dynamic", "longrope")  # frequencies that change with the length: no table can hold them
NORM_PROBE_TOLERANCE = 1e-5


@dataclass(frozen=True)
class Fusions:
    """What the model's forward pass was seen to allow. ``rms_norms``: module names that a numeric probe confirmed."""

    rotate_inside: bool
    rms_norms: tuple[str, ...]


class PassThroughCache(DynamicCache):
    """Hands the new keys and values through: the operator appends them to the past itself."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # noqa: ARG002 - transformers' signature
        return key_states, value_states


class GroupQueryDecoder(nn.Module):
    """The decoder with flat inputs and outputs; valid only inside ``attention_as_operator``.

    ``past`` is key and value of every layer in turn, each ``[batch, kv_heads, past, head_dim]``.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape, fusions: Fusions) -> None:
        super().__init__()
        self.model, self.shape, self.fusions = model, shape, fusions
        if fusions.rotate_inside:
            cos, sin = rotary_table(model, shape.context_tokens)
            self.register_buffer("cos_cache", cos, persistent=False)
            self.register_buffer("sin_cache", sin, persistent=False)

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits ``[batch, seq, vocab]`` and key and value of every layer, each ``[batch, kv_heads, past + seq, head_dim]``."""
        lengths = attention_mask.sum(1)  # [batch], real tokens: right padding counts for nothing
        self.seqlens_k = (lengths - 1).to(torch.int32)
        self.total_length = torch.scalar_tensor(attention_mask.shape[1], dtype=torch.int32)
        self.total_tokens = attention_mask.shape[1]
        self.past, self.presents = past, []
        # Under right padding a padded token repeats the last real position, so that a table look-up stays in range.
        positions = (attention_mask.cumsum(1) - 1)[:, attention_mask.shape[1] - input_ids.shape[1] :]
        logits = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=positions,
            past_key_values=PassThroughCache(),
            use_cache=True,
        ).logits
        return [logits, *self.presents]

    def attend(self, module: nn.Module, query, key, value, mask, scaling=None, **options) -> tuple[torch.Tensor, None]:
        """The attention function. q ``[batch, heads, seq, head_dim]`` → ``[batch, seq, heads, head_dim]``."""
        refuse_unsupported(options)
        batch, heads, seq, head_dim = query.shape
        kv_heads = key.shape[1]
        past_key, past_value = self.past[2 * module.layer_idx : 2 * module.layer_idx + 2]
        flat = [tensor.transpose(1, 2).reshape(batch, seq, -1) for tensor in (query, key, value)]
        inputs = [*flat, past_key, past_value, self.seqlens_k, self.total_length]
        attributes = {"num_heads": heads, "kv_num_heads": kv_heads, "scale": float(scaling or head_dim**-0.5)}
        if self.fusions.rotate_inside:
            inputs += [self.cos_cache, self.sin_cache]
            attributes["do_rotary"] = 1
        present = (batch, kv_heads, self.total_tokens, head_dim)
        output, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            attributes,
            dtypes=(query.dtype,) * 3,
            shapes=((batch, seq, heads * head_dim), present, present),
            version=1,
        )
        self.presents += [present_key, present_value]
        return output.reshape(batch, seq, heads, head_dim), None


def refuse_unsupported(options: dict) -> None:
    """UserError for an attention that the operator call here doesn't express: dropping an option would be silently wrong."""
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if options.get(name) is not None:
            raise UserError(f"the model's attention uses {name}, which the ONNX export cannot say; use a checkpoint without it")


@contextmanager
def attention_as_operator(decoder: GroupQueryDecoder) -> Iterator[None]:
    """Inside, ``decoder`` runs its model's attention, rotation, norms and Conv1D as the exporter wants them."""
    model, modeling = decoder.model, sys.modules[type(decoder.model).__module__]
    with ExitStack() as stack:
        # Registered in the instance's local mapping only; the mask registry never hears of the name.
        stack.enter_context(patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, {ATTENTION_NAME: decoder.attend}))
        stack.enter_context(patch.object(model.config, "_attn_implementation_internal", ATTENTION_NAME))
        if decoder.fusions.rotate_inside:
            table = decoder.cos_cache, decoder.sin_cache
            stack.enter_context(patch.object(model.model.rotary_emb, "forward", lambda *_, **__: table))
            stack.enter_context(patch.object(modeling, "apply_rotary_pos_emb", lambda query, key, *_, **__: (query, key)))
        for name in decoder.fusions.rms_norms:
            norm = model.get_submodule(name)
            stack.enter_context(patch.object(norm, "forward", _rms_norm_operator(norm)))
        # As a product over the last axis: the original flattens to [tokens, in] around addmm, which costs reshapes.
        stack.enter_context(patch.object(Conv1D, "forward", lambda self, x: torch.matmul(x, self.weight) + self.bias))
        yield


def find_fusions(model: PreTrainedModel, shape: ModelShape) -> Fusions:
    """Run a few tokens and see what may be fused. UserError for a model that the operator cannot express."""
    if shape.head_dim % HEAD_SIZE_STEP:
        raise UserError(f"head size {shape.head_dim} is not a multiple of {HEAD_SIZE_STEP}; use a checkpoint whose head size is")
    norms = tuple(name for name, module in model.named_modules() if _is_rms_norm(module))
    whole = shape.head_dim % ROTARY_HEAD_SIZE_STEP == 0
    return Fusions(rotate_inside=whole and _rotation_reaches_attention(model, shape), rms_norms=norms)


def rotary_table(model: PreTrainedModel, context_tokens: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin for every position, each ``[context_tokens, head_dim / 2]``, from the model's own rotary module."""
    positions = torch.arange(context_tokens)[None]
    with torch.no_grad():
        whole = model.model.rotary_emb(torch.zeros(1), position_ids=positions)  # each [1, context, head_dim]
    cos, sin = (table[0, :, : table.shape[-1] // 2].contiguous() for table in whole)
    return cos, sin


def _rotation_reaches_attention(model: PreTrainedModel, shape: ModelShape) -> bool:
    """True where every layer attends with exactly what its rotary function returned, over the whole head, in two equal halves."""
    rotary = getattr(getattr(model, "model", None), "rotary_emb", None)
    modeling = sys.modules[type(model).__module__]
    if rotary is None or not hasattr(modeling, "apply_rotary_pos_emb"):
        return False
    if rotary.rope_type in LENGTH_DEPENDENT_ROTARY:
        raise UserError(f"rotary type {rotary.rope_type!r} changes with the length; use a checkpoint with a fixed rotary type")
    rotated, attended = [], []
    original, attention = modeling.apply_rotary_pos_emb, ALL_ATTENTION_FUNCTIONS["sdpa"]

    def record_rotation(query, key, cos, sin, *args, **kwargs):
        outputs = original(query, key, cos, sin, *args, **kwargs)
        halves = all(torch.equal(*table.chunk(2, -1)) and table.shape[-1] == shape.head_dim for table in (cos, sin))
        rotated.append((outputs, halves))
        return outputs

    def record_attention(module, query, key, value, *args, **kwargs):
        attended.append((query, key))
        return attention(module, query, key, value, *args, **kwargs)

    with (
        torch.no_grad(),
        patch.object(modeling, "apply_rotary_pos_emb", record_rotation),
        patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, {"sdpa": record_attention}),
    ):
        model(input_ids=torch.zeros(1, 4, dtype=torch.long), past_key_values=PassThroughCache(), use_cache=True)
    calls = list(zip(rotated, attended, strict=False))  # a layer that skips either call makes the counts below differ
    return len(rotated) == len(attended) == shape.layers and all(
        halves and query is outputs[0] and key is outputs[1] for (outputs, halves), (query, key) in calls
    )


def _is_rms_norm(module: nn.Module) -> bool:
    """Whether ``module`` computes ``weight * x / rms(x)``: judged by numbers, a name only says where to look."""
    weight = getattr(module, "weight", None)
    if not hasattr(module, "variance_epsilon") or weight is None or weight.dim() != 1:
        return False
    draws = torch.Generator().manual_seed(0)
    values = torch.randn(3, 5, weight.numel(), generator=draws) * 3  # [any, any, size]
    expected = weight * values * torch.rsqrt(values.pow(2).mean(-1, keepdim=True) + module.variance_epsilon)
    with torch.no_grad():
        return torch.allclose(module(values), expected, atol=NORM_PROBE_TOLERANCE, rtol=NORM_PROBE_TOLERANCE)


def _rms_norm_operator(norm: nn.Module):
    """A forward for ``norm`` that emits one operator; the weight stays the module's own parameter."""

    def forward(values: torch.Tensor) -> torch.Tensor:
        return torch.onnx.ops.symbolic(
            "SimplifiedLayerNormalization",
            (values, norm.weight),
            {"axis": -1, "epsilon": float(norm.variance_epsilon), "stash_type": 1},
            dtype=values.dtype,
            shape=values.shape,
        )

    return forward
