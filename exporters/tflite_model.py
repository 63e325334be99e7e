"""A Hugging Face decoder as the functions that a TFLite file holds: ``decode`` and ``prefill_N``, N tokens at once.

The model's own modules run unchanged. Its attention is asked for through transformers' attention interface, where a
function of ours attends to two parts, the host's cache and the chunk's own keys and values: keys are never joined, values are
where a product packs them anyway, neither is repeated for grouped heads, and only the chunk's new ones leave the graph.
"""

from dataclasses import dataclass

import torch
from transformers import Cache, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from models.checkpoint import ModelShape
from models.errors import UserError

ATTENTION = "pocketlm_cache_and_chunk"
# The host hides a slot with -30, a value that survives a quantised mask. Alone that is not enough: an empty slot scores
# 0 - 30, and heads whose real scores are all near -20 exist in trained models. Times this, it hides also in half precision.
HIDING_GAIN = 1000.0


@dataclass(frozen=True)
class SignatureShape:
    """The static sizes of one signature: ``chunk_tokens`` per call and the length of the host's cache."""

    layers: int
    kv_heads: int
    head_dim: int
    chunk_tokens: int
    context_tokens: int


class ChunkCache(Cache):
    """Holds the host's cached keys and values, and remembers the new ones that the model hands over.

    ``past[i]`` is ``(keys, values)`` of layer ``i``, each [1, kv_heads, context, head_dim], keys after rotation.
    """

    def __init__(self, past: list[tuple[torch.Tensor, torch.Tensor]]):
        super().__init__(layers=[])
        self.past = past
        self.new: list[tuple[torch.Tensor, torch.Tensor]] = []

    def update(self, key_states, value_states, layer_idx, *args, **kwargs):
        """Remember the chunk's [1, kv_heads, chunk, head_dim] keys and values; attention fetches the cached ones itself."""
        assert layer_idx == len(self.new), "layers must run in order"
        self.new.append((key_states, value_states))
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """No length is known to the graph: positions and mask come from the host."""
        return 0


def attend_to_cache_and_chunk(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention over the cache and the chunk; the mask [1, 1, chunk, context + chunk] covers both.

    ``query`` [1, heads, chunk, head_dim], ``key`` and ``value`` [1, kv_heads, chunk, head_dim]. Grouped heads are folded
    into the query's rows, so that keys and values are never repeated. Returns [1, chunk, heads, head_dim].
    """
    if kwargs.get("sliding_window") or kwargs.get("softcap") is not None:
        raise UserError("this model uses sliding-window or soft-capped attention, which the TFLite export does not know; leave it out")
    _, heads, chunk, head_dim = query.shape
    kv_heads = key.shape[1]
    groups = heads // kv_heads
    cached_key, cached_value = kwargs["chunk_cache"].past[module.layer_idx]  # [1, kv_heads, context, head_dim]
    scaling = head_dim**-0.5 if scaling is None else scaling
    query = (query * scaling).reshape(1, kv_heads, groups * chunk, head_dim)
    mask = kwargs["host_mask"]
    if groups > 1 and chunk > 1:  # a single row is broadcast
        mask = torch.cat([mask] * groups, 2)  # the same for all layers, so the converter does it once
    # No number of these lines depends on the context: the host may resize it (exporters.tflite_cache_reads).
    scores = torch.cat([query @ cached_key.transpose(2, 3), query @ key.transpose(2, 3)], -1)  # [1, kv_heads, rows, context + chunk]
    weights = torch.softmax(scores + mask, -1)
    mixed = weights @ torch.cat([cached_value, value], 2)
    return mixed.reshape(1, heads, chunk, head_dim).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend_to_cache_and_chunk)


class SignatureModule(torch.nn.Module):
    """One signature: named tensors in, named tensors out, as the tensor contract has them."""

    def __init__(self, model: PreTrainedModel, layers: int):
        super().__init__()
        self.model = model
        self.layers = layers

    def forward(self, tokens, positions, mask, last=None, **cached):
        """``last`` [1] picks the row of the chunk whose logits are wanted; without it the chunk is one token."""
        cache = ChunkCache([(cached[f"k_{layer}"], cached[f"v_{layer}"]) for layer in range(self.layers)])
        output = self.model(
            input_ids=tokens.long(),
            position_ids=positions.long(),
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if last is None else last.long(),
            chunk_cache=cache,
            host_mask=mask * HIDING_GAIN,
        )
        named = {"logits": output.logits[:, -1]}  # [1, vocab]
        for layer, (key, value) in enumerate(cache.new):
            named[f"new_k_{layer}"], named[f"new_v_{layer}"] = key, value
        return named


def signature_shape(shape: ModelShape, chunk_tokens: int, context_tokens: int) -> SignatureShape:
    """The sizes of one signature of a model of ``shape``."""
    return SignatureShape(shape.layers, shape.kv_heads, shape.head_dim, chunk_tokens, context_tokens)


def sample_inputs(shape: SignatureShape, with_last: bool) -> dict[str, torch.Tensor]:
    """Zero tensors with the signature's names, shapes and types, in the order of the contract."""
    chunk = shape.chunk_tokens
    inputs = {
        "tokens": torch.zeros(1, chunk, dtype=torch.int32),
        "positions": torch.zeros(1, chunk, dtype=torch.int32),
        "mask": torch.zeros(1, 1, chunk, shape.context_tokens + chunk),
    }
    if with_last:
        inputs["last"] = torch.zeros(1, dtype=torch.int32)
    for layer in range(shape.layers):
        for part in ("k", "v"):
            inputs[f"{part}_{layer}"] = torch.zeros(1, shape.kv_heads, shape.context_tokens, shape.head_dim)
    return inputs
