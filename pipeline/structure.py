"""Making a decoder really smaller: fewer layers, narrower FFNs, fewer KV heads, a narrower residual stream, in the module and in
its config alike.

What is kept is given as sorted indices; how they are chosen stands in `pipeline.importance`.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from models.families import decoder_layers, layer_parts, weight_view


@dataclass(frozen=True)
class ResidualNorm:
    """A norm that reads the residual stream, and the linear layers that read the norm."""

    norm: nn.Module
    consumers: tuple[nn.Module, ...]

    def column_energy(self) -> torch.Tensor:
        """Float64 ``[hidden]``: squared norm of the column of each channel over all that read it."""
        return sum(weight_view(consumer).double().square().sum(0) for consumer in self.consumers)


def residual_norms(model: PreTrainedModel) -> list[ResidualNorm]:
    """The norms on the residual stream of a rotary decoder in the order of the forward pass, the last one read by the head."""
    found = []
    for parts in layer_parts(model):
        found.append(ResidualNorm(parts.attention_norm, (parts.q.module, parts.k.module, parts.v.module)))
        found.append(ResidualNorm(parts.ffn_norm, tuple(projection.module for projection in parts.ffn_inputs)))
    return [*found, ResidualNorm(model.base_model.norm, (model.get_output_embeddings(),))]


def keep_layers(model: PreTrainedModel, kept: list[int]) -> None:
    """Keep the decoder layers at ``kept``; cache indices and the config's per-layer lists follow."""
    layers = decoder_layers(model)
    remaining = nn.ModuleList(layers[index] for index in kept)
    if model.config.model_type == "gpt2":
        model.transformer.h = remaining
    else:
        model.model.layers = remaining
    for position, parts in enumerate(layer_parts(model)):
        parts.attention.layer_idx = position
    if getattr(model.config, "layer_types", None):
        model.config.layer_types = [model.config.layer_types[index] for index in kept]
    model.config.num_hidden_layers = len(kept)


def keep_ffn_units(model: PreTrainedModel, kept: list[torch.Tensor]) -> None:
    """Keep the FFN units at ``kept[layer]``, int64 ``[width]``, the same width in every layer."""
    for parts, units in zip(layer_parts(model), kept, strict=True):
        for projection in parts.ffn_inputs:
            keep_outputs(projection.module, units)
        keep_inputs(parts.down.module, units)
    width = len(kept[0])
    if model.config.model_type == "gpt2":
        model.config.n_inner = width
    else:
        model.config.intermediate_size = width


def keep_kv_heads(model: PreTrainedModel, kept: list[torch.Tensor]) -> None:
    """Keep the KV heads at ``kept[layer]``, int64 ``[kv_heads]``, each with its query heads; head size and ratio stay.

    Not for GPT-2: its config cannot say that heads times head size is less than the hidden size.
    """
    config = model.config
    head_dim = layer_parts(model)[0].attention.head_dim
    queries = config.num_attention_heads // config.num_key_value_heads
    for parts, kv_heads in zip(layer_parts(model), kept, strict=True):
        query_heads = (kv_heads[:, None] * queries + torch.arange(queries)).reshape(-1)
        query_channels, kv_channels = (_channels(heads, head_dim) for heads in (query_heads, kv_heads))
        keep_outputs(parts.q.module, query_channels)
        keep_outputs(parts.k.module, kv_channels)
        keep_outputs(parts.v.module, kv_channels)
        keep_inputs(parts.o.module, query_channels)
    config.head_dim = head_dim
    config.num_key_value_heads = len(kept[0])
    config.num_attention_heads = len(kept[0]) * queries


def keep_hidden_channels(model: PreTrainedModel, kept: torch.Tensor) -> None:
    """Keep the channels of the residual stream at ``kept``, int64 ``[hidden]``, in the whole model; heads and their size stay.

    RMSNorm divides by the root mean square of what is kept from then on. Not for GPT-2: its config makes the head size of the hidden size.
    """
    config, embedding, head = model.config, model.get_input_embeddings(), model.get_output_embeddings()
    head_dim = layer_parts(model)[0].attention.head_dim
    tied = head.weight is embedding.weight
    for place in residual_norms(model):
        place.norm.weight = nn.Parameter(place.norm.weight[kept].clone(), requires_grad=place.norm.weight.requires_grad)
        for consumer in place.consumers:
            keep_inputs(consumer, kept)
    for parts in layer_parts(model):
        keep_outputs(parts.o.module, kept)
        keep_outputs(parts.down.module, kept)
    if tied:
        embedding.weight = head.weight
    else:
        embedding.weight = nn.Parameter(embedding.weight[:, kept].contiguous(), requires_grad=embedding.weight.requires_grad)
    embedding.embedding_dim = len(kept)
    config.head_dim = head_dim
    config.hidden_size = len(kept)


def keep_outputs(module: nn.Module, index: torch.Tensor) -> None:
    """Keep the output channels at ``index`` of an nn.Linear or Conv1D, bias included."""
    weight = module.weight[:, index] if isinstance(module, Conv1D) else module.weight[index]
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=module.weight.requires_grad)
    if module.bias is not None:
        module.bias = nn.Parameter(module.bias[index].clone(), requires_grad=module.bias.requires_grad)
    setattr(module, "nf" if isinstance(module, Conv1D) else "out_features", len(index))


def keep_inputs(module: nn.Module, index: torch.Tensor) -> None:
    """Keep the input channels at ``index`` of an nn.Linear or Conv1D."""
    weight = module.weight[index] if isinstance(module, Conv1D) else module.weight[:, index]
    module.weight = nn.Parameter(weight.contiguous(), requires_grad=module.weight.requires_grad)
    setattr(module, "nx" if isinstance(module, Conv1D) else "in_features", len(index))


def _channels(heads: torch.Tensor, head_dim: int) -> torch.Tensor:
    """Channel indices int64 ``[len(heads) * head_dim]`` of the given heads."""
    return (heads[:, None] * head_dim + torch.arange(head_dim)).reshape(-1)
