"""Stage tflite_int8: static int8 with AI Edge Quantizer, in the one form that LiteRT and tflite-runtime 2.14 both run rightly.

Linear layers are static int8 with one scale per tensor, embeddings int8 with one scale per tensor, all else stays float. The
weights are equalised first, so that one scale per tensor does not cost what it usually costs.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ai_edge_quantizer import qtyping, quantizer

from exporters.artifact import read_sidecar, sha256_of, write_sidecar
from exporters.settings import TfliteInt8Settings
from exporters.tflite_calibration import ChannelRange, calibrate
from exporters.tflite_coverage import check_coverage
from exporters.tflite_equalise import equalise
from exporters.tflite_logit_range import LogitRange, choose_logit_range
from exporters.tflite_parity import Feeds, agreement, replay
from exporters.tflite_replay import RUNTIMES
from exporters.tflite_structure import check_loadable, operator_counts, operators, read_model, tensor_contract, write_model
from models.errors import GateError
from models.progress import track

NAME, PARENT = "tflite_static_int8", "tflite_fp32"
HEAD_OUTPUT = "_logits_output"  # how the converter names the tensor behind the signature's output ``logits``
CHECKED_SEQUENCES, CHECKED_STEPS = 4, 24  # what the sanity check feeds: prompts, and tokens after each
LEAST_TOP1, LARGEST_KL = 0.5, 0.1  # outside both the file is broken, whatever the recipe's gates say; flat logits miss only top-1
LIBRARIES = ("ai-edge-quantizer", "ai-edge-litert", "tflite-runtime", "flatbuffers", "numpy")


def run(settings: TfliteInt8Settings, out: Path, tflite: Path, text: Path) -> None:
    """Write ``tflite_static_int8.tflite`` and its sidecar. GateError where something stayed float or computes nonsense."""
    parent_path, path = tflite / f"{PARENT}.tflite", out / f"{NAME}.tflite"
    parent = read_sidecar(tflite / f"{PARENT}.json")
    windows = np.load(text / "calibration.npy")
    calibration = quantise(settings, parent_path, windows[:, : parent["interface"]["context_tokens"]], path)
    graph = read_model(path)
    found = operators(graph)
    check_loadable(found, NAME)
    coverage = check_coverage(found, operators(read_model(parent_path)), NAME, calibration.split_layers)
    measured = {
        "coverage": asdict(coverage),
        "bytes_of_parent": path.stat().st_size / parent["bytes"],
        "calibration": asdict(calibration),
        "agreement_with_parent": check_agreement(path, parent_path, windows, parent["interface"]),
        "operators": operator_counts(found),
    }
    write_sidecar(
        out,
        NAME,
        "tflite",
        files=[path],
        interface=parent["interface"],
        tensors=tensor_contract(graph),
        parent=sha256_of(parent_path),
        settings=settings,
        measured=measured,
        libraries=LIBRARIES,
    )


@dataclass(frozen=True)
class Quantised:
    """What was fed and what was chosen from it."""

    windows: int
    decode_steps: int
    smoothed_layers: int
    split_layers: int
    logit_range: LogitRange


def quantise(settings: TfliteInt8Settings, parent: Path, windows: np.ndarray, path: Path) -> Quantised:
    """Write the int8 file made from ``parent``. Two passes over the text: one to equalise by, one for the ranges of the result."""
    graph = read_model(parent)
    fed = windows[: settings.windows]
    seen = calibrate(parent, operators(graph), track(fed, "tflite int8: first pass"), settings.decode_steps)
    equalised = equalise(graph, seen, settings.input_smoothing)
    found = operators(graph)
    with tempfile.TemporaryDirectory() as folder:
        rewritten = Path(folder) / "equalised.tflite"
        write_model(graph, rewritten)
        seen = calibrate(rewritten, found, track(fed, "tflite int8: second pass"), settings.decode_steps)
        heads = [head.outputs[0].name for head in found if head.name == "FULLY_CONNECTED" and HEAD_OUTPUT in head.outputs[0].name]
        if not heads:
            raise GateError(f"{parent.name}: no linear layer makes the logits, so their range cannot be chosen")
        chosen = choose_logit_range(seen.logits, equalised.row_scales.get(heads[0], np.ones(1, np.float32)))
        logit_range = ChannelRange(np.array([chosen.low]), np.array([chosen.high]))
        path.write_bytes(quantised_bytes(rewritten, seen.ranges | dict.fromkeys(heads, logit_range)))
    return Quantised(len(fed), settings.decode_steps, equalised.smoothed_layers, equalised.split_layers, chosen)


def quantised_bytes(model: Path, ranges: dict[str, ChannelRange]) -> bytes:
    """Static int8 for linear layers, int8 for embeddings, one scale per tensor."""
    process = quantizer.Quantizer(str(model))
    per_tensor = qtyping.QuantGranularity.TENSORWISE
    process.add_static_config(".*", qtyping.TFLOperationName.FULLY_CONNECTED, 8, 8, per_tensor)
    process.add_dynamic_config(".*", qtyping.TFLOperationName.EMBEDDING_LOOKUP, 8, per_tensor)
    found = {
        name: {"min": np.array([[seen.low.min()]], np.float32), "max": np.array([[seen.high.max()]], np.float32)}
        for name, seen in ranges.items()
    }
    return bytes(process.quantize(found, enable_progress_bar=False, enable_progress_report=False).quantized_model)


def check_agreement(path: Path, parent: Path, windows: np.ndarray, interface: dict) -> dict[str, dict]:
    """Replay real text in both runtimes and compare with the float parent; GateError for dead or unrelated logits."""
    length = min(windows.shape[1], interface["context_tokens"])
    steps = min(CHECKED_STEPS, length - 1)
    tokens = windows[-CHECKED_SEQUENCES:, :length]
    feeds = Feeds(tokens, np.full(len(tokens), length - steps, np.int32))
    expected = replay(parent, "litert", feeds).logits
    measured = {}
    for runtime in RUNTIMES:
        found = agreement(replay(path, runtime, feeds).logits, expected)
        if found.top1 < LEAST_TOP1 and not found.kl < LARGEST_KL:
            raise GateError(
                f"{path.name} in {RUNTIMES[runtime]} agrees with the float file on {found.top1:.1%} of {found.rows} tokens"
                f" (least {LEAST_TOP1:.0%}), KL {found.kl:.3f} (limit {LARGEST_KL}); calibrate with more windows: tflite_int8.windows"
            )
        measured[runtime] = asdict(found)
    return measured
