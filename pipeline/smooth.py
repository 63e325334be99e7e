"""SmoothQuant folded into the weights (Xiao et al. 2022, arXiv:2211.10438): outlier channels move from activations to weights.

Input channel j of a group of linear layers is divided by ``s_j = max|X_j|^alpha / max|W_j|^(1-alpha)`` and the columns of their
weights are multiplied by it. The division is folded into what produces the channel: the norm before q, k, v and before the FFN,
the rows of ``up`` before ``down``, the rows of ``v`` before ``o``. The model's function does not change, and that is checked.
Alpha is given, or searched for each fold: see `pipeline.smooth_search`.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from models.checkpoint import load_model, save_model
from models.errors import GateError
from models.families import LayerParts, Projection, layer_parts
from models.provenance import library_versions, settings_record, write_json
from models.text import calibration_windows
from pipeline.importance import feed, watch_inputs
from pipeline.settings import SmoothSettings
from pipeline.smooth_search import GRID, Activations, int8_error, sample_activations

TOLERANCE = 1e-4  # largest change of a logit, as a share of the largest logit: fp32 rounding, not a changed function
CHECKED_WINDOWS = 4  # windows whose logits are held in memory for the comparison


@dataclass(frozen=True)
class Fold:
    """One place to smooth: ``consumers`` read the channels that ``producer`` makes; ``shared`` query heads read a v channel."""

    name: str
    consumers: tuple[Projection, ...]
    producer: nn.Module | Projection
    head_dim: int = 0  # 0: every channel has a scale of its own
    shared: int = 1


def run(settings: SmoothSettings, out: Path, recover: Path, text: Path) -> None:
    """Write the smoothed model and smooth.json into ``out``."""
    model = load_model(recover)
    windows = calibration_windows(text, settings.windows, "smooth.windows")
    expected = logits_of(model, windows)
    folded = smooth(model, windows, settings.alpha) if settings.enabled else []
    found = logits_of(model, windows)
    largest = max(float(logits.abs().max()) for logits in expected)
    difference = max(float((new - old).abs().max()) for new, old in zip(found, expected, strict=True))
    if not difference <= TOLERANCE * largest:
        raise GateError(
            f"smoothing changed a logit by {difference:.2e} (limit {TOLERANCE * largest:.2e}); set smooth.alpha nearer 0.5"
            " or smooth.enabled=false"
        )
    save_model(model, out, tokenizer_from=recover)
    record = {
        "max_abs_difference": difference,
        "largest_logit": largest,
        "tolerance": TOLERANCE * largest,
        "folds": folded,
        "not_folded": unfoldable(model) if settings.enabled else [],
        "settings": settings_record(settings),
        "versions": library_versions("torch", "transformers", "safetensors"),
    }
    write_json(out / "smooth.json", record)


@torch.no_grad()
def smooth(model: PreTrainedModel, windows: torch.Tensor, alpha: float | str) -> list[dict]:
    """Fold in place, in order; ``alpha`` is a number or ``search``.

    Per fold its name, alpha, and the outlier ratio (largest over median channel maximum) before and after; after a search also
    the int8 error of each alpha that was tried.
    """
    folds = folds_of(model)
    # The inputs of a fold's consumers change with that fold alone, so one look at all of them before the first is enough.
    if alpha == "search":
        seen = sample_activations(model, [fold.consumers[0].module for fold in folds], windows)
        maxima = [activations.largest for activations in seen]
    else:
        maxima = channel_maxima(model, folds, windows)
    report = []
    for index, (fold, maximum) in enumerate(zip(folds, maxima, strict=True)):
        errors = int8_errors(fold, seen[index]) if alpha == "search" else {}
        chosen = min(errors, key=errors.__getitem__) if errors else alpha
        scale = scales(fold, maximum, chosen)
        apply(fold, scale)
        before, after = outlier_ratio(maximum), outlier_ratio(maximum / scale)
        entry = {"fold": fold.name, "alpha": chosen, "outliers_before": before, "outliers_after": after}
        report.append({**entry, "int8_errors": errors} if errors else entry)
    return report


def int8_errors(fold: Fold, activations: Activations) -> dict[float, float]:
    """The consumers' relative squared int8 error by alpha of the grid."""
    weights = [consumer.weight for consumer in fold.consumers]
    return {alpha: int8_error(activations, weights, scales(fold, activations.largest, alpha)) for alpha in GRID}


def folds_of(model: PreTrainedModel) -> list[Fold]:
    """Every place of the model where the scale can be folded, layer by layer."""
    config = model.config
    shared = config.num_attention_heads // getattr(config, "num_key_value_heads", config.num_attention_heads)
    folds = []
    for index, parts in enumerate(layer_parts(model)):
        folds += _layer_folds(f"layers.{index}.", parts, shared)
    return folds


def _layer_folds(prefix: str, parts: LayerParts, shared: int) -> list[Fold]:
    head_dim = parts.attention.head_dim
    folds = [
        Fold(prefix + "norm_to_qkv", (parts.q, parts.k, parts.v), parts.attention_norm),
        Fold(prefix + "v_to_o", (parts.o,), parts.v, head_dim, shared),
        Fold(prefix + "norm_to_ffn", parts.ffn_inputs, parts.ffn_norm),
    ]
    if parts.up is not None:
        folds.append(Fold(prefix + "up_to_down", (parts.down,), parts.up))
    return folds


def unfoldable(model: PreTrainedModel) -> list[dict]:
    """Linear inputs that keep their outliers, and why."""
    why = "the activation function stands between the two linear layers, so no scale goes through it"
    return [{"input": f"layers.{index}.down", "why": why} for index, parts in enumerate(layer_parts(model)) if parts.up is None]


def channel_maxima(model: PreTrainedModel, folds: list[Fold], windows: torch.Tensor) -> list[torch.Tensor]:
    """Per fold float32 ``[channels]``: the largest absolute value that the consumers see in each input channel."""
    maxima = [torch.zeros(fold.consumers[0].weight.shape[1]) for fold in folds]

    def see(index: int, activations: torch.Tensor) -> None:  # [batch, seq, channels]
        torch.maximum(maxima[index], activations.abs().amax((0, 1)), out=maxima[index])

    with watch_inputs([fold.consumers[0].module for fold in folds], see):
        feed(model, windows, "measuring activations")
    return maxima


def scales(fold: Fold, activation_maxima: torch.Tensor, alpha: float) -> torch.Tensor:
    """float32 ``[channels]``, all positive; 1 where a channel carries nothing or nothing reads it."""
    weight_maxima = torch.stack([consumer.weight.abs().amax(0) for consumer in fold.consumers]).amax(0)  # [channels]
    activation_maxima = share_among_heads(activation_maxima, fold)
    weight_maxima = share_among_heads(weight_maxima, fold)
    alive = (activation_maxima > 0) & (weight_maxima > 0)
    scale = activation_maxima.double().pow(alpha) / weight_maxima.double().pow(1 - alpha)
    return torch.where(alive, scale, torch.ones_like(scale)).clamp(1e-5, 1e5).float()


def share_among_heads(maxima: torch.Tensor, fold: Fold) -> torch.Tensor:
    """For v to o: query heads that read the same v channel get the largest of their maxima. ``[channels]`` in and out."""
    if fold.head_dim == 0:
        return maxima
    heads = maxima.reshape(-1, fold.shared, fold.head_dim)  # [kv_heads, shared, head_dim]
    return heads.amax(1, keepdim=True).expand_as(heads).reshape(-1)


def apply(fold: Fold, scale: torch.Tensor) -> None:
    """Multiply the consumers' columns by ``scale`` and divide what produces the channels by it."""
    for consumer in fold.consumers:
        consumer.weight.mul_(scale)
    if isinstance(fold.producer, Projection):
        rows = scale.reshape(-1, fold.shared, fold.head_dim)[:, 0].reshape(-1) if fold.head_dim else scale
        fold.producer.weight.div_(rows[:, None])
    else:
        rows = scale
        fold.producer.weight.div_(rows)
    if getattr(fold.producer, "bias", None) is not None:
        fold.producer.bias.div_(rows)


def outlier_ratio(maxima: torch.Tensor) -> float | None:
    """Largest over median of the channel maxima; None where at least half of the channels carry nothing."""
    median = float(maxima.median())
    return round(float(maxima.max()) / median, 4) if median > 0 else None


@torch.no_grad()
def logits_of(model: PreTrainedModel, windows: torch.Tensor) -> list[torch.Tensor]:
    """Logits ``[1, seq, vocab]`` of the first few windows."""
    return [model(window[None], use_cache=False).logits for window in windows[:CHECKED_WINDOWS]]
