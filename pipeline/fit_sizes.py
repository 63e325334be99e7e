"""How many bytes a decoder takes in each format that is exported here, from its sizes alone.

Payload is counted tensor by tensor as the exporters store it: codes, scales and zero points, norms and biases in float, the
tables of rotary angles. The rest of a file, its graph, does not grow with widths: its bytes per layer are measured
(presets/graph_bytes.toml). What deflate leaves is taken from random normal weights put through the same codes and zlib.
"""

import tomllib
import zlib
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import numpy as np

from exporters.settings import (
    OnnxHybridInt4Settings,
    OnnxHybridInt8Settings,
    OnnxWeightOnlyInt4Settings,
    OnnxWeightOnlyInt8Settings,
    TfliteFullInt8Settings,
    TfliteSettings,
)
from pipeline.fit_shape import DecoderShape, matrices, parameters

FLOAT_BYTES = 4
ONE_FILE_BYTES = 1_800_000_000  # the most that one ONNX message may be
TFLITE_BYTES = 2**31 - 2**20  # offsets in a flatbuffer are signed 32-bit numbers
GRAPHS = Path(__file__).parent / "presets" / "graph_bytes.toml"
FULL_CONTEXT = TfliteFullInt8Settings().context_tokens
TFLITE_SIGNATURES = 1 + len(TfliteSettings().prefill_tokens)  # decode, and a prefill for each length
GRAPH_DEFLATED = 0.2  # names and node fields repeat themselves
DEFLATE_LEVEL = 9


@dataclass(frozen=True)
class Blocks:
    """The options that decide bytes: weights that share a scale, and the bits of a 4-bit file's embedding."""

    int8: int = OnnxWeightOnlyInt8Settings().block
    int4: int = OnnxWeightOnlyInt4Settings().block
    int4_embedding_bits: int = OnnxWeightOnlyInt4Settings().embedding_bits
    hybrid_int8: int = OnnxHybridInt8Settings().block
    hybrid_int4: int = OnnxHybridInt4Settings().block
    hybrid_int4_embedding_bits: int = OnnxHybridInt4Settings().embedding_bits


@dataclass(frozen=True)
class Codes:
    """How a matrix is stored: ``bits`` per weight, and ``block`` inputs of a row that share a scale (0: the whole row)."""

    kind: str  # what the bits are: fp32, fp16, int8 or int4
    bits: int
    block: int = 0
    scale_bytes: int = 0
    zero_point_bits: int = 0

    def stored(self, rows: int, columns: int) -> tuple[int, int]:
        """Bytes of the codes, and of their scales and zero points, for a matrix [rows, columns]. Blocks and bytes are filled up."""
        block = self.block or columns
        blocks = -(-columns // block)
        zero_points = -(-blocks * self.zero_point_bits // 8)
        return rows * blocks * block * self.bits // 8, rows * (blocks * self.scale_bytes + zero_points)


FP32, FP16 = Codes("fp32", 32), Codes("fp16", 16)
INT8_ROWS = Codes("int8", 8, scale_bytes=4)


@dataclass(frozen=True)
class Format:
    """A file format: how linear layers, the embedding with a head tied to it, and positions are stored, and what else it holds."""

    name: str
    linear: Codes
    embedding: Codes
    positions: Codes = FP32
    norm_bytes: int = FLOAT_BYTES
    bias_bytes: int = FLOAT_BYTES
    row_bytes: int = 0  # of each output row of linear layers, beside what its blocks have
    rotary_bytes: int = 0  # of cos and sin together, per position and half element of a head; 0: no tables
    most_context: int = 0  # positions that the file is made for; 0: all that the model has
    kv_bytes: int = 4  # of an element of the cache that the graph takes
    fused_twice: bool = False  # what GPT-2 fuses is stored once for each signature
    unpacked: bool = False  # the runtime makes the weights float again when it loads them
    float_limit: int = 0  # bytes of fp32 weights that the exporter takes at most; 0: any
    limit: int = 0  # bytes of the file itself; 0: any


@dataclass(frozen=True)
class Size:
    """Bytes of one format: on disk; after deflate; in memory; of the weights that every decoded token reads.

    A matrix that is multiplied twice (static int8 in two steps) counts once: the second time it may still be in a cache.
    ``note``: why it is not made.
    """

    name: str
    disk: int
    download: int
    memory: int
    read_per_token: int
    kv_bytes: int
    sparsity: float
    note: str

    def bits_per_weight(self, shape: DecoderShape) -> float:
        return 8 * self.disk / parameters(shape).total


def formats(blocks: Blocks) -> tuple[Format, ...]:
    """Every format that the arithmetic knows."""
    int4, int4_table = four_bits(blocks.int4, blocks.int4_embedding_bits)
    hybrid_int4, hybrid_int4_table = four_bits(blocks.hybrid_int4, blocks.hybrid_int4_embedding_bits)
    hybrid_int8 = Codes("int8", 8, blocks.hybrid_int8, scale_bytes=4)
    int8 = Codes("int8", 8, blocks.int8, scale_bytes=4)
    static = Codes("int8", 8, scale_bytes=4, zero_point_bits=8)
    whole = Codes("int8", 8)  # one scale for all
    params = Codes("int8", 8, scale_bytes=12 * TFLITE_SIGNATURES)  # a scale and a 64-bit zero point per row, in each signature
    onnx, tflite = {"rotary_bytes": 2 * FLOAT_BYTES}, {"float_limit": TFLITE_BYTES}
    return (
        Format("checkpoint_fp32", FP32, FP32),
        Format("checkpoint_fp16", FP16, FP16, FP16, norm_bytes=2, bias_bytes=2, kv_bytes=2),
        Format("onnx_fp32", FP32, FP32, **onnx),
        Format("onnx_static_int8", static, static, limit=ONE_FILE_BYTES, **onnx),
        Format("onnx_dynamic_int8", static, static, limit=ONE_FILE_BYTES, **onnx),
        Format("onnx_weight_only_int8", int8, int8, limit=ONE_FILE_BYTES, **onnx),
        Format("onnx_weight_only_int4", int4, int4_table, limit=ONE_FILE_BYTES, **onnx),
        # The prompt graph has a scale and a zero point for each output.
        Format("onnx_hybrid_int8", hybrid_int8, hybrid_int8, row_bytes=5, limit=ONE_FILE_BYTES, **onnx),
        Format("onnx_hybrid_int4", hybrid_int4, hybrid_int4_table, row_bytes=5, limit=ONE_FILE_BYTES, **onnx),
        Format("tflite_fp32", FP32, FP32, **tflite),
        Format("tflite_static_int8", INT8_ROWS, INT8_ROWS, INT8_ROWS, **tflite),
        Format("tflite_dynamic_int8", INT8_ROWS, INT8_ROWS, INT8_ROWS, **tflite),
        Format("tflite_weight_only_int8", params, params, params, unpacked=True, **tflite),
        # Cos and sin are whole heads wide there; norms are int8 too.
        Format(
            "tflite_full_int8",
            whole,
            whole,
            whole,
            norm_bytes=1,
            rotary_bytes=4,
            most_context=FULL_CONTEXT,
            kv_bytes=1,
            fused_twice=True,
            **tflite,
        ),
    )


def four_bits(block: int, embedding_bits: int) -> tuple[Codes, Codes]:
    """Linear layers, and the embedding with a head that is tied to it, of a 4-bit format."""
    # The embedding's look-up wants a byte for each 4-bit zero; 8 bits need no small blocks and no zeros.
    wide = Codes("int8", 8, Blocks().int8, scale_bytes=4)
    table = wide if embedding_bits == 8 else Codes("int4", 4, block, scale_bytes=4, zero_point_bits=12)
    return Codes("int4", 4, block, scale_bytes=4, zero_point_bits=4), table


def size_of(shape: DecoderShape, form: Format, sparsity: float = 0.0) -> Size:
    """Bytes of ``form``; ``sparsity`` is the share of zeros in the linear layers, which deflate alone makes use of."""
    counted = parameters(shape)
    linear, linear_scales = linear_bytes(shape, form, heads=0 if shape.tied else 1)
    table, table_scales = form.embedding.stored(shape.vocab_size, shape.hidden_size)
    context = min(shape.context_tokens, form.most_context or shape.context_tokens)
    places, place_scales = form.positions.stored(context, shape.hidden_size) if not shape.rotary else (0, 0)
    biases = sum(matrix.count * matrix.rows for matrix in matrices(shape) if matrix.bias)
    floats = counted.norms * form.norm_bytes + biases * form.bias_bytes
    angles = context * shape.head_dim // 2 * form.rotary_bytes if shape.rotary else 0
    graph = graph_bytes(form.name, shape)
    row_facts = form.row_bytes * sum(matrix.rows * matrix.count for matrix in matrices(shape) if matrix.part != "head")
    rest = linear_scales + table_scales + place_scales + row_facts + floats + angles
    disk = linear + table + places + rest + graph + (fused_bytes(shape) if form.fused_twice else 0)
    head = linear_bytes(shape, form, heads=1)[0] - linear_bytes(shape, form, heads=0)[0] if not shape.tied else 0
    pruned = linear - head  # the head is no layer that pruning touches
    download = pruned * deflated_share(form.linear.kind, sparsity) + head * deflated_share(form.linear.kind, 0.0)
    download += table * deflated_share(form.embedding.kind, 0.0) + places * deflated_share(form.positions.kind, 0.0)
    download += rest * deflated_share("fp32", 0.0) + graph * GRAPH_DEFLATED
    run = replace(form, linear=FP32, embedding=FP32) if form.unpacked else form
    return Size(
        name=form.name if sparsity == 0 else f"{form.name} {sparsity:.0%} sparse",
        disk=disk,
        download=round(download),
        memory=disk + (counted.total * FLOAT_BYTES if form.unpacked else 0),
        read_per_token=read_bytes(shape, run) + floats,
        kv_bytes=form.kv_bytes,
        sparsity=sparsity,
        note=limit_note(form, counted.total, disk),
    )


def linear_bytes(shape: DecoderShape, form: Format, heads: int) -> tuple[int, int]:
    """Codes, and scales with zero points, of all linear layers, and of ``heads`` heads that are no embedding."""
    found = [(form.linear.stored(m.rows, m.columns), heads if m.part == "head" else m.count) for m in matrices(shape)]
    return sum(codes * count for (codes, _), count in found), sum(scales * count for (_, scales), count in found)


def fused_bytes(shape: DecoderShape) -> int:
    """Int8 weights of GPT-2's q, k and v, which are one matrix there, and of one of its FFN's two; other families fuse nothing."""
    if shape.family != "gpt2":
        return 0
    return shape.layers * shape.hidden_size * ((shape.heads + 2 * shape.kv_heads) * shape.head_dim + shape.ffn_size)


def read_bytes(shape: DecoderShape, form: Format) -> int:
    """Bytes of the matrices that every token is multiplied with; an embedding only where it is the head."""
    table = form.embedding.stored(shape.vocab_size, shape.hidden_size) if shape.tied else (0, 0)
    return sum(linear_bytes(shape, form, heads=0 if shape.tied else 1)) + sum(table)


def limit_note(form: Format, total: int, disk: int) -> str:
    """Why this project does not make the file, or nothing."""
    floats = total * FLOAT_BYTES
    if form.float_limit and floats > form.float_limit:
        return f"not made here: {floats / 1e9:.1f} GB of fp32 weights, {form.float_limit / 1e9:.1f} GB can be read"
    if form.limit and disk > form.limit:
        return f"not made here: {disk / 1e9:.1f} GB, one file may have {form.limit / 1e9:.1f} GB"
    return ""


@cache
def measured_graphs() -> dict[str, dict[str, list[int]]]:
    """Bytes of graphs, fixed and per layer, by format and family."""
    return tomllib.loads(GRAPHS.read_text(encoding="utf-8"))


def graph_bytes(name: str, shape: DecoderShape) -> int:
    """Bytes of a file beyond its payload; a checkpoint has next to none."""
    fixed, per_layer = measured_graphs()[name][shape.family]
    return fixed + shape.layers * per_layer


def kv_cache_bytes(shape: DecoderShape, tokens: int, element_bytes: int) -> int:
    """Keys and values of ``tokens`` tokens in all layers."""
    return 2 * shape.layers * shape.kv_heads * shape.head_dim * tokens * element_bytes


@cache
def deflated_share(kind: str, sparsity: float) -> float:
    """What zlib leaves of normally distributed weights in ``kind``, whose smallest share ``sparsity`` is zero."""
    weights = np.random.default_rng(0).standard_normal((256, 1024), dtype=np.float32)
    magnitudes = np.sort(np.abs(weights), axis=None)
    threshold = magnitudes[round(sparsity * weights.size) - 1] if sparsity else -1.0
    kept = np.where(np.abs(weights) > threshold, weights, 0)
    stored = _coded(kept, kind).tobytes()
    return len(zlib.compress(stored, DEFLATE_LEVEL)) / len(stored)


def _coded(weights: np.ndarray, kind: str) -> np.ndarray:
    if kind == "fp32":
        return weights
    if kind == "fp16":
        return weights.astype(np.float16)
    if kind == "int8":
        return np.rint(weights / np.abs(weights).max(1, keepdims=True) * 127).astype(np.int8)
    blocks = weights.reshape(-1, Blocks().int4)
    covered = np.maximum(np.abs(blocks).max(1, keepdims=True), np.finfo(np.float32).tiny)  # sparse blocks may be all zeros
    nibbles = (np.rint(blocks / covered * 7) + 8).astype(np.uint8).reshape(-1, 2)
    return nibbles[:, 0] | nibbles[:, 1] << 4
