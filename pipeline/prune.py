"""The stage that removes: whole layers, FFN width, KV heads with their query heads, then single weights by magnitude.

The result is a Hugging Face folder that plain ``AutoModelForCausalLM`` loads, proved by loading it. Structure goes first, so
that the unstructured sparsity holds in the layers that remain.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from models.checkpoint import load_model, save_model, shape_of
from models.errors import GateError, UserError
from models.families import linear_layers
from models.provenance import library_versions, settings_record, write_json
from models.text import calibration_windows
from pipeline.importance import ffn_unit_scores, kv_head_scores, remove_least_influential
from pipeline.settings import PruneSettings
from pipeline.structure import keep_ffn_units, keep_kv_heads

WIDTH_MULTIPLE = 8  # kernels on phones want FFN widths in eights
RELOAD_TOLERANCE = 1e-5  # of the largest logit, between the model in memory and the saved one


@dataclass(frozen=True)
class Sizes:
    """What is to remain."""

    layers: int
    ffn_size: int
    kv_heads: int


def run(settings: PruneSettings, out: Path, checkpoint: Path, text: Path) -> None:
    """Write the pruned model and prune.json into ``out``."""
    model = load_model(checkpoint)
    before = shape_of(model)
    sizes = planned_sizes(settings, model)
    structural = sizes != Sizes(before.layers, before.ffn_size, before.kv_heads)
    windows = calibration_windows(text, settings.windows if structural else 1, "prune.windows")
    removed_layers = remove_least_influential(model, windows, before.layers - sizes.layers)
    if sizes.ffn_size < before.ffn_size:
        keep_ffn_units(model, [highest(scores, sizes.ffn_size) for scores in ffn_unit_scores(model, windows)])
    if sizes.kv_heads < before.kv_heads:
        keep_kv_heads(model, [highest(scores, sizes.kv_heads) for scores in kv_head_scores(model, windows)])
    if settings.method == "magnitude":
        zero_smallest(model, settings.sparsity)
    save_model(model, out, tokenizer_from=checkpoint)
    check_reload(model, out, windows[:1])
    after = shape_of(model)
    zeros, weights, by_layer = sparsity_of(model)
    record = {
        "parameters": {"before": before.parameters, "after": after.parameters, "nonzero": after.parameters - zeros},
        "sparsity": zeros / weights,
        "sparsity_by_layer": by_layer,
        "removed_share": 1 - (after.parameters - zeros) / before.parameters,
        "removed_layers": removed_layers,
        "layers": {"before": before.layers, "after": after.layers},
        "ffn_size": {"before": before.ffn_size, "after": after.ffn_size},
        "kv_heads": {"before": before.kv_heads, "after": after.kv_heads},
        "heads": {"before": before.heads, "after": after.heads},
        "settings": settings_record(settings),
        "versions": library_versions("torch", "transformers", "safetensors"),
    }
    write_json(out / "prune.json", record)


def planned_sizes(settings: PruneSettings, model: PreTrainedModel) -> Sizes:
    """The sizes that ``settings`` ask for; UserError where nothing would be left or the family cannot have them."""
    shape = shape_of(model)
    if settings.method == "none" and settings.sparsity > 0:
        raise UserError(f"prune.sparsity is {settings.sparsity} but prune.method is none; set prune.method=magnitude")
    if settings.layers >= shape.layers:
        raise UserError(f"prune.layers {settings.layers} leaves none of {shape.layers} layers; set it below {shape.layers}")
    if settings.layers and getattr(model.config, "scale_attn_by_inverse_layer_idx", False):
        raise UserError("this model scales attention by the layer's number, so layers cannot go; set prune.layers=0")
    return Sizes(shape.layers - settings.layers, _ffn_size(settings.ffn, shape.ffn_size), _kv_heads(settings.kv_groups, model))


def _ffn_size(share: float, width: int) -> int:
    """The width that remains: the nearest multiple of eight."""
    if share == 0:
        return width
    kept = round(width * (1 - share) / WIDTH_MULTIPLE) * WIDTH_MULTIPLE
    if kept == 0:
        least = 1 - WIDTH_MULTIPLE / width
        raise UserError(f"prune.ffn {share} leaves nothing of an FFN of width {width}; set it to {least:.3f} or less")
    if kept >= width:
        raise UserError(f"prune.ffn {share} removes nothing of width {width}, which goes in eights; set it to 0 or higher")
    return kept


def _kv_heads(share: float, model: PreTrainedModel) -> int:
    """The KV heads that remain, in a number that the family's config can say."""
    config = model.config
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", heads)
    if share == 0:
        return kv_heads
    if config.model_type == "gpt2":
        raise UserError("a GPT-2 config cannot say that heads are missing; set prune.kv_groups=0 and use ffn or layers")
    kept = kv_heads - round(share * kv_heads)
    # Llama's config insists that heads divide the hidden size, although the model does not need it.
    valid = [count for count in range(1, kv_heads) if config.model_type != "llama" or config.hidden_size % (count * heads // kv_heads) == 0]
    if kept not in valid:
        shares = ", ".join(f"{1 - count / kv_heads:.3f}" for count in reversed(valid)) or "none but 0"
        raise UserError(f"prune.kv_groups {share} would leave {kept} of {kv_heads} KV heads; possible shares here: {shares}")
    return kept


def highest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Sorted indices of the ``count`` highest scores; of equal ones the first."""
    return torch.sort(torch.argsort(scores, descending=True, stable=True)[:count]).values


def zero_smallest(model: PreTrainedModel, sparsity: float) -> None:
    """Set the given share of each linear layer's weights, the smallest by magnitude, to exactly zero."""
    for name, module in linear_layers(model).items():
        weight = module.weight.data
        count = round(sparsity * weight.numel())
        if count >= weight.numel():
            raise UserError(f"prune.sparsity {sparsity} leaves nothing of {name} ({weight.numel()} weights); set it lower")
        flat = weight.reshape(-1)
        flat[torch.argsort(flat.abs(), stable=True)[:count]] = 0.0


def sparsity_of(model: PreTrainedModel) -> tuple[int, int, dict[str, float]]:
    """Zeros and weights in the linear layers, and the share of zeros of each layer, counted in the weights themselves."""
    zeros = {name: int((module.weight == 0).sum()) for name, module in linear_layers(model).items()}
    sizes = {name: module.weight.numel() for name, module in linear_layers(model).items()}
    return sum(zeros.values()), sum(sizes.values()), {name: zeros[name] / sizes[name] for name in zeros}


@torch.no_grad()
def check_reload(model: PreTrainedModel, folder: Path, windows: torch.Tensor) -> None:
    """GateError unless the saved folder loads and gives the logits of the model in memory."""
    expected, found = model(windows).logits, load_model(folder)(windows).logits
    difference, limit = float((expected - found).abs().max()), RELOAD_TOLERANCE * float(expected.abs().max())
    if not difference <= limit:
        raise GateError(f"the pruned model loads with logits off by {difference:.2e} (limit {limit:.2e}); set prune.* lower")
