"""PyTorch to ONNX: one fp32 graph for prompts, decoding and chunks, proved against PyTorch before the stage ends.

Tensor contract: ``input_ids`` int64 ``[batch, sequence]``, ``attention_mask`` int64 ``[batch, total]``,
``past_key_values.{i}.key|value`` float32 ``[batch, kv_heads, past, head_dim]`` give ``logits`` float32 ``[batch, sequence,
vocab]`` and ``present.{i}.key|value``. Past and present may be one buffer longer than ``total``; padding goes on the right.
"""

import warnings
from collections import Counter
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import torch
from transformers import PreTrainedModel

from exporters.artifact import checkpoint_sha256, write_sidecar
from exporters.fusion_proof import find_fusions
from exporters.genai_config import genai_config
from exporters.gqa_hook import Fusions, GroupQueryDecoder, attention_as_operator
from exporters.onnx_parity import greedy_mismatch, parity, parity_beyond
from exporters.onnx_passes import PassCounts, fuse
from exporters.onnx_session import LARGE_BYTES, open_session
from exporters.onnx_structure import copied_caches
from exporters.settings import OnnxSettings
from models.checkpoint import ModelShape, load_model, shape_of
from models.checkpoint_check import one_line
from models.errors import GateError, UserError
from models.provenance import write_json

NAME = "onnx_fp32"
OPSET = 21
IR_VERSION = 10
EXTERNAL_DATA_BYTES = LARGE_BYTES  # protobuf would go on to 2 GiB, but a file of weights is mapped, where a message is parsed
# Every dynamic dimension of the sample is at least 2 and unlike the others: the exporter freezes 0, 1 and equal sizes.
SAMPLE_BATCH, SAMPLE_SEQUENCE, SAMPLE_PAST = 2, 3, 5
TOKENS_BEYOND = 24  # more than a sliding window holds, in the proof that it is neither lost nor of another width
LIBRARIES = ("torch", "transformers", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """A graph not yet written, and what was fused in it; ``shape`` is the model's, but for a padded KV cache's head size."""

    graph: ir.Model
    shape: ModelShape
    fusions: Fusions
    passes: PassCounts


def run(settings: OnnxSettings, out: Path, model: Path, text: Path) -> None:
    """Write onnx_fp32.onnx, its sidecar and genai_config.json. GateError where it differs from PyTorch."""
    decoder = load_model(model)
    exported = export(decoder, shape_of(decoder))
    shape = exported.shape
    files = save(exported.graph, out / f"{NAME}.onnx")
    check(files[0])
    windows = parity_windows(text, shape.context_tokens, settings.greedy_tokens)
    beyond = tokens_beyond(windows, exported.fusions.windows, shape.context_tokens)
    measured = {**describe(exported), **prove(decoder, files[0], windows, beyond, settings)}
    write_json(out / "genai_config.json", genai_config(decoder, shape, files[0].name))
    write_sidecar(
        out,
        NAME,
        "onnx",
        files=files,
        interface=interface(shape),
        tensors=tensors(exported.graph.graph),
        parent=checkpoint_sha256(model),
        settings=settings,
        measured=measured,
        libraries=LIBRARIES,
    )


def export(model: PreTrainedModel, shape: ModelShape) -> Exported:
    """The model as a fused graph in the tensor contract. UserError for a model that the operators cannot express."""
    fusions = find_fusions(model, shape)
    decoder = GroupQueryDecoder(model, shape, fusions).eval()
    shape = replace(shape, head_dim=fusions.cache_head_dim)
    past_shape = (SAMPLE_BATCH, shape.kv_heads, SAMPLE_PAST, shape.head_dim)
    past = [torch.zeros(past_shape) for _ in range(2 * shape.layers)]
    tokens = torch.ones(SAMPLE_BATCH, SAMPLE_SEQUENCE, dtype=torch.long)
    mask = torch.ones(SAMPLE_BATCH, SAMPLE_PAST + SAMPLE_SEQUENCE, dtype=torch.long)
    dynamic = torch.export.Dim.DYNAMIC
    dimensions = ({0: dynamic, 1: dynamic}, {0: dynamic, 1: dynamic}, [{0: dynamic, 2: dynamic}] * len(past))
    graph = trace(decoder, (tokens, mask, past), dimensions)
    graph.ir_version = IR_VERSION
    apply_contract(graph.graph, shape)
    return Exported(graph, shape, fusions, fuse(graph))


def trace(decoder: GroupQueryDecoder, sample: tuple, dimensions: tuple) -> ir.Model:
    """The decoder as torch's exporter writes it. UserError, naming the family, for a model that it cannot write."""
    with attention_as_operator(decoder), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        try:
            program = torch.onnx.export(
                decoder, sample, dynamic_shapes=dimensions, dynamo=True, optimize=False, opset_version=OPSET, verbose=False
            )
        except torch.onnx.errors.OnnxExporterError as error:
            causes = [error]
            while causes[-1].__cause__ is not None:
                causes.append(causes[-1].__cause__)
            family, reason = decoder.shape.family, one_line(causes[-1])
            raise UserError(f"{family}: torch's ONNX exporter cannot write it ({reason}); use a dense model of another family") from error
    return program.model


def apply_contract(graph: ir.Graph, shape: ModelShape) -> None:
    """Name inputs, outputs and their dynamic dimensions; every other value's symbols follow the same names."""
    layers = [f"{layer}.{part}" for layer in range(shape.layers) for part in ("key", "value")]
    inputs = ["input_ids", "attention_mask", *(f"past_key_values.{layer}" for layer in layers)]
    outputs = ["logits", *(f"present.{layer}" for layer in layers)]
    symbols = {}
    dimensions = [("batch", "sequence"), ("batch", "total")] + [("batch", None, "past", None)] * len(layers)
    for value, name, dimension_names in zip(graph.inputs, inputs, dimensions, strict=True):
        value.name = name
        symbols |= {str(old): new for old, new in zip(value.shape, dimension_names, strict=True) if new}
    for value, name in zip(graph.outputs, outputs, strict=True):
        value.name = name
    for value in {*graph.inputs, *(output for node in graph for output in node.outputs)}:
        if value.shape is not None:
            value.shape = ir.Shape([size if isinstance(size, int) else symbols.get(str(size)) for size in value.shape])


def save(model: ir.Model, path: Path) -> list[Path]:
    """Write the graph; weights go to a second file only where one file cannot hold them."""
    weight_bytes = sum(value.const_value.nbytes for value in model.graph.initializers.values())
    if weight_bytes <= EXTERNAL_DATA_BYTES:
        ir.save(model, path)
        return [path]
    data = path.with_name(path.name + ".data")
    ir.save(model, path, external_data=data.name)
    return [path, data]


def check(path: Path) -> None:
    """onnx's own checker on everything in the standard's domains; raises onnx.checker.ValidationError, a bug of the export.

    SimplifiedLayerNormalization lives in ONNX Runtime's part of the default domain, which the checker doesn't know. GateError for a
    cache that no attention reads and writes in place: every step would copy it.
    """
    model = onnx.load(path, load_external_data=False)
    if copied := copied_caches(model.graph):
        raise GateError(f"{path.name}: {len(copied)} caches are copied at every step, limit 0; first: {copied[0]}")
    for node in model.graph.node:
        if node.op_type == "SimplifiedLayerNormalization":
            node.domain = "com.microsoft"
    checked = path.with_name(f"{path.name}.checked")  # beside its weights: of a message in memory the checker would not find them
    checked.write_bytes(model.SerializeToString())
    onnx.checker.check_model(checked)
    checked.unlink()


def parity_windows(text: Path, context_tokens: int, greedy_tokens: int) -> np.ndarray:
    """Calibration windows int32 ``[n, tokens]``, cut so that half a window and the greedy text fit the context."""
    windows = np.load(text / "calibration.npy")
    return windows[:, : min(context_tokens, 2 * max(2, context_tokens - greedy_tokens))]


def tokens_beyond(windows: np.ndarray, attention_windows: tuple[int, ...], context_tokens: int) -> np.ndarray | None:
    """Calibration tokens int32 ``[n]``, repeated as need be, more than the widest sliding window holds; None without one."""
    if not attention_windows:
        return None
    return np.resize(windows, min(context_tokens, max(attention_windows) + TOKENS_BEYOND))


def prove(model: PreTrainedModel, path: Path, windows: np.ndarray, beyond: np.ndarray | None, settings: OnnxSettings) -> dict:
    """Compare with PyTorch; what was measured, or GateError that names number, limit, artifact and worst place."""
    session = open_session(path)
    differences = parity(model, session, windows)
    if beyond is not None:
        differences.append(parity_beyond(model, session, beyond))
    worst = max(differences, key=lambda d: d.max_abs_diff if np.isfinite(d.max_abs_diff) else np.inf)
    if not worst.max_abs_diff <= settings.max_abs_diff:
        place = f"worst in {worst.phase}, window {worst.window}, position {worst.position}"
        limit = f"above the limit {settings.max_abs_diff:g}"
        raise GateError(f"{NAME}: logits differ from PyTorch by {worst.max_abs_diff:.3g}, {limit}; {place}")
    parting = greedy_mismatch(model, session, windows, settings.greedy_tokens)
    if parting is not None:
        place = f"prompt {parting.prompt}, token {parting.position} of {settings.greedy_tokens}"
        raise GateError(f"{NAME}: greedy text differs from PyTorch's at {place}: {parting.got} instead of {parting.expected}")
    return {
        "max_abs_diff": worst.max_abs_diff,
        "parity": [asdict(difference) for difference in differences],
        "greedy_tokens_identical": settings.greedy_tokens,
    }


def describe(exported: Exported) -> dict:
    """Structure of the graph: which fusions were used, and how many nodes of which kind it has."""
    kinds = Counter(node.op_type for node in exported.graph.graph)
    return {
        "rotary_inside_attention": exported.fusions.rotate_inside,
        "norms_as_operator": len(exported.fusions.norms),
        "not_fused": [*exported.fusions.fallbacks, *unpacked(exported)],
        **asdict(exported.passes),
        "nodes": kinds.total(),
        "operators": dict(sorted(kinds.items())),
    }


def unpacked(exported: Exported) -> list[str]:
    """What the passes could not put together, in the words of the record."""
    left = exported.shape.layers - exported.passes.qkv_packed
    return [f"q, k and v not packed in {left} of {exported.shape.layers} layers: no one product gives them side by side"] if left else []


def interface(shape: ModelShape) -> dict:
    """What a host loop must know of the model."""
    names = ("vocab_size", "layers", "kv_heads", "head_dim", "context_tokens", "bos_token_id", "eos_token_id")
    return {name: getattr(shape, name) for name in names} | {"prefill_tokens": None}


def tensors(graph: ir.Graph) -> dict:
    """Name, element type and shape of every input and output; a dynamic dimension is its name."""
    return {side: [_tensor(value) for value in getattr(graph, side)] for side in ("inputs", "outputs")}


def _tensor(value: ir.Value) -> dict:
    sizes = [size if isinstance(size, int) else str(size.value) for size in value.shape]
    return {"name": value.name, "dtype": value.dtype.numpy().name, "shape": sizes}
