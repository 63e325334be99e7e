"""Outliers put into a model on purpose, without changing its function: what breaks static quantisation of real models.

Trained models of some size have a few channels whose activations are tens of times larger than the rest (Dettmers et al. 2022,
arXiv:2208.07339). A small model has none, so a price of int8 measured on it alone is too good. Here a few channels of every norm
are multiplied by a factor and their consumers' columns divided by it, and the same is done between ``up`` and ``down``.
"""

import torch
from transformers import PreTrainedModel

from pipeline.smooth import Fold, apply, folds_of


@torch.no_grad()
def inject(model: PreTrainedModel, channels: int, factor: float, seed: int) -> None:
    """Multiply ``channels`` channels before the linear layers of every fold by ``factor``, in place. The function stays."""
    generator = torch.Generator().manual_seed(seed)
    for fold in folds_of(model):
        apply(fold, scale_of(fold, channels, factor, generator))


def scale_of(fold: Fold, channels: int, factor: float, generator: torch.Generator) -> torch.Tensor:
    """What the producer is divided by, float32 ``[channels]``: 1 / factor at the drawn ones. Shared v channels are drawn once."""
    width = fold.consumers[0].weight.shape[1]
    if not fold.head_dim:
        drawn = torch.randperm(width, generator=generator)[:channels]
    else:
        free = torch.randperm(width // fold.shared, generator=generator)[:channels]
        group, place = free // fold.head_dim, free % fold.head_dim
        queries = torch.arange(fold.shared)
        drawn = ((group[:, None] * fold.shared + queries) * fold.head_dim + place[:, None]).reshape(-1)
    scale = torch.ones(width)
    scale[drawn] = 1 / factor
    return scale
