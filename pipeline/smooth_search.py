"""The alpha of each fold, searched: the one whose static int8 layers err least on a sample of the calibration activations.

Simulated is what the runtimes do: activations as unsigned bytes with one range for the tensor, weights as signed bytes with one
scale per output row, sums in full precision.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from models.families import weight_view
from pipeline.importance import feed, watch_inputs

# Higher alphas gain little more with a scale per output row, and lose with one scale per matrix, as TFLite has it: on the demo
# model the mean error before down goes 1.98e-3, 1.56e-3, 1.28e-3 at 0.7, 0.8, 0.9 with the first and 2.46e-3, 2.33e-3, 2.55e-3 with
# the second.
GRID = (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)
SAMPLED_ROWS = 512  # tokens whose activations are kept per fold, fewer where the model is so large that they would not fit in
SAMPLE_BYTES = 2**28  # of memory, whatever the number of windows


@dataclass
class Activations:
    """Inputs of one fold's consumers: ``rows`` float32 ``[SAMPLED_ROWS or fewer, channels]`` and each channel's range over all."""

    rows: torch.Tensor
    low: torch.Tensor
    high: torch.Tensor

    @property
    def largest(self) -> torch.Tensor:
        """Largest absolute value per channel, ``[channels]``."""
        return torch.maximum(-self.low, self.high)


def sample_activations(model: PreTrainedModel, modules: list[nn.Module], windows: torch.Tensor) -> list[Activations]:
    """The inputs of every module on ``windows`` int64 ``[count, window_tokens]``, the same randomly drawn tokens for each."""
    fitting = SAMPLE_BYTES // (4 * sum(weight_view(module).shape[1] for module in modules))
    count = max(1, min(SAMPLED_ROWS, windows.numel(), fitting))
    drawn = torch.from_numpy(np.sort(np.random.default_rng(0).choice(windows.numel(), count, replace=False)))
    seen, kept = [0] * len(modules), [0] * len(modules)  # tokens so far, and those of them in the sample
    samples: list[Activations | None] = [None] * len(modules)

    def see(index: int, activations: torch.Tensor) -> None:  # [batch, seq, channels]
        flat = activations.reshape(-1, activations.shape[-1])
        if samples[index] is None:
            samples[index] = Activations(flat.new_empty(count, flat.shape[1]), flat[0].clone(), flat[0].clone())
        sample = samples[index]
        mine = drawn[(drawn >= seen[index]) & (drawn < seen[index] + len(flat))] - seen[index]
        sample.rows[kept[index] : kept[index] + len(mine)] = flat[mine]
        torch.minimum(sample.low, flat.amin(0), out=sample.low)
        torch.maximum(sample.high, flat.amax(0), out=sample.high)
        seen[index] += len(flat)
        kept[index] += len(mine)

    with watch_inputs(modules, see):
        feed(model, windows, "sampling activations")
    return samples


def int8_error(activations: Activations, weights: list[torch.Tensor], scale: torch.Tensor) -> float:
    """Mean over the consumers of the relative squared error of their int8 output, ``weights`` being ``[outputs, channels]``.

    ``scale`` ``[channels]`` divides the activations and multiplies the weights; an output that is zero throughout errs by nothing.
    """
    inputs = as_uint8(activations.rows / scale, (activations.low / scale).amin(), (activations.high / scale).amax())
    errors = []
    for weight in weights:
        exact = activations.rows @ weight.T  # [rows, outputs]
        energy = float(exact.square().sum())
        error = float((inputs @ as_int8(weight * scale).T - exact).square().sum())
        errors.append(error / energy if energy else 0.0)
    return sum(errors) / len(errors)


def as_uint8(values: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    """What 256 steps between ``low`` and ``high``, zero among them, make of ``values``."""
    low, high = low.clamp(max=0), high.clamp(min=0)
    step = (high - low) / 255
    if step == 0:
        return values
    zero = (-low / step).round()
    return ((values / step).round().add(zero).clamp(0, 255) - zero) * step


def as_int8(weight: torch.Tensor) -> torch.Tensor:
    """What 255 steps, symmetric, one scale for each output row, make of ``weight`` ``[outputs, channels]``."""
    step = weight.abs().amax(1, keepdim=True) / 127
    step = torch.where(step > 0, step, torch.ones_like(step))
    return (weight / step).round() * step
