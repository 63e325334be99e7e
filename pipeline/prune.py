"""The stage that removes: whole layers, hidden size, FFN width, KV heads with their query heads, then single weights.

The result is a Hugging Face folder that plain ``AutoModelForCausalLM`` loads, proved by loading it. Structure goes first, so
that the unstructured sparsity holds in the layers that remain.
"""

from pathlib import Path

import torch
from transformers import PreTrainedModel

from models.checkpoint import load_model, save_model, shape_of
from models.errors import GateError
from models.families import linear_layers
from models.provenance import library_versions, settings_record, write_json
from models.text import calibration_windows
from pipeline.importance import shrink
from pipeline.settings import PruneSettings
from pipeline.sparsify import CALIBRATED, check_choice, sparsify
from pipeline.structure_sizes import planned_sizes, sizes_of
from pipeline.structure_target import check_ways, reach_target

RELOAD_TOLERANCE = 1e-5  # of the largest logit, between the model in memory and the saved one


def run(settings: PruneSettings, out: Path, checkpoint: Path, text: Path) -> None:
    """Write the pruned model and prune.json into ``out``."""
    check_choice(settings)
    check_ways(settings)
    model = load_model(checkpoint)
    before = shape_of(model)
    sizes = planned_sizes(settings, model)
    scored = settings.target > 0 or sizes != sizes_of(model) or settings.method in CALIBRATED
    windows = calibration_windows(text, settings.windows if scored else 1, "prune.windows")
    target = reach_target(model, windows, settings.target) if settings.target else None
    removed_layers = shrink(model, windows, target.sizes if target else sizes)
    method_facts = sparsify(model, windows, settings, out)
    save_model(model, out, tokenizer_from=checkpoint)
    check_reload(model, out, windows[:1])
    after = shape_of(model)
    zeros, weights, by_layer = sparsity_of(model)
    record = {
        "parameters": {"before": before.parameters, "after": after.parameters, "nonzero": after.parameters - zeros},
        "sparsity": zeros / weights,
        "sparsity_by_layer": by_layer,
        "method": method_facts,
        "removed_share": 1 - (after.parameters - zeros) / before.parameters,
        "removed_layers": removed_layers,
        "layers": {"before": before.layers, "after": after.layers},
        "ffn_size": {"before": before.ffn_size, "after": after.ffn_size},
        "hidden_size": {"before": before.hidden_size, "after": after.hidden_size},
        "kv_heads": {"before": before.kv_heads, "after": after.kv_heads},
        "heads": {"before": before.heads, "after": after.heads},
        "target": None if target is None else target.record() | {"got": 1 - after.parameters / before.parameters},
        "settings": settings_record(settings),
        "versions": library_versions("torch", "transformers", "safetensors"),
    }
    write_json(out / "prune.json", record)


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
