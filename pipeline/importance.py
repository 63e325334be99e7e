"""How much the parts of a decoder matter, measured on calibration windows by what they add to the residual stream."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import PreTrainedModel

from models.families import decoder_layers, layer_parts, weight_view
from models.progress import track
from pipeline.structure import keep_ffn_units, keep_hidden_channels, keep_kv_heads, keep_layers, residual_norms
from pipeline.structure_sizes import Sizes, sizes_of


def shrink(model: PreTrainedModel, windows: torch.Tensor, sizes: Sizes) -> list[dict]:
    """Cut ``model`` down to ``sizes``, each kind by its scores on ``windows``; returns the layers removed.

    The coarsest kind goes first, so that the finer scores are measured in what remains.
    """
    removed = remove_least_influential(model, windows, len(decoder_layers(model)) - sizes.layers)
    before = sizes_of(model)
    if sizes.hidden_size < before.hidden_size:
        keep_hidden(model, windows, highest(hidden_channel_scores(model, windows), sizes.hidden_size))
    if sizes.ffn_size < before.ffn_size:
        keep_ffn_units(model, [highest(scores, sizes.ffn_size) for scores in ffn_unit_scores(model, windows)])
    if sizes.kv_heads < before.kv_heads:
        keep_kv_heads(model, [highest(scores, sizes.kv_heads) for scores in kv_head_scores(model, windows)])
    return removed


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted indices of the ``count`` highest scores; of equal ones the first."""
    return torch.sort(torch.argsort(scores, descending=True, stable=True)[:count]).values


def keep_hidden(model: PreTrainedModel, windows: torch.Tensor, kept: torch.Tensor) -> None:
    """Keep the channels of the residual stream at ``kept``, int64 ``[hidden]``, and make up for what the norms no longer see."""
    corrections = norm_corrections(model, windows, kept)
    keep_hidden_channels(model, kept)
    for place, correction in zip(residual_norms(model), corrections, strict=True):
        place.norm.weight.data.mul_(correction)


def ffn_unit_scores(model: PreTrainedModel, windows: torch.Tensor) -> list[torch.Tensor]:
    """Per layer float64 ``[ffn_size]``: root mean square of a unit's activation times the norm of its column of down.

    That is the root mean square norm of the vector which the unit alone adds to the residual stream.
    """
    downs = [parts.down.module for parts in layer_parts(model)]
    moments = [torch.zeros(weight_view(down).shape[1], dtype=torch.float64) for down in downs]

    def add(layer: int, activations: torch.Tensor) -> None:  # [batch, seq, ffn_size]
        moments[layer] += activations.double().square().sum((0, 1))

    with watch_inputs(downs, add):
        feed(model, windows, "scoring FFN units")
    return [(moment / windows.numel()).sqrt() * weight_view(down).double().norm(dim=0) for moment, down in zip(moments, downs, strict=True)]


def kv_head_scores(model: PreTrainedModel, windows: torch.Tensor) -> list[torch.Tensor]:
    """Per layer float64 ``[kv_heads]``: root mean square norm of what a KV head with its query heads adds to the stream."""
    outputs = [parts.o.module for parts in layer_parts(model)]
    kv_heads = model.config.num_key_value_heads
    energies = [torch.zeros(kv_heads, dtype=torch.float64) for _ in outputs]

    def add(layer: int, heads: torch.Tensor) -> None:  # [batch, seq, heads * head_dim]
        grouped = heads.unflatten(-1, (kv_heads, -1))  # query heads of one KV head are neighbours
        weight = weight_view(outputs[layer]).unflatten(1, (kv_heads, -1))  # [hidden, kv_heads, channels]
        for group in range(kv_heads):
            added = grouped[:, :, group] @ weight[:, group].T  # [batch, seq, hidden]
            energies[layer][group] += added.double().square().sum()

    with watch_inputs(outputs, add):
        feed(model, windows, "scoring KV heads")
    return [(energy / windows.numel()).sqrt() for energy in energies]


def hidden_channel_scores(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Float64 ``[hidden]``: how much of what the layers and the head read goes through each channel of the residual stream.

    A channel's part in one norm is its mean square after the norm times the squared norm of its columns in the weights that read
    it, as a share of that norm's total; the score is the sum over all norms. (Minitron, Muralidharan et al. 2024, adds up the
    normed activations of all norms alone; with the weights a channel that nobody reads counts for nothing.)
    """
    places = residual_norms(model)
    moments = [torch.zeros(model.config.hidden_size, dtype=torch.float64) for _ in places]

    def add(place: int, stream: torch.Tensor, normed: torch.Tensor) -> None:  # both [batch, seq, hidden]
        moments[place] += normed.double().square().sum((0, 1))

    with watch_norms(model, add):
        feed(model, windows, "scoring hidden channels")
    energies = [moment * place.column_energy() for moment, place in zip(moments, places, strict=True)]
    return sum(energy / energy.sum().clamp_min(torch.finfo(torch.float64).tiny) for energy in energies)


def norm_corrections(model: PreTrainedModel, windows: torch.Tensor, kept: torch.Tensor) -> list[float]:
    """Per norm the factor on its weight with which the kept channels come out as before, in the least squares over tokens.

    That is the mean ratio of the root mean square over the channels at ``kept`` to that over all.
    """
    epsilons = [place.norm.variance_epsilon for place in residual_norms(model)]
    totals = [0.0] * len(epsilons)

    def add(place: int, stream: torch.Tensor, normed: torch.Tensor) -> None:  # both [batch, seq, hidden]
        squares, epsilon = stream.double().square(), epsilons[place]
        totals[place] += float(((squares[..., kept].mean(-1) + epsilon) / (squares.mean(-1) + epsilon)).sqrt().sum())

    with watch_norms(model, add):
        feed(model, windows, "scoring norms")
    return [total / windows.numel() for total in totals]


def block_influence(model: PreTrainedModel, windows: torch.Tensor) -> list[float]:
    """Per layer 1 - mean cosine between the residual stream before and after it (Men et al. 2024, ShortGPT)."""
    layers = decoder_layers(model)
    totals = [0.0] * len(layers)

    def add(layer: int, before: torch.Tensor, after: torch.Tensor) -> None:  # both [batch, seq, hidden]
        totals[layer] += float(torch.cosine_similarity(before.double(), after.double(), dim=-1).sum())

    def hook(layer: int) -> Callable:
        return lambda module, inputs, output: add(layer, inputs[0], output[0] if isinstance(output, tuple) else output)

    handles = [module.register_forward_hook(hook(layer)) for layer, module in enumerate(layers)]
    try:
        feed(model, windows, "scoring layers")
    finally:
        for handle in handles:
            handle.remove()
    return [1.0 - total / windows.numel() for total in totals]


def remove_least_influential(model: PreTrainedModel, windows: torch.Tensor, count: int) -> list[dict]:
    """Remove ``count`` layers one by one, measuring anew after each; returns what was removed, by the dense model's numbering."""
    numbers = list(range(len(decoder_layers(model))))
    removed = []
    for _ in range(count):
        influence = block_influence(model, windows)
        least = min(range(len(influence)), key=influence.__getitem__)
        keep_layers(model, [position for position in range(len(numbers)) if position != least])
        removed.append({"layer": numbers.pop(least), "influence": influence[least]})
    return removed


@contextmanager
def watch_inputs(modules: list[nn.Module], see: Callable[[int, torch.Tensor], None]) -> Iterator[None]:
    """While active, ``see(index, input)`` is called for every forward of ``modules[index]``."""

    def hook(index: int) -> Callable:
        return lambda module, inputs: see(index, inputs[0])

    handles = [module.register_forward_pre_hook(hook(index)) for index, module in enumerate(modules)]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def watch_norms(model: PreTrainedModel, see: Callable[[int, torch.Tensor, torch.Tensor], None]) -> Iterator[None]:
    """While active, ``see(index, stream, normed)`` is called for every forward of the norms on the residual stream."""

    def hook(index: int) -> Callable:
        return lambda module, inputs, output: see(index, inputs[0], output)

    handles = [place.norm.register_forward_hook(hook(index)) for index, place in enumerate(residual_norms(model))]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@torch.no_grad()
def feed(model: PreTrainedModel, windows: torch.Tensor, description: str) -> None:
    """Run the decoder, without its head, over ``windows`` int64 ``[count, window_tokens]``, four at a time."""
    for batch in track(windows.split(4), description):
        model.base_model(batch, use_cache=False)
