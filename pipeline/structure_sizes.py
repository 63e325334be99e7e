"""Which sizes a decoder may be cut to, which ones a recipe asks for, and how many parameters a decoder of given sizes has."""

import math
from dataclasses import dataclass, replace

from transformers import PreTrainedModel

from models.errors import UserError
from models.families import Projection, decoder_layers, layer_parts
from pipeline.settings import PruneSettings

WIDTH_MULTIPLE = 8  # kernels on phones want widths in eights, the FFN's and the residual stream's alike


@dataclass(frozen=True)
class Sizes:
    """What is to remain."""

    layers: int
    ffn_size: int
    kv_heads: int
    hidden_size: int


def sizes_of(model: PreTrainedModel) -> Sizes:
    """The sizes that ``model`` has."""
    config = model.config
    kv_heads = getattr(config, "num_key_value_heads", config.num_attention_heads)
    return Sizes(len(decoder_layers(model)), layer_parts(model)[0].down.weight.shape[1], kv_heads, config.hidden_size)


def planned_sizes(settings: PruneSettings, model: PreTrainedModel) -> Sizes:
    """The sizes that ``settings`` ask for; UserError where nothing would be left or the family cannot have them."""
    dense = sizes_of(model)
    if settings.layers >= dense.layers:
        raise UserError(f"prune.layers {settings.layers} leaves none of {dense.layers} layers; set it below {dense.layers}")
    if settings.layers and scales_by_layer(model):
        raise UserError("this model scales attention by the layer's number, so layers cannot go; set prune.layers=0")
    ffn_size = _width("ffn", settings.ffn, dense.ffn_size, WIDTH_MULTIPLE)
    kv_heads = _kv_heads(settings, model)
    return Sizes(dense.layers - settings.layers, ffn_size, kv_heads, _hidden_size(settings.hidden, model, kv_heads))


def scales_by_layer(model: PreTrainedModel) -> bool:
    """Whether attention is scaled by the layer's number, which removing a layer would change."""
    return bool(getattr(model.config, "scale_attn_by_inverse_layer_idx", False))


def heads_for(model: PreTrainedModel, kv_heads: int) -> int:
    """Query heads that remain with ``kv_heads`` KV heads."""
    return model.config.num_attention_heads // sizes_of(model).kv_heads * kv_heads


def hidden_choices(model: PreTrainedModel, kv_heads: int) -> list[int]:
    """Hidden sizes that may stand beside ``kv_heads``, falling. The dense one is among them where the config can say it."""
    width = model.config.hidden_size
    if model.config.model_type == "gpt2":  # its head size is the hidden size over the heads: it cannot be said otherwise
        return [width]
    step = hidden_step(model, kv_heads)
    dense = [width] if width % _divisor(model, kv_heads) == 0 else []
    return dense + list(range((width - 1) // step * step, 0, -step))


def hidden_step(model: PreTrainedModel, kv_heads: int) -> int:
    """The hidden size beside ``kv_heads`` is a multiple of this once it is cut."""
    return math.lcm(WIDTH_MULTIPLE, _divisor(model, kv_heads))


def _divisor(model: PreTrainedModel, kv_heads: int) -> int:
    """Llama's config insists that heads divide the hidden size, although the model does not need it."""
    return heads_for(model, kv_heads) if model.config.model_type == "llama" else 1


def _width(key: str, share: float, width: int, step: int) -> int:
    """The width that remains: the nearest multiple of ``step``."""
    if share == 0:
        return width
    kept = round(width * (1 - share) / step) * step
    if kept == 0:
        if step >= width:
            raise UserError(f"prune.{key} {share} leaves nothing of a width of {width}, which goes in steps of {step}; set it to 0")
        raise UserError(f"prune.{key} {share} leaves nothing of a width of {width}; set it to {1 - step / width:.3f} or less")
    if kept >= width:
        raise UserError(f"prune.{key} {share} removes nothing of a width of {width}, which goes in steps of {step}; set it to 0 or higher")
    return kept


def _hidden_size(share: float, model: PreTrainedModel, kv_heads: int) -> int:
    if share and model.config.model_type == "gpt2":
        raise UserError("a GPT-2 config cannot say a hidden size apart from its heads; set prune.hidden=0 and use ffn or layers")
    return _width("hidden", share, model.config.hidden_size, hidden_step(model, kv_heads))


def _kv_heads(settings: PruneSettings, model: PreTrainedModel) -> int:
    """The KV heads that remain, in a number that the family's config can say."""
    share, kv_heads, width = settings.kv_groups, sizes_of(model).kv_heads, model.config.hidden_size
    if share == 0:
        return kv_heads
    if model.config.model_type == "gpt2":
        raise UserError("a GPT-2 config cannot say that heads are missing; set prune.kv_groups=0 and use ffn or layers")
    kept = kv_heads - round(share * kv_heads)
    valid = [count for count in range(1, kv_heads) if settings.hidden or width in hidden_choices(model, count)]
    if kept not in valid:
        shares = ", ".join(f"{1 - count / kv_heads:.3f}" for count in reversed(valid)) or "none but 0"
        raise UserError(f"prune.kv_groups {share} would leave {kept} of {kv_heads} KV heads; possible shares here: {shares}")
    return kept


@dataclass(frozen=True)
class ParameterCount:
    """The parameters of a decoder as a function of its sizes, with coefficients counted in the model itself.

    Layers are alike. A tied head counts once.
    """

    outside_hidden: int  # embeddings, head and last norm, per hidden channel
    layer: int  # per layer, whatever the widths: norms inside the heads; for GPT-2 the attention
    layer_hidden: int  # norms and output biases, per layer and hidden channel
    ffn_unit: int  # biases, per FFN unit
    ffn_unit_hidden: int  # weights, per FFN unit and hidden channel
    kv_head: int
    kv_head_hidden: int

    @classmethod
    def of(cls, model: PreTrainedModel) -> "ParameterCount":
        parts, sizes = layer_parts(model)[0], sizes_of(model)
        inner = sum(parameter.numel() for parameter in decoder_layers(model).parameters())
        outside = sum(parameter.numel() for parameter in model.parameters()) - inner
        norms = [*parts.attention_norm.parameters(), *parts.ffn_norm.parameters()]
        kv_head, kv_head_hidden = (0, 0) if model.config.model_type == "gpt2" else _kv_head_parameters(model)
        bare = cls(
            outside_hidden=outside // sizes.hidden_size,
            layer=0,
            layer_hidden=len(norms) + _biased(parts.o) + _biased(parts.down),
            ffn_unit=sum(_biased(projection) for projection in parts.ffn_inputs),
            ffn_unit_hidden=len(parts.ffn_inputs) + 1,
            kv_head=kv_head,
            kv_head_hidden=kv_head_hidden,
        )
        rest = outside + inner - bare(sizes)
        return replace(bare, layer=rest // sizes.layers)

    def __call__(self, sizes: Sizes) -> int:
        hidden = sizes.hidden_size
        ffn = sizes.ffn_size * (self.ffn_unit + self.ffn_unit_hidden * hidden)
        attention = sizes.kv_heads * (self.kv_head + self.kv_head_hidden * hidden)
        return self.outside_hidden * hidden + sizes.layers * (self.layer + self.layer_hidden * hidden + ffn + attention)

    def widest_ffn(self, sizes: Sizes, parameters: int) -> int:
        """The widest FFN, at most that of ``sizes`` and in eights below it, with which there are at most ``parameters``; 0: none."""
        spare = parameters - self(replace(sizes, ffn_size=0))
        width = max(0, spare // (sizes.layers * (self.ffn_unit + self.ffn_unit_hidden * sizes.hidden_size)))
        return sizes.ffn_size if width >= sizes.ffn_size else width // WIDTH_MULTIPLE * WIDTH_MULTIPLE


def _biased(projection: Projection) -> int:
    return int(projection.bias is not None)


def _kv_head_parameters(model: PreTrainedModel) -> tuple[int, int]:
    """Of one KV head with its query heads: biases, and weights per hidden channel."""
    parts, kv_heads = layer_parts(model)[0], sizes_of(model).kv_heads
    rows = {name: getattr(parts, name).weight.shape[0] // kv_heads for name in ("q", "k", "v")}
    biases = sum(count for name, count in rows.items() if _biased(getattr(parts, name)))
    return biases, sum(rows.values()) + parts.o.weight.shape[1] // kv_heads
