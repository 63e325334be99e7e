"""Which weights go, given how much each matters: exact counts within a row, a layer or the whole model, or n of every m inputs.

Scores are non-negative ``[outputs, inputs]`` and compared in float32; of equal ones the first goes. NaN is no score.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Self

import torch

from pipeline.settings import PruneSettings

PATTERN_SPARSITY = 0.5  # of 2:4 and of 4:8
CHUNK_ROWS = 512  # sorted at once, which bounds the memory of indices
HALF_BITS = 16  # a float32 is found in two steps of as many bits


@dataclass(frozen=True)
class Removal:
    """The share of weights that goes, and, where ``group`` is not 0, ``zeros`` of every ``group`` neighbouring inputs."""

    sparsity: float
    zeros: int = 0
    group: int = 0

    @classmethod
    def of(cls, settings: PruneSettings) -> Self:
        if settings.pattern == "none":
            return cls(settings.sparsity)
        zeros, group = map(int, settings.pattern.split(":"))
        return cls(PATTERN_SPARSITY, zeros, group)

    def count(self, weights: int) -> int:
        """How many of ``weights`` go."""
        return round(self.sparsity * weights)


@dataclass(frozen=True)
class Cut:
    """Everything below ``limit`` goes, and the first ``ties`` that equal it. ``limit`` is the bits of a float32."""

    limit: int
    ties: int


def layer_mask(scores: torch.Tensor, removal: Removal) -> torch.Tensor:
    """Bool ``[outputs, inputs]``: what goes when the weights of one layer compete, or those of each group of a pattern."""
    if removal.group:
        return pattern_mask(scores, removal)
    return lowest(scores, removal.count(scores.numel()))


def lowest(scores: torch.Tensor, count: int) -> torch.Tensor:
    """Bool in the shape of ``scores``: the ``count`` lowest."""
    return next(lowest_of_many(lambda: iter([scores]), count))


def lowest_of_many(scores: Callable[[], Iterator[torch.Tensor]], count: int) -> Iterator[torch.Tensor]:
    """For each tensor that ``scores()`` yields, bool in its shape: the ``count`` lowest of all together.

    ``scores`` is called three times and one tensor is held at a time, so that a model's scores need not be in memory.
    """
    cut = find_cut(scores, count)
    ties = cut.ties
    for tensor in scores():
        bits = _bits(tensor)
        mask = bits < cut.limit
        equal = torch.nonzero(bits == cut.limit)[:ties, 0]
        mask[equal] = True
        ties -= len(equal)
        yield mask.reshape(tensor.shape)


def find_cut(scores: Callable[[], Iterator[torch.Tensor]], count: int) -> Cut:
    """Where the ``count`` lowest end: a histogram of the upper 16 bits, then one of the lower 16 within the bin found."""
    if count == 0:
        return Cut(limit=0, ties=0)
    upper, before = _bin_of((_bits(tensor) >> HALF_BITS for tensor in scores()), count)
    inside = (bits[bits >> HALF_BITS == upper] & (2**HALF_BITS - 1) for bits in map(_bits, scores()))
    lower, before_inside = _bin_of(inside, count - before)
    return Cut(limit=(upper << HALF_BITS) + lower, ties=count - before - before_inside)


def pattern_mask(scores: torch.Tensor, removal: Removal) -> torch.Tensor:
    """Bool ``[outputs, inputs]``: of every ``group`` neighbouring inputs the ``zeros`` lowest."""
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for part, part_scores in zip(mask.split(CHUNK_ROWS), scores.split(CHUNK_ROWS), strict=True):
        order = part_scores.unflatten(1, (-1, removal.group)).argsort(dim=2, stable=True)
        part.unflatten(1, (-1, removal.group)).scatter_(2, order[..., : removal.zeros], True)
    return mask


def row_mask(scores: torch.Tensor, removal: Removal) -> torch.Tensor:
    """Bool ``[outputs, inputs]``: the lowest of every output row, as many in total as the layer is asked for.

    Where the count does not divide by the rows, those give one more whose next score is the lowest.
    """
    if removal.group:
        return pattern_mask(scores, removal)
    rows, columns = scores.shape
    each, more = divmod(removal.count(scores.numel()), rows)
    counts = torch.full((rows, 1), each)
    if more:
        following = scores.kthvalue(each + 1, dim=1).values
        counts[torch.argsort(following, stable=True)[:more]] += 1
    mask = torch.zeros_like(scores, dtype=torch.bool)
    for part, part_scores, part_counts in zip(*(tensor.split(CHUNK_ROWS) for tensor in (mask, scores, counts)), strict=True):
        order = part_scores.argsort(dim=1, stable=True)
        part.scatter_(1, order, torch.arange(columns) < part_counts)
    return mask


def _bits(scores: torch.Tensor) -> torch.Tensor:
    """Flat int32: non-negative floats are ordered as their bits are."""
    return scores.float().contiguous().view(torch.int32).reshape(-1)


def _bin_of(parts: Iterator[torch.Tensor], count: int) -> tuple[int, int]:
    """The bin of a histogram over 16 bits in which the ``count``-th value lies, and how many lie before that bin."""
    histogram = torch.zeros(2**HALF_BITS, dtype=torch.int64)
    for part in parts:
        histogram += torch.bincount(part, minlength=2**HALF_BITS)
    total = histogram.cumsum(0)
    found = int(torch.searchsorted(total, count))
    return found, int(total[found] - histogram[found])
