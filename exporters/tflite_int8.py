"""Stage tflite_int8: static int8 with AI Edge Quantizer, in the one form that LiteRT and tflite-runtime 2.14 both run rightly.

Linear layers are static int8 with one scale per tensor, embeddings int8 with one scale per tensor, all else stays float. The
weights are equalised first, so that one scale per tensor does not cost what it usually costs. Two kinds of layers quantise their
input in each call and give float outputs: the head, since 255 steps are too few to tell the first places apart, and the second
projection of FFNs, whose outputs reach furthest. Measured on the demo model, on 2451 validation tokens that chose nothing: KL
against all static falls from 2.3e-3 to 1.2e-3 in both runtimes; top-1 goes from 97.2 to 97.1 % in LiteRT and from 96.8 to 98.0 %
in tflite-runtime, with a standard error of 0.3. It costs no time in LiteRT; in tflite-runtime 2.14, which has no fast kernel for
it, a prompt takes about 1.4 times as long, a decode step as long as before. Where the file still misses its targets on validation
text, more layers become dynamic (`exporters.tflite_mixed`).
"""

import fnmatch
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ai_edge_quantizer import qtyping, quantizer

from exporters.artifact import read_sidecar, sha256_of, write_sidecar
from exporters.settings import TfliteInt8Settings
from exporters.targets import Targets
from exporters.tflite_calibration import ChannelRange, calibrate
from exporters.tflite_coverage import Expected, check_coverage, check_packed_once, check_shared, is_dynamic
from exporters.tflite_equalise import HEAD_OUTPUT, equalise
from exporters.tflite_logit_range import LogitRange, choose_logit_range
from exporters.tflite_mixed import Judge, layer_costs, more_dynamic, static_layers
from exporters.tflite_parity import Feeds, check_all_lengths, replay
from exporters.tflite_replay import RUNTIMES
from exporters.tflite_structure import Operator, check_loadable, operator_counts, operators, read_model, tensor_contract, write_model
from models.errors import GateError, UserError
from models.progress import track

NAME, PARENT = "tflite_static_int8", "tflite_fp32"
USUALLY_DYNAMIC = ("logits", "down_proj", "mlp.c_proj")  # the head; the last two as Llama and its kin, and GPT-2, call them
OUTPUT_MARGIN = 1.1  # equalised outputs all reach as far as they were seen to; unseen text reaches a little further
CHECKED_SEQUENCES, CHECKED_STEPS = 4, 24  # what the sanity check feeds: prompts, and tokens after each
LIBRARIES = ("ai-edge-quantizer", "ai-edge-litert", "tflite-runtime", "flatbuffers", "numpy")


def run(settings: TfliteInt8Settings, out: Path, tflite: Path, text: Path) -> None:
    """Write ``tflite_static_int8.tflite`` and its sidecar. GateError where something stayed float or computes nonsense."""
    parent_path, path = tflite / f"{PARENT}.tflite", out / f"{NAME}.tflite"
    parent = read_sidecar(tflite / f"{PARENT}.json")
    context = parent["interface"]["context_tokens"]
    windows = np.load(text / "calibration.npy")
    targets, judge = Targets.of(settings), Judge.of(parent_path, np.load(text / "validation.npy"), context)
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(settings, parent_path, windows[:, :context], Path(folder) / "equalised.tflite")
        chosen = write(prepared, prepared.dynamic, path)
        tried, costs = [(chosen.dynamic, judge.worst(path))], ()
        if targets.missed(tried[0][1]):
            layers = static_layers(prepared.found, chosen.dynamic)
            costs = layer_costs(layers, lambda name: write_alone(prepared, name, Path(folder) / "alone.tflite"), judge)
            for dynamic in more_dynamic(chosen.dynamic, costs):
                chosen = write(prepared, dynamic, path)
                tried.append((dynamic, judge.worst(path)))
                if not targets.missed(tried[-1][1]):
                    break
    graph = read_model(path)
    found = operators(graph)
    check_loadable(found, NAME)
    expected = Expected(operators(read_model(parent_path)), prepared.split_layers, chosen.dynamic)
    coverage = check_coverage(found, expected, NAME)
    check_shared(found, NAME)
    check_packed_once(found, NAME)
    trials = [{"dynamic": dynamic, **asdict(agreement), "missed": targets.missed(agreement)} for dynamic, agreement in tried]
    measured = {
        "coverage": asdict(coverage),
        "bytes_of_parent": path.stat().st_size / parent["bytes"],
        "calibration": {
            "windows": min(settings.windows, len(windows)),
            "decode_steps": settings.decode_steps,
            "smoothed_layers": prepared.smoothed_layers,
            "split_layers": prepared.split_layers,
            **asdict(chosen),
        },
        "agreement_with_parent": check_agreement(path, parent_path, windows, parent["interface"]),
        "mixed_precision": {"targets": asdict(targets), "trials": trials, "layers": [asdict(cost) for cost in costs]},
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
class Prepared:
    """An equalised float file and its tensors' ranges on the calibration text. ``logits`` ``[n, vocab]`` are a sample."""

    path: Path
    found: list[Operator]
    dynamic: tuple[str, ...]  # patterns of the layers that are not to be static
    ranges: dict[str, ChannelRange]
    logits: np.ndarray
    row_scales: dict[str, np.ndarray]
    smoothed_layers: int
    split_layers: int


@dataclass(frozen=True)
class Chosen:
    """Which layers are dynamic, and how far the logits reach; None: the head gives float logits."""

    dynamic: tuple[str, ...]
    logit_range: LogitRange | None


def prepare(settings: TfliteInt8Settings, parent: Path, windows: np.ndarray, path: Path) -> Prepared:
    """Write the equalised file. Two passes over the text: one to equalise by, one for the ranges of the result."""
    fed = windows[: settings.windows]
    found = operators(read_model(parent))
    seen = calibrate(parent, found, track(fed, "tflite int8: first pass"), settings.decode_steps)
    dynamic = dynamic_patterns(settings.dynamic, found)
    graph = read_model(parent)  # not held while the runtime holds it too
    equalised = equalise(graph, seen, settings.input_smoothing, dynamic)
    found = operators(graph)
    write_model(graph, path)
    del graph
    seen = calibrate(path, found, track(fed, "tflite int8: second pass"), settings.decode_steps)
    ranges = with_margin(seen.ranges, found)
    scales, smoothed, split = equalised.row_scales, equalised.smoothed_layers, equalised.split_layers
    return Prepared(path, found, dynamic, ranges, seen.logits, scales, smoothed, split)


def write(prepared: Prepared, dynamic: tuple[str, ...], path: Path) -> Chosen:
    """Write the int8 file in which the layers of ``dynamic`` are dynamic and all others static."""
    heads = [head for head in prepared.found if head.name == "FULLY_CONNECTED" and HEAD_OUTPUT in head.outputs[0].name]
    if not heads:
        raise GateError(f"{prepared.path.name}: no linear layer makes the logits, so their range cannot be chosen")
    ranges, chosen = prepared.ranges, None
    if not is_dynamic(heads[0], dynamic):
        name = heads[0].outputs[0].name
        chosen = choose_logit_range(prepared.logits, prepared.row_scales.get(name, np.ones(1, np.float32)))
        logit_range = ChannelRange(np.array([chosen.low]), np.array([chosen.high]))
        ranges = ranges | {head.outputs[0].name: logit_range for head in heads}
    path.write_bytes(quantised_bytes(prepared.path, ranges, dynamic))
    return Chosen(dynamic, chosen)


def write_alone(prepared: Prepared, layer: str, path: Path) -> Path:
    """Write the file in which ``layer`` is static int8 and everything else float."""
    process = Quantizer(str(prepared.path))
    pattern = fnmatch.translate(f"*/{layer}*")
    process.add_static_config(pattern, qtyping.TFLOperationName.FULLY_CONNECTED, 8, 8, qtyping.QuantGranularity.TENSORWISE)
    path.write_bytes(quantised_with(process, prepared.ranges))
    return path


def with_margin(ranges: dict[str, ChannelRange], found: list[Operator]) -> dict[str, ChannelRange]:
    """``ranges`` with those of the linear layers' outputs, but the head's, widened by ``OUTPUT_MARGIN``."""
    outputs = {operator.outputs[0].name for operator in found if operator.name == "FULLY_CONNECTED"}
    widened = {name for name in outputs if HEAD_OUTPUT not in name}
    return {
        name: ChannelRange(seen.low * OUTPUT_MARGIN, seen.high * OUTPUT_MARGIN) if name in widened else seen
        for name, seen in ranges.items()
    }


def dynamic_patterns(asked: tuple[str, ...] | None, found: list[Operator]) -> tuple[str, ...]:
    """The patterns asked for, or the usual ones that this model has; UserError for one that is no linear layer's."""
    linear = [operator for operator in found if operator.name == "FULLY_CONNECTED"]
    patterns = USUALLY_DYNAMIC if asked is None else asked
    unknown = [pattern for pattern in patterns if not any(is_dynamic(operator, (pattern,)) for operator in linear)]
    if asked and unknown:
        raise UserError(
            f"tflite_int8.dynamic: no linear layer has {unknown[0]!r} in its name; they are called like {linear[0].outputs[0].name}"
        )
    return tuple(pattern for pattern in patterns if pattern not in unknown)


def quantised_bytes(model: Path, ranges: dict[str, ChannelRange], dynamic: tuple[str, ...]) -> bytes:
    """Static int8 for linear layers but those of ``dynamic``, int8 for embeddings, one scale per tensor."""
    process = Quantizer(str(model))
    per_tensor = qtyping.QuantGranularity.TENSORWISE
    process.add_static_config(".*", qtyping.TFLOperationName.FULLY_CONNECTED, 8, 8, per_tensor)
    process.add_dynamic_config(".*", qtyping.TFLOperationName.EMBEDDING_LOOKUP, 8, per_tensor)
    for pattern in dynamic:
        process.add_dynamic_config(fnmatch.translate(f"*{pattern}*"), qtyping.TFLOperationName.FULLY_CONNECTED, 8, per_tensor)
    return quantised_with(process, ranges)


class Quantizer(quantizer.Quantizer):
    """AI Edge Quantizer's, which is not asked whether every tensor has its range.

    To find out it opens the float model with all its weights packed for every signature, most of the memory that it takes; and it
    looks for empty entries only, of which `quantised_with` makes none.
    """

    def _ensure_model_qsv_sufficient(self, calibration_result) -> None:
        """Nothing to look for."""


def quantised_with(process: quantizer.Quantizer, ranges: dict[str, ChannelRange]) -> bytes:
    """The file that a configured quantizer makes with one range per tensor."""
    found = {
        name: {"min": np.array([[seen.low.min()]], np.float32), "max": np.array([[seen.high.max()]], np.float32)}
        for name, seen in ranges.items()
    }
    return bytes(process.quantize(found, enable_progress_bar=False, enable_progress_report=False).quantized_model)


def check_agreement(path: Path, parent: Path, windows: np.ndarray, interface: dict) -> dict[str, dict]:
    """Replay real text in both runtimes and compare with the float parent; the worst of all lengths of call.

    GateError for dead or unrelated logits.
    """
    length = min(windows.shape[1], interface["context_tokens"])
    steps = min(CHECKED_STEPS, length - 1)
    tokens = windows[-CHECKED_SEQUENCES:, :length]
    feeds = Feeds(tokens, np.full(len(tokens), length - steps, np.int32))
    expected = replay(parent, "litert", feeds).logits
    advice = "calibrate with more windows: tflite_int8.windows"
    return {runtime: asdict(check_all_lengths(path, runtime, feeds, expected, advice)) for runtime in RUNTIMES}
