"""Which weights stay: the largest that are left, of a layer or of the whole model, and random ones in the same numbers."""

import torch

from pipeline.lottery_training import Masks

REMOVED = -1.0  # below every magnitude, so that what is gone stays gone


def whole(weights: dict[str, torch.Tensor]) -> Masks:
    """Masks that leave everything. ``weights`` by layer name."""
    return {name: torch.ones_like(weight, dtype=torch.bool) for name, weight in weights.items()}


def largest(weights: dict[str, torch.Tensor], before: Masks, kept_share: float, scope: str) -> Masks:
    """The ``kept_share`` of all weights that are largest among those that ``before`` leaves; ``scope``: layer or model."""
    sizes = {name: torch.where(before[name], weight.abs(), REMOVED) for name, weight in weights.items()}
    if scope == "layer":
        return {name: _top(size.flatten(), kept_share).view_as(size) for name, size in sizes.items()}
    flat = _top(torch.cat([size.flatten() for size in sizes.values()]), kept_share)
    parts = flat.split([size.numel() for size in sizes.values()])
    return {name: part.view_as(size) for (name, size), part in zip(sizes.items(), parts, strict=True)}


def random_like(masks: Masks, seed: int) -> Masks:
    """As many weights of every layer as ``masks`` leave, but which ones is drawn by ``seed``."""
    generator = torch.Generator().manual_seed(seed)
    drawn = {}
    for name, mask in masks.items():
        chosen = torch.randperm(mask.numel(), generator=generator)[: int(mask.sum())]
        flat = torch.zeros(mask.numel(), dtype=torch.bool)
        flat[chosen] = True
        drawn[name] = flat.view_as(mask)
    return drawn


def sparsity(masks: Masks) -> float:
    """Share of weights that are gone."""
    return 1 - sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def _top(sizes: torch.Tensor, kept_share: float) -> torch.Tensor:
    """bool ``[n]``: the largest ``kept_share`` of ``sizes``, of equal ones the first."""
    kept = torch.argsort(sizes, descending=True, stable=True)[: round(kept_share * len(sizes))]
    mask = torch.zeros(len(sizes), dtype=torch.bool)
    mask[kept] = True
    return mask
