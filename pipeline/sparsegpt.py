"""SparseGPT: weights go where the layer's output suffers least, and those that stay make up for them.

Frantar and Alistarh 2023, arXiv:2301.00774. Per output row the layer's squared error is ``(w - w') H (w - w')`` with ``H`` the
sum of ``x x'`` over calibration tokens. Columns go from left to right; what a removed weight leaves behind is spread over
the columns to its right by the inverse of ``H`` restricted to these, whose rows are those of one triangular factor.
"""

from dataclasses import dataclass

import torch

from models.errors import GateError
from models.families import weight_view
from pipeline.layerwise import InputGroup
from pipeline.masks import Removal, layer_mask, lowest

BLOCK_COLUMNS = 128  # updated at once; a multiple of every pattern's group
DAMPING_STEP = 10.0
MOST_DAMPING = 1e4
DEAD_SCALE = 1e4  # of a dead input's pivot, so that its weights count less than any other


@dataclass(frozen=True)
class Factor:
    """Upper triangular ``U`` ``[inputs, inputs]`` with ``U' U`` the inverse of the damped second moments, dead inputs aside."""

    upper: torch.Tensor
    damping: float  # used, as share of the mean diagonal
    dead_inputs: int  # that were zero on every token


@torch.no_grad()
def prune_group(group: InputGroup, removal: Removal, damping: float) -> Factor:
    """Prune linear layers of one input in place. GateError names the layer whose inputs are not finite."""
    factor = inverse_factor(second_moments(group), damping)
    for module in group.modules:
        weight = weight_view(module)
        weight.copy_(pruned_weight(weight, factor.upper, removal))
    return factor


def second_moments(group: InputGroup) -> torch.Tensor:
    """Float32 ``[inputs, inputs]``: the sum of ``x x'`` over calibration tokens."""
    channels = weight_view(group.modules[0]).shape[1]
    moments = torch.zeros(channels, channels)

    def add(inputs: torch.Tensor) -> None:
        moments.addmm_(inputs.float().T, inputs.float())

    group.run(add)
    if not torch.isfinite(moments.diagonal()).all():
        raise GateError(f"the inputs of {group.names[0]} are not finite on the calibration text; check the checkpoint's weights")
    return moments


def inverse_factor(moments: torch.Tensor, damping: float) -> Factor:
    """Factor of the inverse of ``moments`` plus ``damping`` times the mean diagonal; damped more until it is positive definite.

    A dead input is coupled to no other, so that its row may be scaled: its weights go first, the smallest before the others.
    With ``J`` the reversal of order and ``J H J = L L'`` the factor is ``J inv(L) J``.
    """
    diagonal = moments.diagonal().clone()
    dead = diagonal == 0
    mean, largest = float(diagonal.mean()) or 1.0, float(diagonal.max())
    reversed_moments = moments.flip(0, 1)
    del moments  # as large as everything else here; the caller keeps none either
    undamped = reversed_moments.diagonal().clone()
    while damping <= MOST_DAMPING:
        reversed_moments.diagonal().copy_(undamped + damping * mean)
        lower, failed = torch.linalg.cholesky_ex(reversed_moments)
        # A pivot below the rounding of the largest diagonal is noise, also where its sign came out right.
        if not failed and float(lower.diagonal().min()) ** 2 > torch.finfo(torch.float32).eps * largest:
            del reversed_moments
            inverse = torch.eye(len(lower))
            torch.linalg.solve_triangular(lower, inverse, upper=False, out=inverse)
            del lower
            upper = inverse.flip(0, 1)
            upper[dead] *= DEAD_SCALE
            return Factor(upper, damping, int(dead.sum()))
        damping *= DAMPING_STEP
    raise GateError(f"second moments are not positive definite at damping {damping / DAMPING_STEP:g}; set prune.method=wanda")


def pruned_weight(weight: torch.Tensor, upper: torch.Tensor, removal: Removal) -> torch.Tensor:
    """The new weight, float32 ``[outputs, inputs]``, with exactly the zeros that ``removal`` asks for."""
    weight = weight.float().clone(memory_format=torch.contiguous_format)
    rows, columns = weight.shape
    for first in range(0, columns, BLOCK_COLUMNS):
        last = min(first + BLOCK_COLUMNS, columns)
        # Counts follow the share of columns done, so that the blocks' rounding does not add up.
        count = removal.count(rows * last) - removal.count(rows * first)
        errors = _prune_block(weight[:, first:last], upper[first:last, first:last], removal, count)
        weight[:, last:] -= errors @ upper[first:last, last:]
    return weight


def _prune_block(block: torch.Tensor, upper: torch.Tensor, removal: Removal, count: int) -> torch.Tensor:
    """Prune a block of columns in place; returns the errors ``[outputs, columns]`` that the columns to its right make up for.

    Without a pattern the block's mask is chosen at its start; with one, each group's when its turn comes.
    """
    pivots = upper.diagonal()
    errors = torch.empty_like(block)
    mask = torch.empty_like(block, dtype=torch.bool) if removal.group else lowest(block.square() / pivots.square(), count)
    for column in range(block.shape[1]):
        if removal.group and column % removal.group == 0:
            group = slice(column, column + removal.group)
            mask[:, group] = layer_mask(block[:, group].square() / pivots[group].square(), removal)
        kept = block[:, column].masked_fill(mask[:, column], 0.0)
        errors[:, column] = (block[:, column] - kept) / pivots[column]
        block[:, column:] -= torch.outer(errors[:, column], upper[column, column:])
        block[:, column] = kept
    return errors
