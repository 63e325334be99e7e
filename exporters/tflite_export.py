"""Stage tflite: a PyTorch decoder as one TFLite file, fp32, proved in two runtimes.

Its signatures are ``decode`` and, for each length N that a call of a prompt may have, ``prefill_N``. All read the same weights.
"""

import gc
from dataclasses import asdict
from pathlib import Path

import litert_torch
import numpy as np
import torch
from litert_torch.backend.optimization_barrier import optimization_barrier
from transformers import PreTrainedModel

from exporters.artifact import checkpoint_sha256, write_sidecar
from exporters.settings import TfliteSettings
from exporters.tflite_cache_reads import check_cache_reads, read_cache_in_place
from exporters.tflite_coverage import check_last_row, check_shared
from exporters.tflite_model import ATTENTION, SignatureModule, sample_inputs, signature_shape
from exporters.tflite_parity import Feeds, Parity, check_parity, prompt_feeds
from exporters.tflite_replay import RUNTIMES
from exporters.tflite_signatures import DECODE, decode_first, prefill_name
from exporters.tflite_structure import (
    check_loadable,
    constant_bytes,
    input_indices,
    operator_counts,
    operators,
    read_model,
    shorten_names,
    tensor_contract,
    write_model,
)
from models.checkpoint import ModelShape, load_model, shape_of
from models.errors import GateError, UserError

NAME = "tflite_fp32"
FILE_LIMIT_BYTES = 2**31 - 2**20  # offsets in a flatbuffer are signed 32-bit numbers
CHECKED_STEPS = 6  # decode steps compared with PyTorch after each prompt
SPARE_CONSTANT_BYTES = 2**16  # shapes, axes, rotary frequencies: what the file holds besides the weights
LIBRARIES = ("torch", "transformers", "litert-torch", "litert-converter", "ai-edge-litert", "tflite-runtime", "flatbuffers")


def run(settings: TfliteSettings, out: Path, model: Path, text: Path) -> None:
    """Write ``tflite_fp32.tflite`` and its sidecar. GateError where the file or what it computes is not right."""
    decoder = load_model(model)
    shape = shape_of(decoder)
    if shape.parameters * 4 > FILE_LIMIT_BYTES:
        raise UserError(
            f"{shape.parameters / 1e6:.0f} M parameters do not fit in an fp32 TFLite file (2 GB); prune more or leave tflite out"
        )
    context_tokens = min(settings.context_tokens, shape.context_tokens)
    prefill_tokens = sorted({min(size, context_tokens - CHECKED_STEPS) for size in settings.prefill_tokens})
    windows = np.load(text / "calibration.npy")
    feeds = {size: prompt_feeds(windows, size, context_tokens, CHECKED_STEPS) for size in prefill_tokens}
    expected = {size: reference_logits(decoder, feeds[size]) for size in prefill_tokens}
    path = out / f"{NAME}.tflite"
    convert(decoder, shape, prefill_tokens, context_tokens, path)
    del decoder  # as large as what is read now
    gc.collect()
    edit(path)
    graph = read_model(path)
    found = operators(graph)
    check_loadable(found, NAME)
    tensors, constants, inputs = tensor_contract(graph), constant_bytes(graph), input_indices(graph)
    del graph  # the runtimes need room for it now
    check_stored_once(constants, shape)
    check_shared(found, NAME)
    check_cache_reads(found, inputs, NAME)
    check_last_row(found, NAME)
    parity = [check_parity(path, prefill_name(size), feeds[size], expected[size], settings.max_abs_diff) for size in prefill_tokens]
    measured = {
        "parity": {runtime: asdict(Parity.worst([found[runtime] for found in parity])) for runtime in RUNTIMES},
        "prompt_tokens": {prefill_name(size): feeds[size].prompt_tokens.tolist() for size in prefill_tokens},
    }
    facts = asdict(shape)
    keys = ("vocab_size", "layers", "kv_heads", "head_dim", "bos_token_id", "eos_token_id")
    interface = {key: facts[key] for key in keys} | {"context_tokens": context_tokens, "prefill_tokens": prefill_tokens}
    interface["resizable_cache"] = True
    write_sidecar(
        out,
        NAME,
        "tflite",
        files=[path],
        interface=interface,
        tensors=tensors,
        parent=checkpoint_sha256(model),
        settings=settings,
        measured=measured | {"operators": operator_counts(found), "constant_bytes": constants},
        libraries=LIBRARIES,
    )


def convert(model: PreTrainedModel, shape: ModelShape, prefill_tokens: list[int], context_tokens: int, path: Path) -> None:
    """Write the TFLite file; the model's attention is set to ours meanwhile."""
    kept = model.config._attn_implementation
    model.set_attn_implementation(ATTENTION)
    norms = [module for module in model.modules() if isinstance(module, torch.nn.LayerNorm)]
    hooks = [norm.register_forward_hook(keep_norm_apart) for norm in norms]
    module = SignatureModule(model, shape.layers).eval()
    step = sample_inputs(signature_shape(shape, 1, context_tokens), with_last=False)
    # Decoding comes first: the Interpreter API shows the tensors of the first signature alone, and its cache need not be copied then.
    converter = litert_torch.signature(DECODE, module, sample_kwargs=step)
    for size in prefill_tokens:
        chunk = sample_inputs(signature_shape(shape, size, context_tokens), with_last=True)
        converter = converter.signature(prefill_name(size), module, sample_kwargs=chunk)
    # Constants stay outside the graph while it is worked on: else the weights would be in memory several times more.
    converter.convert(lightweight_conversion=True, runtime_constant_folding=False).export(str(path))
    for hook in hooks:
        hook.remove()
    model.set_attn_implementation(kept)


def edit(path: Path) -> None:
    """Rewrite what the converter wrote as hosts want it."""
    graph = read_model(path)
    read_cache_in_place(graph)
    decode_first(graph)
    shorten_names(graph)
    write_model(graph, path)


def keep_norm_apart(norm: torch.nn.LayerNorm, inputs: tuple[torch.Tensor], output: torch.Tensor) -> torch.Tensor:
    """Forward hook that keeps a norm's weight and bias out of the next layer's weights.

    The converter merges them in ``prefill`` and not in ``decode``: the layer would be stored twice, and what SmoothQuant moved
    into the norm would be moved back.
    """
    return optimization_barrier(output, inputs[0])[0]  # the converter's lowering wants two tensors at least


@torch.no_grad()
def reference_logits(model: PreTrainedModel, feeds: Feeds) -> np.ndarray:
    """PyTorch's logits [sequences, steps + 1, vocab] at the end of each prompt and after each further token, without a cache."""
    rows = []
    for tokens, prompt in zip(feeds.tokens, feeds.prompt_tokens.tolist(), strict=True):
        logits = model(torch.from_numpy(tokens[None, : prompt + feeds.steps]).long()).logits[0]  # [length, vocab]
        rows.append(logits[prompt - 1 : prompt + feeds.steps].numpy())
    return np.stack(rows)


def check_stored_once(stored_bytes: int, shape: ModelShape) -> None:
    """GateError when weights stand in the file twice, per signature or for a tied head."""
    allowed = shape.parameters * 4 + SPARE_CONSTANT_BYTES
    if stored_bytes > allowed:
        raise GateError(f"{NAME}: {stored_bytes} bytes of constants for {shape.parameters} parameters (limit {allowed}): stored twice")
