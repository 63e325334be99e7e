"""Stage tflite_full_int8: strict full-integer int8 for NPUs, through TensorFlow's converter. Mask, KV cache and logits are int8 too."""

import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from exporters.artifact import checkpoint_sha256, write_sidecar
from exporters.settings import TfliteFullInt8Settings
from exporters.tflite_export import CHECKED_STEPS, FILE_LIMIT_BYTES, reference_logits
from exporters.tflite_full_check import check_strict, check_types_and_scales
from exporters.tflite_full_convert import calibrated_file, float_file, quantised_file, save_as_tensorflow
from exporters.tflite_full_model import HIDING_GAIN
from exporters.tflite_full_ranges import Edited, SampledReplay, edit_ranges, model_of
from exporters.tflite_full_tied import share_tied_tables
from exporters.tflite_model import SignatureShape, signature_shape
from exporters.tflite_parity import LARGEST_KL, LEAST_TOP1, Feeds, agreement, replay
from exporters.tflite_replay import HIDDEN, RUNTIMES
from exporters.tflite_signatures import DECODE, prefill_name
from exporters.tflite_structure import check_loadable, operator_counts, operators, read_model, tensor_contract, write_model
from models.checkpoint import ModelShape, load_model, shape_of
from models.errors import GateError, UserError
from models.progress import track

NAME = "tflite_full_int8"
CHECKED_SEQUENCES, AGREEMENT_STEPS = 4, 24  # what is compared with PyTorch: prompts of validation text, and tokens after each
LIBRARIES = ("torch", "transformers", "litert-torch", "tensorflow-cpu", "ai-edge-litert", "tflite-runtime", "flatbuffers", "numpy")


def run(settings: TfliteFullInt8Settings, out: Path, model: Path, text: Path) -> None:
    """Write ``tflite_full_int8.tflite`` and its sidecar. GateError where anything stayed float or computes nonsense."""
    decoder = load_model(model)
    shape = shape_of(decoder)
    windows = np.load(text / "calibration.npy")
    shapes = signature_shapes(settings, shape, windows.shape[1])
    prefill_tokens, context_tokens = max(shape.chunk_tokens for shape in shapes.values()), shapes[DECODE].context_tokens
    windows = windows[: settings.windows, :context_tokens]
    feeds = agreement_feeds(np.load(text / "validation.npy")[:, :context_tokens])
    expected = reference_logits(decoder, feeds)
    path = out / f"{NAME}.tflite"
    edited = convert(decoder, shapes, path, track(windows, "tflite full int8: calibration"), settings.decode_steps)
    graph = read_model(path)
    found = operators(graph)
    check_strict(found, NAME)
    scales = check_types_and_scales(graph, NAME)
    proved, refused = prove(path, found, feeds, expected)
    facts = asdict(shape)
    keys = ("vocab_size", "layers", "kv_heads", "head_dim", "bos_token_id", "eos_token_id")
    measured = {
        "agreement_with_pytorch": proved,
        "not_proved": refused,
        "not_int8": [],  # check_strict lets no float through
        "bits_per_weight": 8 * path.stat().st_size / shape.parameters,
        "scales": {name: asdict(scale) for name, scale in sorted(scales.items())},
        "ranges": asdict(edited),
        "operators": operator_counts(found),
    }
    write_sidecar(
        out,
        NAME,
        "tflite",
        files=[path],
        interface={key: facts[key] for key in keys} | {"context_tokens": context_tokens, "prefill_tokens": [prefill_tokens]},
        tensors=tensor_contract(graph),
        parent=checkpoint_sha256(model),
        settings=settings,
        measured=measured,
        libraries=LIBRARIES,
        runtimes=tuple(proved),
    )


def signature_shapes(settings: TfliteFullInt8Settings, shape: ModelShape, window_tokens: int) -> dict[str, SignatureShape]:
    """The static sizes of both signatures; UserError where the model does not fit a file, or a window holds no whole chunk."""
    if shape.parameters * 4 > FILE_LIMIT_BYTES:
        raise UserError(
            f"{shape.parameters / 1e6:.0f} M parameters do not fit in the fp32 TFLite file (2 GB) that is calibrated; prune more or leave"
            " tflite_full_int8 out"
        )
    context_tokens = min(settings.context_tokens, shape.context_tokens)
    prefill_tokens = min(settings.prefill_tokens, context_tokens - CHECKED_STEPS)
    window_tokens = min(window_tokens, context_tokens)
    if prefill_tokens < 2 or window_tokens < prefill_tokens + settings.decode_steps:
        raise UserError(
            f"calibration windows of {window_tokens} tokens hold no chunk of {prefill_tokens} and {settings.decode_steps} steps; set"
            " tflite_full_int8.prefill_tokens or tflite_full_int8.decode_steps lower, or text.window_tokens higher (a chunk has 2 at least)"
        )
    chunks = {DECODE: 1, prefill_name(prefill_tokens): prefill_tokens}
    return {name: signature_shape(shape, chunk, context_tokens) for name, chunk in chunks.items()}


def convert(model: PreTrainedModel, shapes: dict[str, SignatureShape], path: Path, windows, decode_steps: int) -> Edited:
    """Write the int8 file; ``windows`` [n] of tokens [length] are streamed once. Changes ``model``."""
    with tempfile.TemporaryDirectory() as folder:
        saved, edited_path = Path(folder) / "saved", Path(folder) / "edited.tflite"
        save_as_tensorflow(model, shapes, saved)
        seen = SampledReplay(float_file(saved, tuple(shapes)))
        calibrated = model_of(calibrated_file(saved, tuple(shapes), lambda: seen.samples(windows, decode_steps)))
        edited = edit_ranges(calibrated, seen, -float(HIDDEN) * HIDING_GAIN)
        write_model(calibrated, edited_path)
        quantised = model_of(quantised_file(edited_path.read_bytes()))
    share_tied_tables(quantised, calibrated)
    drop_unread_buffers(quantised)
    write_model(quantised, path)
    return edited


def drop_unread_buffers(model) -> None:
    """Empty the buffers that no tensor and no metadata reads; their numbers stay, since others are counted by them."""
    read = {tensor.buffer for subgraph in model.subgraphs for tensor in subgraph.tensors}
    read |= {entry.buffer for entry in model.metadata or []}
    for number, buffer in enumerate(model.buffers):
        if number not in read:
            buffer.data = None


def agreement_feeds(windows: np.ndarray) -> Feeds:
    """Validation text [n, length]: prompts that leave tokens to be fed one by one."""
    steps = min(AGREEMENT_STEPS, windows.shape[1] // 2)
    tokens = windows[:CHECKED_SEQUENCES]
    return Feeds(tokens, np.full(len(tokens), windows.shape[1] - steps, np.int32))


def prove(path: Path, found: list, feeds: Feeds, expected: np.ndarray) -> tuple[dict[str, dict], dict[str, str]]:
    """Agreement with PyTorch by runtime, and why a runtime is left out. GateError where LiteRT itself is not right."""
    proved, refused = {}, {}
    for runtime in RUNTIMES:
        try:
            if runtime == "tflite":
                check_loadable(found, NAME)
            proved[runtime] = check_agreement(path, runtime, feeds, expected)
        except GateError as error:
            if runtime == "litert":
                raise
            refused[runtime] = str(error)
    return proved, refused


def check_agreement(path: Path, runtime: str, feeds: Feeds, expected: np.ndarray) -> dict:
    """Replay in a process of its own; GateError for dead or unrelated logits."""
    replayed = replay(path, runtime, feeds, accelerated=False)  # tflite-runtime 2.14 has no XNNPACK for int8
    found = agreement(replayed.logits, expected)
    if found.top1 < LEAST_TOP1 and not found.kl < LARGEST_KL:
        raise GateError(
            f"{path.name} in {RUNTIMES[runtime]} agrees with PyTorch on {found.top1:.1%} of {found.rows} tokens"
            f" (least {LEAST_TOP1:.0%}), KL {found.kl:.3f} (limit {LARGEST_KL}); calibrate with more windows: tflite_full_int8.windows"
        )
    return asdict(found) | {"xnnpack_delegates": replayed.delegated}
