"""How static int8 chooses its ranges: least squared error against a reference, tensors of equal values, one scale per matrix."""

import json

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from exporters import onnx_int8
from exporters.onnx_agreement import compare
from exporters.onnx_calibration import (
    BINS,
    ENTROPY_CANDIDATES,
    ENTROPY_LEVELS,
    PERCENTILE,
    Feeds,
    Histogram,
    activation_ranges,
    entropy_ends,
    least_squares_ends,
    percentile_ends,
    squared_errors,
)
from exporters.onnx_qdq import Scheme, linear_layers, quantise
from exporters.onnx_structure import require_int8, structure_of
from exporters.settings import OnnxInt8Settings
from exporters.tests.conftest import CASES

STEPS = 6
LINEAR_LAYERS = {"llama": 11, "qwen3": 11, "gpt2": 9}  # of two decoder layers with packed qkv, and the head
CALIBRATORS = ("minmax", "percentile", "entropy", "mse")


def histogram_of(values):
    counts, _ = np.histogram(values, BINS, range=(values.min(), values.max()))
    return Histogram(float(values.min()), float(values.max()), counts)


def uint8_error(values, low, high):
    """Mean squared error of the values themselves, as QuantizeLinear and DequantizeLinear make it."""
    scale = (high - low) / 255
    zero = np.clip(np.rint(-low / scale), 0, 255)
    rounded = (np.clip(np.rint(values / scale) + zero, 0, 255) - zero) * scale
    return np.square(rounded - values).mean()


def normal(draws):
    return draws.normal(size=20_000)


def heavy_tailed(draws):
    return draws.standard_t(2, size=20_000)


def one_outlier(draws):
    return np.append(draws.normal(size=20_000), 400.0)


def positive(draws):
    return draws.gamma(0.5, size=20_000)


def gated(draws):
    return np.append(draws.normal(size=20_000) * draws.gamma(0.3, size=20_000), [-90.0, 12.0])


DISTRIBUTIONS = pytest.mark.parametrize("values", [normal, heavy_tailed, one_outlier, positive, gated], ids=lambda f: f.__name__)


@DISTRIBUTIONS
def test_least_squares_is_as_good_as_trying_every_pair_of_ends(values):
    """The reference quantises the values, not a histogram, with 60 x 60 pairs of ends."""
    values = values(np.random.default_rng(3))
    low, high = least_squares_ends(histogram_of(values))
    assert min(values.min(), 0) <= low <= 0 < high <= values.max()
    shares = np.linspace(1 / 60, 1, 60)
    lows = shares * values.min() if values.min() < 0 else [0.0]
    least = min(uint8_error(values, a, b) for a in lows for b in shares * values.max())
    assert uint8_error(values, low, high) <= least * 1.05
    assert uint8_error(values, low, high) <= uint8_error(values, min(values.min(), 0), values.max()) * (1 + 1e-3)


@DISTRIBUTIONS
def test_percentile_leaves_the_share_outside_that_it_says(values):
    """Counted in the values themselves; the ends are those of bins, so one bin further in would leave too much outside."""
    values = values(np.random.default_rng(5))[:19_000]  # so that no share falls on a value exactly
    histogram = histogram_of(values)
    low, high = percentile_ends(histogram)
    share, bin_width = (1 - PERCENTILE / 100) / 2, (histogram.high - histogram.low) / BINS
    assert (values < low).mean() <= share < (values < low + bin_width * 1.001).mean()
    assert (values > high).mean() <= share < (values > high - bin_width * 1.001).mean()


def naive_divergence(histogram, threshold):
    """Migacz's KL in the words of his slides, bin by bin: the clipped distribution against itself in few levels."""
    width = (histogram.high - histogram.low) / BINS
    kept = [i for i in range(BINS) if abs(histogram.low + (i + 0.5) * width) <= threshold]
    reference = {i: float(histogram.counts[i]) for i in kept}
    for i in range(BINS):
        if i not in reference:
            reference[kept[0] if i < kept[0] else kept[-1]] += float(histogram.counts[i])
    levels: dict[int, list[int]] = {}
    for place, i in enumerate(kept):
        levels.setdefault(place * ENTROPY_LEVELS // len(kept), []).append(i)
    candidate = {}
    for members in levels.values():
        mass = sum(float(histogram.counts[i]) for i in members)  # what was clipped is no part of the quantised distribution
        filled = [i for i in members if reference[i] > 0]
        candidate |= {i: mass / len(filled) for i in filled}
    total, inside = sum(reference.values()), sum(candidate.values())
    least = 1e-9  # of a value, where a level holds nothing but what was clipped: its logarithm is none
    return sum(count / total * np.log(count / total / (max(candidate[i], least) / inside)) for i, count in reference.items() if count)


@DISTRIBUTIONS
def test_entropy_clips_where_no_other_threshold_diverges_less(values):
    histogram = histogram_of(values(np.random.default_rng(6)))
    low, high = entropy_ends(histogram)
    largest = max(abs(histogram.low), abs(histogram.high))
    costs = {t: naive_divergence(histogram, t) for t in np.linspace(largest / 8, largest, ENTROPY_CANDIDATES)}
    chosen = next(t for t in costs if (max(histogram.low, -t), min(histogram.high, t)) == (low, high))
    assert costs[chosen] <= min(costs.values()) * (1 + 1e-6)


def test_squared_errors_of_a_histogram_are_those_of_its_values():
    values = np.random.default_rng(4).normal(size=200_000)
    histogram, highs = histogram_of(values), np.array([0.3, 1.0, 3.0, 4.0])
    expected = [uint8_error(values, -2.0, high) for high in highs]
    np.testing.assert_allclose(squared_errors(histogram, -2.0, highs), expected, rtol=0.01)


@pytest.mark.parametrize("constant", (0.0, 0.37, -2.5))
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_an_activation_of_equal_values_is_represented_exactly(calibrator, constant, exports, text, tmp_path):
    """A norm whose scale is 0 gives its offset everywhere; int8 must give the layer behind it the very same number."""
    model = onnx.load(exports["gpt2", True] / "onnx_fp32.onnx")
    layers = linear_layers(model)
    value = layers["transformer.h.1.mlp.c_fc"]
    norm = next(node for node in model.graph.node if value in node.output)
    for position, number in ((2, 0.0), (3, constant)):  # under names of its own: equal vectors are stored once
        norm.input[position] = f"own.{position}"
        model.graph.initializer.append(numpy_helper.from_array(np.full(64, number, np.float32), norm.input[position]))
    onnx.save(model, tmp_path / "fp32.onnx")
    feeds = Feeds(np.load(text / "calibration.npy"), STEPS)
    ranges = activation_ranges(model, list(dict.fromkeys(layers.values())), feeds, calibrator)
    assert ranges[value].low == ranges[value].high == np.float32(constant)
    quantised = quantise(model, Scheme(ranges))
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in quantised.graph.initializer}
    scale, zero = tensors[f"{value}_scale"], int(tensors[f"{value}_zero_point"])
    code = np.clip(np.rint(np.float32(constant) / scale) + zero, 0, 255)
    assert (code - zero) * scale == pytest.approx(constant, rel=1e-6)
    onnx.save(quantised, tmp_path / "int8.onnx")
    require_int8(structure_of(tmp_path / "int8.onnx"), len(layers), "int8")
    assert compare(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", np.load(text / "validation.npy"), "int8").kl < 0.1


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("calibrator", CALIBRATORS)
def test_every_calibrator_makes_a_file_that_answers(calibrator, family, exports, text, tmp_path):
    settings = OnnxInt8Settings(windows=4, decode_steps=STEPS, calibrator=calibrator, two_step_crest=None, rounding="nearest")
    onnx_int8.run(settings, tmp_path, onnx=exports[family, True], text=text)
    assert json.loads((tmp_path / "onnx_static_int8.json").read_text())["measured"]["against_fp32"]["kl"] < 0.1


@pytest.mark.parametrize("rounding", ("nearest", "compensated"))
@pytest.mark.parametrize("case", CASES, ids=str)
def test_one_scale_per_matrix(case, rounding, exports, text, tmp_path):
    settings = OnnxInt8Settings(windows=4, decode_steps=STEPS, per_channel=False, rounding=rounding)
    onnx_int8.run(settings, tmp_path, onnx=exports[case], text=text)
    measured = json.loads((tmp_path / "onnx_static_int8.json").read_text())["measured"]
    assert measured["int8_linear_layers"] == LINEAR_LAYERS[case[0]] and measured["embedding_int8"]
    assert measured["against_fp32"]["kl"] < 0.1
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "onnx_static_int8.onnx").graph.initializer}
    layers = linear_layers(onnx.load(exports[case] / "onnx_fp32.onnx"))
    originals = {t.name: numpy_helper.to_array(t) for t in onnx.load(exports[case] / "onnx_fp32.onnx").graph.initializer}
    for layer in layers:
        scale, codes = tensors[f"{layer}.weight_scale"], tensors[f"{layer}.weight_quantized"]
        assert scale.size == 1
        assert scale == pytest.approx(np.abs(originals[f"{layer}.weight"]).max() / 127, rel=0.01)
        if rounding == "nearest":
            np.testing.assert_allclose(codes * scale, originals[f"{layer}.weight"], atol=float(scale) * 0.51)
