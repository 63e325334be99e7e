"""A matrix in few bits: whole codes in blocks along the inputs, each block of an output with its own scale and zero.

Weight = (code - zero) * scale: the numbers of MatMulNBits and GatherBlockQuantized (ONNX Runtime's contrib operators). The last
block is filled up with zeros where the block size does not divide the inputs. Four bits lie two to a byte, low half first.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np

from exporters.onnx_rounding import ChooseGrid, Grid, compensated_codes, parts_of_outputs

SEARCHED_SCALES = np.linspace(0.6, 1.05, 16)  # of the scale that just covers a block; below 1 its largest weights are clipped
SEARCHED_ZEROS = (-2, -1, 0, 1, 2)  # codes beside the zero that plain rounding would take


@dataclass(frozen=True)
class Layout:
    """``bits`` per code, ``block`` inputs to a scale; symmetric: zero is always the middle code, and not stored."""

    bits: int
    block: int
    symmetric: bool

    @property
    def highest(self) -> int:
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        return 2 ** (self.bits - 1)

    @property
    def lowest(self) -> int:
        """As many codes below the middle as above it, where the middle is zero."""
        return 1 if self.symmetric else 0


@dataclass(frozen=True)
class Blocks:
    """A matrix ``[out, inputs]``. ``codes`` uint8 ``[out, blocks, block]``; ``scales`` float32, ``zeros`` uint8 ``[out, blocks]``."""

    layout: Layout
    inputs: int
    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray

    def values(self) -> np.ndarray:
        """The matrix in float32, ``[out, inputs]``."""
        apart = self.codes.astype(np.float32) - self.zeros[..., None].astype(np.float32)
        return (apart * self.scales[..., None]).reshape(len(apart), -1)[:, : self.inputs]


# Weights of one block float64 [block, out] and how much each input's error counts [block] -> what they may become.
Fit = Callable[[Layout, np.ndarray, np.ndarray], Grid]


def covering_grid(layout: Layout, weights: np.ndarray, _importance: np.ndarray) -> Grid:
    """Smallest and largest weight of each output just fit, and zero is representable: rounding errs by half a step at most."""
    if layout.symmetric:
        span, zero = np.abs(weights).max(0) * 2, np.full(weights.shape[1], layout.middle)
    else:
        low, high = np.minimum(weights.min(0), 0), np.maximum(weights.max(0), 0)
        span = high - low
        zero = np.rint(np.divide(-low, span, out=np.zeros_like(low), where=span > 0) * layout.highest)
    scale = (span / (layout.highest - layout.lowest)).astype(np.float32)
    return Grid(np.where(scale > 0, scale, np.float32(1)), zero.astype(np.int64), layout.lowest, layout.highest)


def searched_grid(layout: Layout, weights: np.ndarray, importance: np.ndarray) -> Grid:
    """Scale and zero of each output whose squared error, times ``importance``, is the least of those tried.

    After llama.cpp's k-quants: for a trial of scale and zero the codes are found, for these codes the best scale, and so on with
    the next trial. Never worse than ``covering_grid``, which is among the trials.
    """
    best = covering_grid(layout, weights, importance)
    scale, zero = best.scale.astype(np.float64), best.zero.copy()
    least = importance @ np.square(weights - best.values(best.codes(weights)))
    low, high = np.minimum(weights.min(0), 0), np.maximum(weights.max(0), 0)
    for step in (0,) if layout.symmetric else SEARCHED_ZEROS:
        tried = np.clip(best.zero + step, 0, layout.highest)
        below, above = np.maximum(tried - layout.lowest, 1), np.maximum(layout.highest - tried, 1)
        cover = np.maximum(-low / below, high / above)
        for share in SEARCHED_SCALES:
            grid = Grid(np.where(cover > 0, cover * share, 1), tried, layout.lowest, layout.highest)
            steps = grid.codes(weights) - tried
            squares = importance @ np.square(steps)
            refined = np.divide(importance @ (weights * steps), squares, out=np.zeros_like(cover), where=squares > 0)
            refined = refined.astype(np.float32).astype(np.float64)
            errors = importance @ np.square(weights - steps * refined)
            better = (errors < least) & (refined > 0)
            scale, zero, least = (np.where(better, new, old) for new, old in ((refined, scale), (tried, zero), (errors, least)))
    return Grid(scale.astype(np.float32), zero, layout.lowest, layout.highest)


def quantise_matrix(weight: np.ndarray, layout: Layout, fit: Fit, importance: np.ndarray | None = None) -> Blocks:
    """``weight`` ``[in, out]`` rounded to the nearest codes. ``importance`` ``[in]`` as ``fit`` wants it; None: all inputs alike."""
    chosen: list[Grid] = []
    choose = _recording(layout, fit, np.ones(len(weight)) if importance is None else importance, chosen)
    codes = np.empty(weight.shape, np.uint8)
    for start in range(0, len(weight), layout.block):
        part = weight[start : start + layout.block].astype(np.float64)
        codes[start : start + layout.block] = choose(start, part).codes(part)
    return _blocks(layout, codes, chosen)


def quantise_compensated(weight: np.ndarray, layout: Layout, fit: Fit, gram: np.ndarray) -> Blocks:
    """``weight`` ``[in, out]`` rounded after GPTQ, for inputs of ``gram`` ``[in, in]``."""
    parts = []
    for outputs in parts_of_outputs(weight):
        chosen: list[Grid] = []
        choose = _recording(layout, fit, importance_of(gram), chosen)
        codes = compensated_codes(weight[:, outputs], gram, choose, layout.block).astype(np.uint8)
        parts.append(_blocks(layout, codes, chosen))
    arrays = {name: np.concatenate([getattr(part, name) for part in parts]) for name in ("codes", "scales", "zeros")}
    return replace(parts[0], **arrays)


def importance_of(gram: np.ndarray) -> np.ndarray:
    """Mean square ``[in]`` of each input, relative to all of them: what an error of its weights does to the outputs."""
    squares = np.diag(gram).astype(np.float64)
    return squares / squares.mean() if squares.any() else np.ones_like(squares)


def packed(codes: np.ndarray, bits: int) -> np.ndarray:
    """uint8 ``[..., n]`` with 8 or 4 bits to a number: the last dimension halves, rounded up, with 4."""
    if bits == 8:
        return codes
    even = np.pad(codes, [(0, 0)] * (codes.ndim - 1) + [(0, codes.shape[-1] % 2)])
    return even[..., 0::2] | even[..., 1::2] << 4


def _recording(layout: Layout, fit: Fit, importance: np.ndarray, chosen: list[Grid]) -> ChooseGrid:
    """A chooser that keeps the grids that it chose, block after block."""

    def choose(start: int, weights: np.ndarray) -> Grid:
        chosen.append(fit(layout, weights, importance[start : start + len(weights)]))
        return chosen[-1]

    return choose


def _blocks(layout: Layout, codes: np.ndarray, grids: list[Grid]) -> Blocks:
    """``codes`` uint8 ``[in, out]`` with the grid of each block, in the operators' order."""
    inputs, outputs = codes.shape
    zeros = np.stack([grid.zero for grid in grids], axis=1).astype(np.uint8)  # [out, blocks]
    padded = np.repeat(zeros, layout.block, axis=1)  # what is filled up must be zero too
    padded[:, :inputs] = codes.T
    scales = np.stack([grid.scale for grid in grids], axis=1).astype(np.float32)
    return Blocks(layout, inputs, padded.reshape(outputs, len(grids), layout.block), scales, zeros)
