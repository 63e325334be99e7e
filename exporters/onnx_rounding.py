"""Rounding of weights to int8 that makes up for its own error, after GPTQ (Frantar et al. 2022, arXiv:2210.17323).

A matrix is rounded one input channel after another; what rounding did to a layer's outputs is taken back, as far as the
channels move together on the calibration text, by the channels that are still to be rounded. Scales are those of the QDQ
writer, and so the file has the same form and speed as with plain rounding. How channels move together is a Gram matrix per
activation, added up as the windows stream by; so many at a time as fit ``GRAM_BYTES``.
"""

from collections.abc import Iterator

import numpy as np
import onnx
from onnx import numpy_helper
from scipy.linalg import cholesky, inv

from exporters.onnx_calibration import Feeds, observe, observing_session

GRAM_BYTES = 512 * 2**20
DAMPING = 0.1  # of the mean diagonal, added to it: channels that hardly vary must not take back much
BLOCK = 128  # input channels whose corrections reach the rest of the matrix in one product


def compensate(quantised: onnx.ModelProto, model: onnx.ModelProto, layers: dict[str, str], windows: np.ndarray) -> None:
    """Round every linear layer of ``quantised`` anew, in place. ``model`` is its fp32 parent; ``layers``: input by node name."""
    feeds = Feeds(windows, decode_steps=0)  # sums over all tokens don't depend on how they were fed: one call per window
    weights = {node.name: node.input[1] for node in model.graph.node if node.name in layers}
    originals = {tensor.name: tensor for tensor in model.graph.initializer}
    written = {tensor.name: tensor for tensor in quantised.graph.initializer}
    widths = {value: originals[weights[layer]].dims[0] for layer, value in layers.items()}
    for group in groups_of(widths):
        for value, gram in gram_matrices(model, group, feeds).items():
            for name in dict.fromkeys(weights[layer] for layer, source in layers.items() if source == value):
                target, scale = written[f"{name}_quantized"], numpy_helper.to_array(written[f"{name}_scale"])
                largest = int(np.abs(numpy_helper.to_array(target)).max())  # 127, or 64 with a reduced range
                rounded = compensated_rounding(numpy_helper.to_array(originals[name]), scale, gram, largest)
                target.CopyFrom(numpy_helper.from_array(rounded, target.name))


def groups_of(widths: dict[str, int]) -> Iterator[list[str]]:
    """Tensors in order, cut into groups whose Gram matrices fit ``GRAM_BYTES`` together. ``widths``: channels by tensor."""
    group, used = [], 0
    for name, width in widths.items():
        needed = width * width * 4
        if group and used + needed > GRAM_BYTES:
            yield group
            group, used = [], 0
        group.append(name)
        used += needed
    if group:
        yield group


def gram_matrices(model: onnx.ModelProto, names: list[str], feeds: Feeds) -> dict[str, np.ndarray]:
    """``X^T X`` float32 ``[channels, channels]`` of each tensor over all tokens of all feeds."""
    grams: dict[str, np.ndarray] = {}

    def add(name: str, values: np.ndarray) -> None:
        rows = values.reshape(-1, values.shape[-1])  # [tokens, channels]
        product = rows.T @ rows
        grams[name] = grams[name] + product if name in grams else product

    observe(observing_session(model, names), names, feeds, add)
    return grams


def compensated_rounding(weight: np.ndarray, scale: np.ndarray, gram: np.ndarray, largest: int) -> np.ndarray:
    """int8 ``[in, out]`` for ``weight`` ``[in, out]``, ``scale`` ``[out]`` and ``gram`` ``[in, in]``, within ``±largest``."""
    diagonal = np.mean(np.diag(gram), dtype=np.float64)
    if diagonal == 0:  # the input was zero on the whole text: nothing to make up for
        return np.clip(np.rint(weight / scale), -largest, largest).astype(np.int8)
    damped = gram.astype(np.float64) + DAMPING * diagonal * np.eye(len(gram))
    shares = cholesky(inv(damped, overwrite_a=True), overwrite_a=True)  # upper: how later channels answer for an earlier one
    left = weight.astype(np.float64)  # [in, out], what is still to be represented
    rounded = np.empty(weight.shape, np.int8)
    for start in range(0, len(left), BLOCK):
        stop = min(start + BLOCK, len(left))
        errors = np.empty((stop - start, left.shape[1]))
        for channel in range(start, stop):
            rounded[channel] = np.clip(np.rint(left[channel] / scale), -largest, largest)
            error = (left[channel] - rounded[channel] * scale) / shares[channel, channel]
            left[channel + 1 : stop] -= shares[channel, channel + 1 : stop, None] * error
            errors[channel - start] = error
        left[stop:] -= shares[start:stop, stop:].T @ errors
    return rounded
