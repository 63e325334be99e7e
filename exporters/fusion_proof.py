"""Proves on a few tokens which of a model's computations may become which operator, before anything is traced.

The model runs as it is, then with its rotation and attention replaced by plain PyTorch with the operators' semantics. Only where
every layer's attention answers the same does the replacement enter the graph; else the next simpler form is tried.
"""

from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from exporters.gqa_calls import HEAD_SIZE_STEP, ROTARY_STEP, Table, Timeline, attend_plainly, rotate_plainly
from exporters.gqa_hook import Fusions, GroupQueryDecoder, attention_hooked, run_decoder
from exporters.norm_probe import norm_modules, probe_norm
from exporters.rotation import Rotation, recorded_calls, rotary_tables, rotates
from models.checkpoint import ModelShape
from models.errors import UserError

PROOF_TOKENS = 12
PROOF_TOLERANCE = 1e-4  # of the largest number in a layer's answer: fp32 rounds differently in another order


@dataclass(frozen=True)
class Observation:
    """The model's own run: each layer's attention output, and what was seen on the way."""

    outputs: list[torch.Tensor]  # [batch, seq, heads * head_dim] per layer
    rotary_calls: list[tuple]
    windows: set[int]
    norm_inputs: dict[str, tuple[int, ...]] = field(default_factory=dict)


def find_fusions(model: PreTrainedModel, shape: ModelShape) -> Fusions:
    """Run a few tokens and see what may be fused. UserError for a model that the operator cannot express."""
    seen = observe(model, shape)
    norms = {
        name: probe_norm(name, module, seen.norm_inputs[name]) for name, module in norm_modules(model).items() if name in seen.norm_inputs
    }
    plain = dict.fromkeys(type(model.get_submodule(name)).__name__ for name, norm in norms.items() if norm is None)
    head_dim = -(-shape.head_dim // HEAD_SIZE_STEP) * HEAD_SIZE_STEP
    fallbacks = [f"{kind} in plain operators: its numbers are those of no norm operator" for kind in plain]
    if head_dim != shape.head_dim:
        fallbacks.append(f"heads of {shape.head_dim} padded to {head_dim}: the kernel takes multiples of {HEAD_SIZE_STEP}")
    windows = tuple(sorted(width for width in seen.windows if width < shape.context_tokens))
    base = Fusions(Rotation("none"), {}, tuple(norm for norm in norms.values() if norm), head_dim, windows)
    fusions = prove_rotation(model, shape, base, seen)
    if fusions.rotation.fallback:
        fallbacks.append(fusions.rotation.fallback)
    return replace(fusions, fallbacks=tuple(fallbacks))


def observe(model: PreTrainedModel, shape: ModelShape) -> Observation:
    """Run the model as it is. UserError where attention doesn't go through transformers' interface in every layer."""
    outputs, norm_inputs, windows = [], {}, configured_windows(model)
    interface = ALL_ATTENTION_FUNCTIONS.get_interface

    def recording(*names):
        attention = interface(*names)

        def attend(module, query, key, value, *args, **kwargs):
            if key.shape[-1] != value.shape[-1]:
                raise UserError(
                    f"{shape.family}: keys and values have different sizes, which the ONNX export cannot say; use another model"
                )
            windows.update(width for width in [kwargs.get("sliding_window")] if width)
            output = attention(module, query, key, value, *args, **kwargs)
            outputs.append(output[0].reshape(*output[0].shape[:2], -1))
            return output

        return attend

    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(patch.object(ALL_ATTENTION_FUNCTIONS, "get_interface", recording))
        for name, module in norm_modules(model).items():
            stack.callback(module.register_forward_pre_hook(_shape_recorder(name, norm_inputs)).remove)
        calls = stack.enter_context(recorded_calls(model))
        model(input_ids=proof_tokens(shape), use_cache=False)
    if len(outputs) != shape.layers:
        through = f"{len(outputs)} of {shape.layers} layers call attention through transformers' interface"
        raise UserError(f"{shape.family}: {through}, so the ONNX export cannot hook it; use a model of another family")
    return Observation(outputs, list(dict.fromkeys(calls)), windows, norm_inputs)


def configured_windows(model: PreTrainedModel) -> set[int]:
    """Widths that the config speaks of: a family that keeps its window in the mask alone shows it to no attention function."""
    named = {name: value for name, value in model.config.to_dict().items() if "window" in name or "chunk" in name}
    return {value for name, value in named.items() if type(value) is int and value > 0 and "layers" not in name}


def prove_rotation(model: PreTrainedModel, shape: ModelShape, base: Fusions, seen: Observation) -> Fusions:
    """The first form of rotation, best first, under which every layer attends as the model itself does."""
    if not rotates(model):
        return _proved(model, shape, base, seen)
    tables = rotary_tables(model, seen.rotary_calls, shape.context_tokens)
    reason = why_not_inside(shape, tables)
    for place in ("operator",) if reason else ("attention", "operator"):
        for turn in ({}, {"interleaved": True}, {"reversed_sign": True}):
            rotation = Rotation(place, **turn, fallback=reason)
            candidate = replace(base, rotation=rotation, tables=_signed(tables, rotation))
            if not mismatch(model, shape, candidate, seen):
                return candidate
        reason = reason or "rotation outside attention: the model changes q or k after it"
    return _proved(
        model, shape, replace(base, rotation=Rotation("plain", fallback="rotation in plain operators: no operator computes it")), seen
    )


def why_not_inside(shape: ModelShape, tables: dict[tuple, Table]) -> str | None:
    """Why the attention kernel cannot rotate these sizes; None where it can."""
    if shape.head_dim % ROTARY_STEP:
        return f"rotation outside attention: head size {shape.head_dim} is no multiple of {ROTARY_STEP}"
    for cos, _ in tables.values():
        if 2 * cos.shape[-1] % ROTARY_STEP:
            return f"rotation outside attention: {2 * cos.shape[-1]} rotated numbers of a head are no multiple of {ROTARY_STEP}"
    return None


def mismatch(model: PreTrainedModel, shape: ModelShape, fusions: Fusions, seen: Observation) -> str | None:
    """Which layer attends otherwise than the model's own under ``fusions``; None where none does."""
    decoder = _PlainDecoder(model, shape, fusions)
    tokens = proof_tokens(shape)
    with torch.no_grad(), attention_hooked(decoder, decoder.attend):
        try:
            run_decoder(model, tokens, torch.ones_like(tokens), decoder.at.positions)
        except (RuntimeError, IndexError) as error:  # tables of a layout that the model's own code cannot slice
            return f"its code cannot run on whole tables ({type(error).__name__})"
    for layer, (ours, theirs) in enumerate(zip(decoder.outputs, seen.outputs, strict=True)):
        if not (ours - theirs).abs().max() <= PROOF_TOLERANCE * theirs.abs().max():
            return f"layer {layer} attends otherwise"
    return None


def proof_tokens(shape: ModelShape) -> torch.Tensor:
    """Random ids ``[1, tokens]``, the same ones every time."""
    draws = torch.Generator().manual_seed(0)
    return torch.randint(shape.vocab_size, (1, min(PROOF_TOKENS, shape.context_tokens)), generator=draws)


class _PlainDecoder(GroupQueryDecoder):
    """The hooked decoder with the operators' semantics in PyTorch, on one prompt without a past."""

    def __init__(self, model: PreTrainedModel, shape: ModelShape, fusions: Fusions) -> None:
        super().__init__(model, shape, fusions)
        tokens = proof_tokens(shape).shape[1]
        length = torch.tensor(tokens)
        self.at = Timeline(length[None] - 1, length, tokens, torch.arange(tokens)[None])
        self.outputs: list[torch.Tensor] = []

    def attend(self, module: nn.Module, query, key, value, mask, scaling=None, **options) -> tuple[torch.Tensor, None]:  # noqa: ARG002
        batch, heads, seq, head_dim = query.shape
        output = attend_plainly(self.call_of(query, key, value, scaling, options), self.at.positions)
        self.outputs.append(output)
        return output.reshape(batch, seq, heads, head_dim), None

    def rotated(self, values: torch.Tensor, table: Table) -> torch.Tensor:
        return rotate_plainly(values, self.at.positions, table, self.fusions.rotation.interleaved)


def _proved(model: PreTrainedModel, shape: ModelShape, fusions: Fusions, seen: Observation) -> Fusions:
    """``fusions`` if the model's layers attend as the operator would; else UserError."""
    reason = mismatch(model, shape, fusions, seen)
    if reason:
        raise UserError(f"{shape.family}: {reason} than the operator GroupQueryAttention; use a model of another family")
    return fusions


def _shape_recorder(name: str, shapes: dict[str, tuple[int, ...]]):
    def record(_module: nn.Module, inputs: tuple) -> None:
        shapes[name] = tuple(inputs[0].shape)

    return record


def _signed(tables: dict[tuple, Table], rotation: Rotation) -> dict[tuple, Table]:
    return {call: (cos, -sin) for call, (cos, sin) in tables.items()} if rotation.reversed_sign else tables
