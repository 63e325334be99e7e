"""Where the parts of a decoder are, for each family: one frozen description that pruning, smoothing and exports read.

Weights are always seen as ``[outputs, inputs]``, whatever the family stores: GPT-2's Conv1D keeps them transposed, and
fuses q, k and v in one module. The views share memory with the parameters, so in-place arithmetic changes the model.
"""

from dataclasses import dataclass

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

SUPPORTED_FAMILIES = ("llama", "qwen2", "qwen3", "gpt2")
# What the ONNX export alone can express, with parity to PyTorch: their parts are not described here, so nothing can prune or
# smooth them, and TFLite has no sliding windows, soft caps or sinks.
ONNX_FAMILIES = (
    "apertus", "arcee", "biogpt", "bitnet", "cohere", "cohere2", "cwm", "ernie4_5", "exaone4", "gemma", "gemma2", "gemma3_text",
    "glm", "glm4", "gpt_bigcode", "gpt_neox", "granite", "granite_swa", "helium", "hunyuan_v1_dense", "hyperclovax", "jais2",
    "ministral", "ministral3", "mistral", "nanochat", "nemotron", "olmo", "olmo2", "olmo3", "opt", "persimmon", "phi", "phi3",
    "seed_oss", "smollm3", "stablelm", "starcoder2", "vaultgemma",
)  # fmt: skip


@dataclass(frozen=True)
class Projection:
    """A linear map, or a range of output rows of one (q, k and v of a fused projection)."""

    module: nn.Module
    first_row: int = 0
    rows: int | None = None

    @property
    def weight(self) -> torch.Tensor:
        """View ``[outputs, inputs]`` of the parameter."""
        whole = weight_view(self.module)
        return whole if self.rows is None else whole[self.first_row : self.first_row + self.rows]

    @property
    def bias(self) -> torch.Tensor | None:
        """View ``[outputs]`` of the parameter, or None where the map has no bias."""
        if self.module.bias is None or self.rows is None:
            return self.module.bias
        return self.module.bias[self.first_row : self.first_row + self.rows]


@dataclass(frozen=True)
class LayerParts:
    """The parts of one decoder layer. ``up`` is None where the FFN has no product with a linear factor (GPT-2)."""

    attention: nn.Module
    ffn: nn.Module
    attention_norm: nn.Module
    ffn_norm: nn.Module
    q: Projection
    k: Projection
    v: Projection
    o: Projection
    ffn_inputs: tuple[Projection, ...]
    up: Projection | None
    down: Projection


def weight_view(module: nn.Module) -> torch.Tensor:
    """View ``[outputs, inputs]`` of the weight of an nn.Linear or a Conv1D."""
    return module.weight.t() if isinstance(module, Conv1D) else module.weight


def is_linear(module: nn.Module) -> bool:
    return isinstance(module, (nn.Linear, Conv1D))


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The list of decoder layers, in order."""
    return model.transformer.h if model.config.model_type == "gpt2" else model.model.layers


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Every linear layer inside the decoder layers by its full name; embedding and head are not among them."""
    inside = {id(module) for layer in decoder_layers(model) for module in layer.modules() if is_linear(module)}
    return {name: module for name, module in model.named_modules() if id(module) in inside}


def layer_parts(model: nn.Module) -> list[LayerParts]:
    """The parts of every decoder layer. Raises ValueError for a family that is not supported."""
    family = model.config.model_type
    if family not in SUPPORTED_FAMILIES:
        raise ValueError(f"no description of the parts of {family!r}; supported: {', '.join(SUPPORTED_FAMILIES)}")
    return [_gpt2_parts(layer) if family == "gpt2" else _gated_parts(layer) for layer in decoder_layers(model)]


def _gated_parts(layer: nn.Module) -> LayerParts:
    """Llama, Qwen2 and Qwen3: RMSNorm, grouped attention, gated FFN ``down(act(gate(x)) * up(x))``."""
    attention, ffn = layer.self_attn, layer.mlp
    gate, up = Projection(ffn.gate_proj), Projection(ffn.up_proj)
    return LayerParts(
        attention=attention,
        ffn=ffn,
        attention_norm=layer.input_layernorm,
        ffn_norm=layer.post_attention_layernorm,
        q=Projection(attention.q_proj),
        k=Projection(attention.k_proj),
        v=Projection(attention.v_proj),
        o=Projection(attention.o_proj),
        ffn_inputs=(gate, up),
        up=up,
        down=Projection(ffn.down_proj),
    )


def _gpt2_parts(layer: nn.Module) -> LayerParts:
    """GPT-2: LayerNorm with bias, q, k and v fused in ``c_attn``, plain FFN ``c_proj(gelu(c_fc(x)))``."""
    attention, ffn = layer.attn, layer.mlp
    hidden_size = attention.embed_dim
    q, k, v = (Projection(attention.c_attn, index * hidden_size, hidden_size) for index in range(3))
    return LayerParts(
        attention=attention,
        ffn=ffn,
        attention_norm=layer.ln_1,
        ffn_norm=layer.ln_2,
        q=q,
        k=k,
        v=v,
        o=Projection(attention.c_proj),
        ffn_inputs=(Projection(ffn.c_fc),),
        up=None,
        down=Projection(ffn.c_proj),
    )
