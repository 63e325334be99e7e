"""Rounding of weights that makes up for its own error, after GPTQ (Frantar et al. 2022, arXiv:2210.17323).

A matrix is rounded one input channel after another; what rounding did to a layer's outputs is taken back, as far as the
channels move together on the calibration text, by the channels that are still to be rounded. The file has the same form and
speed as with plain rounding: static int8 keeps the scales of the QDQ writer, blocks of weights choose theirs when their turn
comes, from what is left to be represented. How channels move together is a Gram matrix per activation, added up as the
windows stream by; so many at a time as fit ``GRAM_BYTES``.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import numpy_helper
from scipy.linalg import cholesky, inv

from exporters.onnx_calibration import Feeds, observe, observing_session

GRAM_BYTES = 512 * 2**20
DAMPING = 0.1  # of the mean diagonal, added to it: channels that hardly vary must not take back much
OUTPUTS_AT_ONCE = 32768  # outputs don't meet, so their number bounds the memory and changes nothing
BLOCK = 128  # input channels whose corrections reach the rest of the matrix in one product


@dataclass(frozen=True)
class Grid:
    """The numbers that each output's weights may take: ``(code - zero) * scale`` for whole codes from ``lowest`` to ``highest``.

    ``scale`` ``[out]`` and above 0; ``zero`` ``[out]`` or one number.
    """

    scale: np.ndarray
    zero: np.ndarray | int
    lowest: int
    highest: int

    def codes(self, values: np.ndarray) -> np.ndarray:
        """The nearest code of ``values`` ``[..., out]``, in their float type."""
        return np.clip(np.rint(values / self.scale) + self.zero, self.lowest, self.highest)

    def values(self, codes: np.ndarray) -> np.ndarray:
        return (codes - self.zero) * self.scale


ChooseGrid = Callable[[int, np.ndarray], Grid]  # first input channel of a block and its weights [block, out], float64


def compensate(quantised: onnx.ModelProto, model: onnx.ModelProto, layers: dict[str, str], windows: np.ndarray) -> None:
    """Round every linear layer of ``quantised`` anew, in place. ``model`` is its fp32 parent; ``layers``: input by node name."""
    originals = {tensor.name: tensor for tensor in model.graph.initializer}
    written = {tensor.name: tensor for tensor in quantised.graph.initializer}
    for name, gram in weight_grams(model, layers, windows):
        target, scale = written[f"{name}_quantized"], numpy_helper.to_array(written[f"{name}_scale"])
        largest = int(np.abs(numpy_helper.to_array(target)).max())  # 127, or 64 with a reduced range
        rounded = compensated_rounding(numpy_helper.to_array(originals[name]), scale, gram, largest)
        target.CopyFrom(numpy_helper.from_array(rounded, target.name))


def weight_grams(model: onnx.ModelProto, layers: dict[str, str], windows: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Every matrix's name, and ``X^T X`` of what comes into it on ``windows``. ``layers``: input tensor by node name."""
    feeds = Feeds(windows, decode_steps=0)  # sums over all tokens don't depend on how they were fed: one call per window
    weights = {node.name: node.input[1] for node in model.graph.node if node.name in layers}
    sizes = {tensor.name: tensor.dims[0] for tensor in model.graph.initializer if len(tensor.dims) == 2}
    readers: dict[str, str] = {}  # one input tensor per matrix: equal matrices are stored once
    for layer, value in layers.items():
        readers.setdefault(weights[layer], value)
    for group in groups_of({value: sizes[weight] for weight, value in readers.items()}):
        for value, gram in gram_matrices(model, group, feeds).items():
            yield from ((weight, gram) for weight, source in readers.items() if source == value)


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
    """int8 ``[in, out]`` for ``weight`` ``[in, out]``, ``scale`` ``[out]`` or one number and ``gram`` ``[in, in]``, within ``±largest``."""
    rounded, scale = np.empty(weight.shape, np.int8), np.broadcast_to(scale, weight.shape[1:])
    for part in parts_of_outputs(weight):
        grid = Grid(scale[part], 0, -largest, largest)
        rounded[:, part] = compensated_codes(weight[:, part], gram, lambda *_, grid=grid: grid, BLOCK)
    return rounded


def parts_of_outputs(weight: np.ndarray) -> list[slice]:
    """Outputs of ``weight`` ``[in, out]`` in parts that are rounded by themselves: a head's float64 copies would take gigabytes."""
    outputs = weight.shape[1]
    return [slice(start, min(start + OUTPUTS_AT_ONCE, outputs)) for start in range(0, outputs, OUTPUTS_AT_ONCE)]


def compensated_codes(weight: np.ndarray, gram: np.ndarray, choose: ChooseGrid, block: int) -> np.ndarray:
    """Codes ``[in, out]`` of ``weight`` ``[in, out]`` with inputs of ``gram`` ``[in, in]``; each ``block`` inputs ask for their grid."""
    shares = error_shares(gram)
    left = weight.astype(np.float64)  # [in, out], what is still to be represented
    codes = np.empty_like(left)
    for start in range(0, len(left), block):
        stop = min(start + block, len(left))
        grid = choose(start, left[start:stop])
        errors = np.empty((stop - start, left.shape[1]))
        for channel in range(start, stop):
            codes[channel] = grid.codes(left[channel])
            error = (left[channel] - grid.values(codes[channel])) / shares[channel, channel]
            left[channel + 1 : stop] -= shares[channel, channel + 1 : stop, None] * error
            errors[channel - start] = error
        left[stop:] -= shares[start:stop, stop:].T @ errors
    return codes


def error_shares(gram: np.ndarray) -> np.ndarray:
    """Upper triangular ``[in, in]``: how later channels answer for an earlier one's error. ``gram`` is left as it was.

    The identity, so nobody answers, for an input that was zero on the whole text.
    """
    diagonal = np.mean(np.diag(gram), dtype=np.float64)
    if diagonal == 0:
        return np.eye(len(gram))
    damped = gram.astype(np.float64) + DAMPING * diagonal * np.eye(len(gram))
    return cholesky(inv(damped, overwrite_a=True), overwrite_a=True)
