"""Static int8 from the fp32 graph: QDQ, unsigned activations per tensor, signed weights per output channel, embedding per row.

Quantised are all linear layers, the head among them, and the embedding. Where all of them together miss the targets, the dearest
leave int8: what each costs alone is measured then, and always on models small enough for it. What ONNX Runtime makes of the file
is checked on the graph that it has optimised, and the logits are compared with the fp32 graph's on text that calibrated nothing.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx as onnx_format

from exporters.artifact import read_sidecar, write_sidecar
from exporters.onnx_agreement import COMPARED_WINDOWS, Agreement, compare
from exporters.onnx_calibration import Feeds, Range, activation_ranges
from exporters.onnx_files import compact, save_one_file
from exporters.onnx_kv_cache import cache_bytes_per_token, described_tensors, kv_scales, with_int8_cache
from exporters.onnx_mixed import Form, forms_to_try, layers_to_leave, mixed, named_layers, require_mixed
from exporters.onnx_qdq import Scheme, bits_per_weight, linear_layers, numbers_in, quantise
from exporters.onnx_rounding import compensate
from exporters.onnx_sensitivity import Switched, sensitivity
from exporters.onnx_structure import Structure, structure_of
from exporters.settings import OnnxInt8Settings, StaticInt8Settings
from exporters.targets import Targets
from models.errors import UserError

NAME = "onnx_static_int8"
PARENT = "onnx_fp32"
LIBRARIES = ("onnx", "onnxruntime", "numpy", "scipy")


def run(settings: OnnxInt8Settings, out: Path, onnx: Path, text: Path) -> None:
    """Write onnx_static_int8.onnx and its sidecar. GateError unless ONNX Runtime runs every layer in the form chosen for it."""
    parent = read_sidecar(onnx / f"{PARENT}.json")
    source, path = onnx / parent["file"], out / f"{NAME}.onnx"
    model = onnx_format.load(source)
    kept_float = named_layers(model, settings.keep_float)
    feeds = Feeds(calibration_windows(text, settings), settings.decode_steps)
    quantised, scheme = static_int8(model, feeds, settings)
    scales = kv_scales(settings.kv_cache, model, feeds, NAME)
    windows = np.load(text / "validation.npy")[:COMPARED_WINDOWS]
    targets, tried = Targets.of(settings), []
    layers, numbers, fp32_bytes = linear_layers(model), numbers_in(model.graph), model.ByteSize()
    del model  # as large as the weights, and seldom wanted again

    def missed(forms: dict[str, Form]) -> bool:
        """Write the file with ``forms`` over int8, and hold it against fp32."""
        made = mixed(onnx_format.load(source), quantised, scheme, forms) if forms else quantised
        save_one_file(with_int8_cache(made, scales), path, NAME)
        tried.append((forms, compare(source, path, windows, NAME)))
        return bool(targets.missed(tried[-1][1]))

    all_int8_missed = missed(dict.fromkeys(kept_float, "float"))
    costs, reasons, left = None, {}, ()
    each_alone = fp32_bytes <= settings.sensitivity_up_to_mb * 1e6
    if all_int8_missed or each_alone:
        switched = Switched(onnx_format.load(source), quantised, windows)
        if each_alone:
            costs = sensitivity(switched, settings.sensitivity_windows)
            reasons = {cost.name: f"as int8 it alone costs a KL of {cost.kl:.2e}" for cost in costs.layers}
        else:
            reasons = {error.name: f"its own output is off by {error.share:.1e} as int8 (squared)" for error in switched.local_errors()}
        ranking = [name for name in reasons if name not in kept_float]
        left = layers_to_leave(switched, ranking, targets) if all_int8_missed else ()
        del switched  # two models in one
    if all_int8_missed:
        for forms in forms_to_try(left, ranking, kept_float):
            if not missed(forms):
                break
    forms, agreement = tried[-1]
    structure = structure_of(path)
    two_step = [name for name in scheme.two_step if name not in forms]
    require_mixed(structure, len(layers) + len(two_step), forms, NAME)
    tensors = described_tensors(parent["tensors"], scales)
    write_sidecar(
        out,
        NAME,
        "onnx",
        files=[path],
        interface=parent["interface"],
        tensors=tensors,
        parent=parent["sha256"],
        settings=settings,
        measured={
            "bits_per_weight": bits_per_weight(onnx_format.load(path).graph, numbers),
            **describe(structure, two_step, forms, reasons),
            "kv_cache_bytes_per_token": cache_bytes_per_token(tensors),
            "activations_zero_on_the_text": [name for name, found in scheme.ranges.items() if found.low == found.high == 0],
            "against_fp32": asdict(agreement),
            "mixed_precision": told_trials(targets, tried, path.stat().st_size - quantised.ByteSize()),
            **({"sensitivity": asdict(costs)} if costs else {}),
        },
        libraries=LIBRARIES,
    )


def static_int8(
    model: onnx_format.ModelProto, feeds: Feeds, settings: OnnxInt8Settings, embedding: bool = True, artifact: str = NAME
) -> tuple[onnx_format.ModelProto, Scheme]:
    """The graph in which every layer, and ``embedding`` too, is int8, and what was done to it. ``model`` is left as it was.

    GateError names ``artifact``.
    """
    layers = linear_layers(model)
    inputs = list(dict.fromkeys(layers.values()))  # gate and up read the same tensor
    ranges = activation_ranges(model, inputs, feeds, settings.calibrator, artifact)
    two_step = two_step_layers(layers, ranges, settings.two_step_crest)
    scheme = Scheme(ranges, two_step, reduce_range=settings.reduce_range, per_channel=settings.per_channel, embedding=embedding)
    quantised = quantise(compact(model), scheme)
    if settings.rounding == "compensated":
        compensate(quantised, model, layers, feeds.windows)
    return quantised, scheme


def calibration_windows(text: Path, settings: StaticInt8Settings, stage: str = "onnx_int8") -> np.ndarray:
    """The first ``settings.windows`` calibration windows int32 ``[n, tokens]``; UserError, naming ``stage``, where they are too short."""
    windows = np.load(text / "calibration.npy")[: settings.windows]
    if settings.decode_steps >= windows.shape[1]:
        raise UserError(
            f"{stage}.decode_steps {settings.decode_steps} leaves no prompt in a window of {windows.shape[1]} tokens;"
            " set it lower or text.window_tokens higher"
        )
    return windows


def two_step_layers(layers: dict[str, str], ranges: dict[str, Range], crest: float | None) -> tuple[str, ...]:
    """Linear layers whose input spans more than ``crest`` standard deviations. ``layers``: input tensor by layer name."""
    return tuple(name for name, value in layers.items() if crest is not None and ranges[value].crest > crest)


def describe(structure: Structure, two_step: list[str], forms: dict[str, Form], reasons: dict[str, str]) -> dict:
    """int8 coverage as found on the optimised graph; a layer of two steps is two products and counts once.

    ``reasons`` say of a layer why it left int8; one that has none was asked for.
    """
    int8 = len(structure.int8_linear) - len(two_step)
    position_tables = [{"name": name, "why": "position table: looked up, not multiplied"} for name in structure.float_tables]
    return {
        "linear_layers": int8 + len(structure.block_linear) + len(structure.float_linear),
        "int8_linear_layers": int8,
        "two_step_layers": two_step,
        "embedding_int8": not structure.float_embeddings,
        "not_int8": position_tables
        + [{"name": name, "why": f"{form}: {reasons.get(name, 'asked for by keep_float')}"} for name, form in forms.items()],
        "dequantised_weights": len(structure.dequantised_weights),
    }


def told_trials(targets: Targets, tried: list[tuple[dict[str, Form], Agreement]], bytes_more: int) -> dict:
    """What was aimed at, every trial with what it gave, and what the last one, which is the file, costs in bytes."""
    trials = [{"not_int8": forms, **asdict(agreement), "missed": targets.missed(agreement)} for forms, agreement in tried]
    return {"targets": asdict(targets), "trials": trials, "bytes_more_than_int8": bytes_more if tried[-1][0] else 0}
