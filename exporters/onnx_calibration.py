"""Ranges of activations for static quantisation, read as the windows stream by: memory does not grow with their number.

ONNX Runtime's own calibrators keep every intermediate tensor until the end, or demand feeds of one shape. Here a feed is run,
its activations are reduced to a few numbers and forgotten. Every window is fed as a prompt and then, token by token, on the
real cache that the prompt left. Percentile, entropy (Migacz, "8-bit inference with TensorRT", 2017) and least squared error read
the text twice: the first time for the extremes, the second into histograms of fixed size between them.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import onnx
import onnxruntime

from exporters.onnx_session import empty_past, feed, open_session_of, past_names, present_name
from models.errors import GateError
from models.progress import track

BINS = 2048
PERCENTILE = 99.99  # of the values, kept between the two ends
ENTROPY_LEVELS = 256  # of uint8, which spans both signs here; the paper counts the 128 of one sign
ENTROPY_CANDIDATES = 64  # clipping thresholds tried between 1/8 of the largest magnitude and all of it
UINT8_STEPS = 255
MSE_SMALLEST_SHARE = 1 / 64  # of an extreme: ends nearer to zero are not tried
MSE_CANDIDATES = 33  # for each end, in each of MSE_ROUNDS; every round looks between the neighbours of the best so far
MSE_ROUNDS = 2

Calibrator = Literal["minmax", "percentile", "entropy", "mse"]


@dataclass(frozen=True)
class Feeds:
    """What is fed: windows int ``[n, tokens]``, the last ``decode_steps`` tokens of each one at a time."""

    windows: np.ndarray
    decode_steps: int


@dataclass
class Histogram:
    """Counts of values between ``low`` and ``high`` in ``BINS`` equal bins; grows in counts only."""

    low: float
    high: float
    counts: np.ndarray

    @property
    def edges(self) -> np.ndarray:
        return np.linspace(self.low, self.high, BINS + 1)


@dataclass(frozen=True)
class Range:
    """What one tensor's int8 numbers must span, and the standard deviation of its values."""

    low: float
    high: float
    deviation: float

    @property
    def crest(self) -> float:
        """Width in standard deviations: how few of the 256 steps the ordinary values get. 0 for a constant tensor."""
        return (self.high - self.low) / self.deviation if self.deviation > 0 else 0.0


@dataclass
class Extremes:
    """Running minimum, maximum and moments of one tensor, in float64."""

    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    total: float = 0.0
    squares: float = 0.0

    def add(self, values: np.ndarray) -> None:
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        self.count += values.size
        self.total += float(values.sum(dtype=np.float64))
        self.squares += float(np.square(values, dtype=np.float64).sum())

    def range(self) -> Range:
        mean = self.total / self.count
        return Range(self.low, self.high, max(self.squares / self.count - mean * mean, 0.0) ** 0.5)


def activation_ranges(
    model: onnx.ModelProto, names: list[str], feeds: Feeds, calibrator: Calibrator, artifact: str = "onnx_static_int8"
) -> dict[str, Range]:
    """The range to represent per tensor of ``names``. GateError, naming ``artifact``, where a tensor holds NaN or infinity.

    A tensor of equal values keeps its minimum and maximum with every calibrator: int8 holds zero and one other number exactly.
    """
    session = observing_session(model, names)
    extremes = {name: Extremes() for name in names}
    observe(session, names, feeds, lambda name, values: extremes[name].add(values))
    ranges = {name: found.range() for name, found in extremes.items()}
    for name, found in ranges.items():
        if not np.isfinite([found.low, found.high]).all():
            raise GateError(f"{artifact}: {name} holds NaN or infinity on the calibration text; check the fp32 model")
    spread = [name for name, found in ranges.items() if found.high > found.low]
    if calibrator == "minmax" or not spread:
        return ranges
    histograms = {name: Histogram(ranges[name].low, ranges[name].high, np.zeros(BINS, np.int64)) for name in spread}

    def count(name: str, values: np.ndarray) -> None:
        histogram = histograms[name]
        histogram.counts += np.histogram(values, BINS, range=(histogram.low, histogram.high))[0]

    observe(observing_session(model, spread), spread, feeds, count)
    choose = {"percentile": percentile_ends, "entropy": entropy_ends, "mse": least_squares_ends}[calibrator]
    ends = {name: choose(histogram) for name, histogram in histograms.items()}
    return ranges | {name: replace(ranges[name], low=low, high=high) for name, (low, high) in ends.items()}


def observing_session(model: onnx.ModelProto, names: list[str]) -> onnxruntime.InferenceSession:
    """A session that also gives the tensors ``names``. The model is left as it was."""
    outputs = [onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None) for name in names]
    model.graph.output.extend(outputs)
    try:
        return open_session_of(model)
    finally:
        del model.graph.output[-len(outputs) :]


Visit = Callable[[str, np.ndarray], None]


def observe(session: onnxruntime.InferenceSession, names: list[str], feeds: Feeds, visit: Visit) -> None:
    """Call ``visit(name, values)`` for every tensor of every feed; nothing is kept between feeds but the cache of one window."""
    for window in track(feeds.windows, "calibrating", total=len(feeds.windows)):
        for values, _ in run_window(session, names, window, feeds.decode_steps):
            for name, array in zip(names, values, strict=True):
                visit(name, array)


def run_window(
    session: onnxruntime.InferenceSession, names: list[str], window: np.ndarray, decode_steps: int
) -> Iterator[tuple[list[np.ndarray], dict[str, np.ndarray]]]:
    """The tensors ``names``, and the cache by the pasts' names, after the prompt and after each decode step on its cache."""
    cache_names, past = past_names(session), empty_past(session, 1)
    outputs = [*names, *map(present_name, cache_names)]
    prompt = len(window) - decode_steps
    for tokens in (window[:prompt], *(window[step : step + 1] for step in range(prompt, len(window)))):
        values = session.run(outputs, feed(tokens[None], past))
        past = dict(zip(cache_names, values[len(names) :], strict=True))
        yield values[: len(names)], past


def percentile_ends(histogram: Histogram) -> tuple[float, float]:
    """The ends between which ``PERCENTILE`` per cent of the values lie, the same share cut off at each end."""
    share = np.cumsum(histogram.counts) / histogram.counts.sum()
    cut = (100 - PERCENTILE) / 200
    edges = histogram.edges
    low, high = edges[np.searchsorted(share, cut, side="right")], edges[np.searchsorted(share, 1 - cut) + 1]
    return float(low), float(high)


def entropy_ends(histogram: Histogram) -> tuple[float, float]:
    """Clip at the threshold whose quantised distribution has the least KL divergence from the original one."""
    largest = max(abs(histogram.low), abs(histogram.high))
    thresholds = np.linspace(largest / 8, largest, ENTROPY_CANDIDATES)
    costs = [_clipping_cost(histogram, threshold) for threshold in thresholds]
    best = thresholds[int(np.argmin(costs))]
    return float(max(histogram.low, -best)), float(min(histogram.high, best))


def least_squares_ends(histogram: Histogram) -> tuple[float, float]:
    """The ends whose uint8 numbers have the least squared error; both are searched at once. Zero always lies between them."""
    extremes = min(histogram.low, 0.0), max(histogram.high, 0.0)
    ends = [np.geomspace(MSE_SMALLEST_SHARE, 1, MSE_CANDIDATES) * extreme if extreme else np.zeros(1) for extreme in extremes]
    best, least = extremes, np.inf
    for _ in range(MSE_ROUNDS):
        for low in ends[0]:
            costs = squared_errors(histogram, low, ends[1])
            if costs.min() < least:
                best, least = (float(low), float(ends[1][costs.argmin()])), costs.min()
        ends = [_between_neighbours(candidates, end) for candidates, end in zip(ends, best, strict=True)]
    return best


def squared_errors(histogram: Histogram, low: float, highs: np.ndarray) -> np.ndarray:
    """Mean squared error of uint8 between ``low`` and each of ``highs``, float64 ``[highs]``; inf where a range is empty.

    Values count as spread evenly over their bin, and the error is integrated exactly: at a bin's centre alone it would vanish
    wherever steps happen to be as wide as bins. In units of a step, off the nearest level ``n`` by ``r``, the integral of the
    squared error is ``n / 12 + r ** 3 / 3``; clipping only makes ``r`` larger.
    """
    scale = np.maximum((highs - low) / UINT8_STEPS, 0)[:, None]  # [highs, 1]
    used = scale[:, 0] > 0
    safe = np.where(scale > 0, scale, 1)
    zero = np.rint(-low / safe)
    position = histogram.edges / safe + zero  # [highs, BINS + 1]
    level = np.clip(np.rint(position), 0, UINT8_STEPS)
    integral = level / 12 + (position - level) ** 3 / 3
    means = np.diff(integral, axis=1) / np.diff(position, axis=1) * safe**2  # [highs, BINS]
    return np.where(used, means @ histogram.counts / histogram.counts.sum(), np.inf)


def _between_neighbours(candidates: np.ndarray, best: float) -> np.ndarray:
    """As many candidates again between those beside ``best``; an end that cannot move stays."""
    index = int(np.argmin(np.abs(candidates - best)))
    near = candidates[max(index - 1, 0)], candidates[min(index + 1, len(candidates) - 1)]
    return np.append(np.linspace(*near, MSE_CANDIDATES), best) if near[0] != near[1] else candidates


def _clipping_cost(histogram: Histogram, threshold: float) -> float:
    """KL(original clipped at ``threshold`` || the same in ``ENTROPY_LEVELS`` levels). Empty bins stay empty, as in the paper."""
    centres = (histogram.edges[:-1] + histogram.edges[1:]) / 2
    kept = np.abs(centres) <= threshold
    if not kept.any():
        return np.inf
    counts = histogram.counts.astype(np.float64)
    inside = counts[kept]
    original = inside.copy()
    original[0] += counts[: int(np.argmax(kept))].sum()  # what is clipped lands in the outermost bins
    original[-1] += counts[len(kept) - int(np.argmax(kept[::-1])) :].sum()
    level = np.arange(len(inside)) * ENTROPY_LEVELS // len(inside)
    sums = np.bincount(level, inside, ENTROPY_LEVELS)
    occupied = np.bincount(level, original > 0, ENTROPY_LEVELS)
    quantised = np.where(original > 0, (sums / np.maximum(occupied, 1))[level], 0.0)
    present = original > 0
    p, q = original[present] / original.sum(), np.maximum(quantised[present], 1e-9) / max(quantised.sum(), 1e-9)
    return float(np.sum(p * np.log(p / q)))
