"""Makes an unmodified transformers decoder say its attention and norms in the operators that ONNX Runtime runs fastest.

transformers models call attention through ``ALL_ATTENTION_FUNCTIONS``: one registered function emits
``com.microsoft::GroupQueryAttention``, whose name is unknown to the mask registry, so no mask is built: causality, windows, caps
and sinks are the operator's. What may be fused was proved by ``exporters.fusion_proof``.
"""

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest.mock import patch

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.pytorch_utils import Conv1D

from exporters.gqa_calls import AttentionCall, Table, Timeline, emit_attention, emit_rotation, emit_rotation_of_part
from exporters.norm_probe import Norm, norm_as_operator
from exporters.rotation import Rotation, table_names, taken_over
from models.checkpoint import ModelShape
from models.errors import UserError

ATTENTION_NAME = "pocketlm_group_query_attention"


@dataclass(frozen=True)
class Fusions:
    """What the model's forward pass was proved to allow; ``fallbacks`` say what is not fused, and why.

    ``cache_head_dim`` is the head size of the KV cache: the model's own, or the next one that the attention kernel takes;
    ``windows`` are the widths in tokens of all sliding windows that the model may use.
    """

    rotation: Rotation
    tables: dict[tuple, Table]  # by call of a rotary module
    norms: tuple[Norm, ...]
    cache_head_dim: int
    windows: tuple[int, ...] = ()
    fallbacks: tuple[str, ...] = ()

    @property
    def rotate_inside(self) -> bool:
        return self.rotation.place == "attention"


class PassThroughCache(DynamicCache):
    """Hands the new keys and values through: the operator appends them to the past itself."""

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):  # noqa: ARG002 - transformers' signature
        return key_states, value_states


class GroupQueryDecoder(nn.Module):
    """The decoder with flat inputs and outputs; valid only inside ``attention_as_operator``.

    ``past`` is key and value of every layer in turn, each ``[batch, kv_heads, past, cache_head_dim]``.
    """

    def __init__(self, model: PreTrainedModel, shape: ModelShape, fusions: Fusions) -> None:
        super().__init__()
        self.model, self.shape, self.fusions = model, shape, fusions
        self.table_names = table_names(list(fusions.tables))
        for call, (cos, sin) in fusions.tables.items():
            self.register_buffer(f"{self.table_names[call]}cos_cache", cos, persistent=False)
            self.register_buffer(f"{self.table_names[call]}sin_cache", sin, persistent=False)
        self.pending_table: Table | None = None

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor, past: list[torch.Tensor]) -> list[torch.Tensor]:
        """Logits ``[batch, seq, vocab]`` and key and value of every layer, each ``[batch, kv_heads, past + seq, head_dim]``."""
        lengths = attention_mask.sum(1)  # [batch], real tokens: right padding counts for nothing
        seqlens_k = (lengths - 1).to(torch.int32)
        total_length = torch.scalar_tensor(attention_mask.shape[1], dtype=torch.int32)
        self.past, self.presents = past, []
        # Under right padding a padded token repeats the last real position, so that a table look-up stays in range.
        positions = (attention_mask.cumsum(1) - 1)[:, attention_mask.shape[1] - input_ids.shape[1] :]
        self.at = Timeline(seqlens_k, total_length, attention_mask.shape[1], positions)
        logits = run_decoder(self.model, input_ids, attention_mask, positions)
        return [logits, *self.presents]

    def attend(self, module: nn.Module, query, key, value, mask, scaling=None, **options) -> tuple[torch.Tensor, None]:
        """The attention function. q ``[batch, heads, seq, head_dim]`` → ``[batch, seq, heads, head_dim]``."""
        batch, heads, seq, head_dim = query.shape
        call = self.padded(self.call_of(query, key, value, scaling, options))
        output, *present = emit_attention(call, self.past[2 * module.layer_idx : 2 * module.layer_idx + 2], self.at)
        self.presents += present
        output = output.reshape(batch, seq, heads, self.fusions.cache_head_dim)
        return output if head_dim == self.fusions.cache_head_dim else output[..., :head_dim], None

    def call_of(self, query, key, value, scaling: float | None, options: dict) -> AttentionCall:
        """What the model asks, in the operator's terms. UserError for what the operator cannot express."""
        refuse_unsupported(options)
        table, self.pending_table = self.pending_table, None
        return AttentionCall(
            query=query,
            key=key,
            value=value,
            scale=float(scaling or query.shape[-1] ** -0.5),
            window=options.get("sliding_window"),
            softcap=options.get("softcap"),
            sinks=options.get("s_aux"),
            table=table,
            interleaved=self.fusions.rotation.interleaved,
        )

    def padded(self, call: AttentionCall) -> AttentionCall:
        """Zeros behind each head up to the cache's head size: they change no product."""
        missing = self.fusions.cache_head_dim - call.query.shape[-1]
        if not missing:
            return call
        query, key, value = (functional.pad(tensor, (0, missing)) for tensor in (call.query, call.key, call.value))
        return replace(call, query=query, key=key, value=value)

    def table_of(self, call: tuple) -> Table:
        name = self.table_names[call]
        return getattr(self, f"{name}cos_cache"), getattr(self, f"{name}sin_cache")

    def rotate(self, tensors: list[torch.Tensor], cos: torch.Tensor, sin: torch.Tensor, heads_axis: int) -> list[torch.Tensor]:
        """In place of the rotary function, whose cos and sin are whole tables here."""
        if self.fusions.rotate_inside:
            self.pending_table = cos, sin
            return tensors
        turned = [tensor.transpose(1, heads_axis) for tensor in tensors]  # [batch, heads, seq, head_dim]
        return [self.rotated(tensor, (cos, sin)).transpose(1, heads_axis) for tensor in turned]

    def rotated(self, values: torch.Tensor, table: Table) -> torch.Tensor:
        emit = emit_rotation if values.shape[-1] == self.shape.head_dim else emit_rotation_of_part
        return emit(values, self.at.positions, table, self.fusions.rotation.interleaved)


def run_decoder(model: PreTrainedModel, input_ids: torch.Tensor, attention_mask: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Logits of a model whose cache the attention function keeps. Families with positions of their own derive them alike."""
    options = {"position_ids": positions} if "position_ids" in inspect.signature(model.forward).parameters else {}
    cache = PassThroughCache()
    return model(input_ids=input_ids, attention_mask=attention_mask, past_key_values=cache, use_cache=True, **options).logits


def refuse_unsupported(options: dict) -> None:
    """UserError for an attention that the operator call here doesn't express: dropping an option would be silently wrong."""
    if options.get("position_bias") is not None:
        raise UserError("the model's attention uses position_bias, which the ONNX export cannot say; use a checkpoint without it")
    if options.get("is_causal") is False:
        raise UserError("the model's attention looks ahead, which the ONNX export cannot say; use a causal decoder")


@contextmanager
def attention_hooked(decoder: GroupQueryDecoder, attend: Callable) -> Iterator[None]:
    """Inside, the model's attention is ``attend`` and its rotation ``decoder.rotate``."""
    model = decoder.model
    with ExitStack() as stack:
        # Registered in the instance's local mapping only; the mask registry never hears of the name.
        stack.enter_context(patch.dict(ALL_ATTENTION_FUNCTIONS._local_mapping, {ATTENTION_NAME: attend}))
        stack.enter_context(patch.object(model.config, "_attn_implementation_internal", ATTENTION_NAME))
        if decoder.fusions.rotation.place in ("attention", "operator"):
            stack.enter_context(taken_over(model, _whole_table(decoder), decoder.rotate))
        yield


@contextmanager
def attention_as_operator(decoder: GroupQueryDecoder) -> Iterator[None]:
    """Inside, ``decoder`` runs its model's attention, rotation, norms and Conv1D as the exporter wants them."""
    with ExitStack() as stack:
        stack.enter_context(attention_hooked(decoder, decoder.attend))
        for norm in decoder.fusions.norms:
            stack.enter_context(norm_as_operator(norm, decoder.model.get_submodule(norm.name)))
        # As a product over the last axis: the original flattens to [tokens, in] around addmm, which costs reshapes.
        stack.enter_context(patch.object(Conv1D, "forward", lambda self, x: torch.matmul(x, self.weight) + self.bias))
        stack.enter_context(patch.object(nn.Linear, "forward", _as_product))
        yield


def _as_product(linear: nn.Linear, values: torch.Tensor) -> torch.Tensor:
    """nn.Linear's forward; on ``[tokens, in]`` too it becomes a MatMul, which is what the quantisations look for."""
    if values.dim() != 2:
        return functional.linear(values, linear.weight, linear.bias)
    product = torch.matmul(values, linear.weight.t())
    return product if linear.bias is None else product + linear.bias


def _whole_table(decoder: GroupQueryDecoder) -> Callable:
    return lambda name, _original: lambda _values, _positions, *extras: decoder.table_of((name, *extras))
