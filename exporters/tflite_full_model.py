"""A Hugging Face decoder in the form that quantises to int8 throughout: no table look-ups, no float functions of positions.

Rows of tables (token embedding, learned positions, rotary cosines and sines) come in as tensors: they are gathered outside, where
the converter knows how to quantise a gather. Cached and new keys are concatenated, which an int8 converter can only do at one
scale: so the host may copy new keys and values into its int8 cache as they are.
"""

from dataclasses import dataclass

import numpy as np
import torch
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from exporters.tflite_model import ChunkCache, SignatureShape
from models.errors import UserError

ATTENTION = "pocketlm_full_int8"
# The host hides a slot with -30. Scores reach higher than that, so the graph widens it; the limit is what int8 kernels add up
# exactly: a mask's step may be 256 times as large as a score's.
HIDING_GAIN = 32.0


def attend_to_joined_cache(module, query, key, value, attention_mask, scaling=None, dropout=0.0, **kwargs):
    """Attention over cache and chunk joined; the mask [1, 1, chunk, context + chunk] covers both.

    ``query`` [1, heads, chunk, head_dim], ``key`` and ``value`` [1, kv_heads, chunk, head_dim]. Grouped heads are folded
    into the query's rows. Returns [1, chunk, heads, head_dim].
    """
    if kwargs.get("sliding_window") or kwargs.get("softcap") is not None:
        raise UserError("this model uses sliding-window or soft-capped attention, which the TFLite export does not know; leave it out")
    _, heads, chunk, head_dim = query.shape
    kv_heads = key.shape[1]
    rows = heads // kv_heads * chunk
    cached = kwargs["chunk_cache"].past[module.layer_idx]
    keys, values = (torch.cat([old, new], 2).reshape(kv_heads, -1, head_dim) for old, new in zip(cached, (key, value), strict=True))
    scaling = head_dim**-0.5 if scaling is None else scaling
    query = (query * scaling).reshape(kv_heads, rows, head_dim)
    scores = (query @ keys.transpose(1, 2)).reshape(kv_heads, heads // kv_heads, chunk, -1)
    weights = torch.softmax(scores + kwargs["host_mask"], -1).reshape(kv_heads, rows, -1)
    return (weights @ values).reshape(1, heads, chunk, head_dim).transpose(1, 2), None


ALL_ATTENTION_FUNCTIONS.register(ATTENTION, attend_to_joined_cache)


class GivenRows(torch.nn.Module):
    """Stands where a table was: answers with the rows that were looked up outside."""

    def __init__(self):
        super().__init__()
        self.rows: torch.Tensor | tuple[torch.Tensor, ...] | None = None

    def forward(self, *args, **kwargs):
        return self.rows


@dataclass(frozen=True)
class Tables:
    """What is looked up outside the graph: ``tokens`` [vocab, hidden] by token, each of ``positions`` [context, width] by position.

    ``stand_ins`` are the modules that get the rows, with how many tables each of them stands for.
    """

    tokens: torch.Tensor
    positions: tuple[np.ndarray, ...]
    stand_ins: tuple[tuple[GivenRows, int], ...]

    def give(self, rows: tuple[torch.Tensor, ...]) -> None:
        """Hand the rows [1, chunk, width] of all position tables to the modules that asked for them."""
        start = 0
        for stand_in, count in self.stand_ins:
            given = rows[start : start + count]
            stand_in.rows = given if count > 1 else given[0]
            start += count


@torch.no_grad()
def take_tables_out(model: PreTrainedModel, context_tokens: int) -> Tables:
    """Replace every module of ``model`` that looks positions up, rotary tables included; its tables are computed once."""
    embedding = model.get_input_embeddings()
    every_token, every_position = torch.arange(embedding.weight.shape[0]), torch.arange(context_tokens)
    rows = embedding(every_token)
    positions, stand_ins = [], []
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Embedding) and module is not embedding:
            found = [module(every_position)]
        elif name.endswith("rotary_emb"):
            found = [part[0] for part in module(torch.zeros(1), every_position[None])]  # cosines and sines
        else:
            continue
        stand_ins.append((GivenRows(), len(found)))
        model.set_submodule(name, stand_ins[-1][0])
        positions += [table.numpy() for table in found]
    tied = torch.equal(rows, embedding.weight)  # some families scale what they look up
    return Tables(embedding.weight if tied else rows, tuple(positions), tuple(stand_ins))


class RowsModule(torch.nn.Module):
    """One signature over looked-up rows, tensors in and out in a fixed order (see ``module_inputs``)."""

    def __init__(self, model: PreTrainedModel, layers: int, tables: Tables):
        super().__init__()
        self.model, self.layers, self.tables = model, layers, tables

    def forward(self, token_rows, mask, *rest):
        """``rest``: rows of each position table, ``last`` [1] where there is more than a token, then keys and values per layer."""
        count = len(self.tables.positions)
        rows, rest = rest[:count], rest[count:]
        last, cached = (rest[0], rest[1:]) if len(rest) % 2 else (None, rest)
        self.tables.give(rows)
        cache = ChunkCache([(cached[2 * layer], cached[2 * layer + 1]) for layer in range(self.layers)])
        output = self.model(
            inputs_embeds=token_rows,
            position_ids=torch.zeros(token_rows.shape[:2], dtype=torch.long),  # the modules that would read them are replaced
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=0 if last is None else last.long(),
            chunk_cache=cache,
            host_mask=mask * HIDING_GAIN,
        )
        return output.logits[:, -1], *(part for pair in cache.new for part in pair)


def module_inputs(tables: Tables, shape: SignatureShape) -> tuple[torch.Tensor, ...]:
    """Zero tensors to trace ``RowsModule.forward`` with."""
    chunk = shape.chunk_tokens
    cached = [torch.zeros(1, shape.kv_heads, shape.context_tokens, shape.head_dim) for _ in range(2 * shape.layers)]
    last = [torch.zeros(1, dtype=torch.int32)] if chunk > 1 else []
    rows = [torch.zeros(1, chunk, table.shape[-1]) for table in tables.positions]
    mask = torch.zeros(1, 1, chunk, shape.context_tokens + chunk)
    return (torch.zeros(1, chunk, tables.tokens.shape[1]), mask, *rows, *last, *cached)
