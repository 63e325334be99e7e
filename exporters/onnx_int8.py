"""Static int8 from the fp32 graph: QDQ, unsigned activations per tensor, signed weights per output channel, embedding per row.

Quantised are all linear layers, the head among them, and the embedding. What ONNX Runtime makes of the file is checked on the
graph that it has optimised, and the logits are compared with the fp32 graph's on text that calibrated nothing.
"""

from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx as onnx_format
from scipy.special import log_softmax

from exporters.artifact import read_sidecar, write_sidecar
from exporters.onnx_calibration import Feeds, Range, activation_ranges
from exporters.onnx_qdq import Scheme, linear_layers, quantise
from exporters.onnx_rounding import compensate
from exporters.onnx_session import empty_past, open_session, run_tokens
from exporters.onnx_structure import Structure, require_int8, structure_of
from exporters.settings import OnnxInt8Settings
from models.errors import GateError, UserError

NAME = "onnx_static_int8"
PARENT = "onnx_fp32"
COMPARED_WINDOWS = 8
LIBRARIES = ("onnx", "onnxruntime", "numpy", "scipy")


@dataclass(frozen=True)
class Agreement:
    """Against the fp32 graph, teacher-forced: share of equal first choices, mean KL in nats, change of perplexity (fraction)."""

    top1: float
    kl: float
    perplexity_change: float
    tokens: int


def run(settings: OnnxInt8Settings, out: Path, onnx: Path, text: Path) -> None:
    """Write onnx_static_int8.onnx and its sidecar. GateError unless every linear layer and the embedding run as int8."""
    parent = read_sidecar(onnx / f"{PARENT}.json")
    require_one_file(parent)
    source = onnx / parent["file"]
    model = onnx_format.load(source)
    layers = linear_layers(model)
    inputs = list(dict.fromkeys(layers.values()))  # gate and up read the same tensor
    feeds = Feeds(calibration_windows(text, settings), settings.decode_steps)
    ranges = activation_ranges(model, inputs, feeds, settings.calibrator)
    two_step = two_step_layers(layers, ranges, settings.two_step_crest)
    scheme = Scheme(ranges, two_step, reduce_range=settings.reduce_range)
    quantised = quantise(onnx_format.load(source), scheme)
    if settings.rounding == "compensated":
        compensate(quantised, model, layers, feeds.windows)
    path = out / f"{NAME}.onnx"
    onnx_format.save(quantised, path)
    structure = structure_of(path)
    require_int8(structure, len(layers) + len(two_step), NAME)
    agreement = compare(source, path, np.load(text / "validation.npy")[:COMPARED_WINDOWS])
    write_sidecar(
        out,
        NAME,
        "onnx",
        files=[path],
        interface=parent["interface"],
        tensors=parent["tensors"],
        parent=parent["sha256"],
        settings=settings,
        measured={**describe(structure, scheme, len(layers)), "against_fp32": asdict(agreement)},
        libraries=LIBRARIES,
    )


def calibration_windows(text: Path, settings: OnnxInt8Settings) -> np.ndarray:
    """The first ``settings.windows`` calibration windows int32 ``[n, tokens]``; UserError where they are too short."""
    windows = np.load(text / "calibration.npy")[: settings.windows]
    if settings.decode_steps >= windows.shape[1]:
        raise UserError(
            f"onnx_int8.decode_steps {settings.decode_steps} leaves no prompt in a window of {windows.shape[1]} tokens;"
            " set it lower or text.window_tokens higher"
        )
    return windows


def require_one_file(parent: dict) -> None:
    """UserError for a parent whose weights lie outside its graph file: calibration hands ONNX Runtime the graph as one message."""
    if len(parent["files"]) > 1:
        size = f"{parent['bytes'] / 1e9:.1f} GB of fp32 weights"
        raise UserError(f"{size} are more than static int8 for ONNX takes (1.8 GB); use a smaller model or prune more")


def two_step_layers(layers: dict[str, str], ranges: dict[str, Range], crest: float | None) -> tuple[str, ...]:
    """Linear layers whose input spans more than ``crest`` standard deviations. ``layers``: input tensor by layer name."""
    return tuple(name for name, value in layers.items() if crest is not None and ranges[value].crest > crest)


def compare(reference: Path, quantised: Path, windows: np.ndarray) -> Agreement:
    """Both graphs on ``windows`` int ``[n, tokens]``. GateError for logits that are NaN, all zero or constant."""
    sessions = [open_session(path) for path in (reference, quantised)]
    top1, divergence, losses = [], [], [[], []]
    for window in windows:
        outputs = [run_tokens(session, window[None], empty_past(session, 1))[0][0, :-1] for session in sessions]  # [seq, vocab]
        require_live(outputs[1])
        expected, got = (log_softmax(logits.astype(np.float64), axis=-1) for logits in outputs)
        top1.append(expected.argmax(-1) == got.argmax(-1))
        divergence.append((np.exp(expected) * (expected - got)).sum(-1))
        for loss, logs in zip(losses, (expected, got), strict=True):
            loss.append(-logs[np.arange(len(logs)), window[1:]])
    change = np.exp(np.mean(losses[1]) - np.mean(losses[0])) - 1
    return Agreement(float(np.mean(top1)), float(np.mean(divergence)), float(change), int(np.size(top1)))


def require_live(logits: np.ndarray) -> None:
    """GateError for logits ``[seq, vocab]`` that a broken kernel or a broken scale would give without raising."""
    if not np.isfinite(logits).all():
        raise GateError(f"{NAME}: logits hold NaN or infinity; calibrate on more windows or another text")
    flat = np.flatnonzero(np.ptp(logits, axis=-1) == 0)
    if len(flat):
        raise GateError(f"{NAME}: logits at position {flat[0]} are all {logits[flat[0], 0]:g}; calibrate on more windows")


def describe(structure: Structure, scheme: Scheme, linear: int) -> dict:
    """int8 coverage as found on the optimised graph; a layer of two steps is two products and counts once."""
    return {
        "linear_layers": linear,
        "int8_linear_layers": len(structure.int8_linear) - len(scheme.two_step),
        "two_step_layers": list(scheme.two_step),
        "embedding_int8": not structure.float_embeddings,
        "not_int8": [{"name": name, "why": "position table: looked up, not multiplied"} for name in structure.float_tables],
        "dequantised_weights": len(structure.dequantised_weights),
        "activations_zero_on_the_text": [name for name, found in scheme.ranges.items() if found.low == found.high == 0],
    }
