"""4-bit weight-only ONNX: linear layers in blocks of 4 bits with a scale and a zero each; the embedding in 8 or 4 bits."""

from pathlib import Path

from exporters.onnx_weight_only import Variant, write_artifact
from exporters.settings import OnnxWeightOnlyInt4Settings, OnnxWeightOnlyInt8Settings
from exporters.weight_blocks import Layout

NAME = "onnx_weight_only_int4"


def run(settings: OnnxWeightOnlyInt4Settings, out: Path, onnx: Path, text: Path) -> None:
    """Write onnx_weight_only_int4.onnx and its sidecar. GateError unless every matrix runs from its blocks."""
    write_artifact(Variant(NAME, *layouts(settings), settings), out, onnx, text)


def layouts(settings: OnnxWeightOnlyInt4Settings) -> tuple[Layout, Layout]:
    """That of linear layers and that of the embedding."""
    linear = Layout(bits=4, block=settings.block, symmetric=False)
    wide = Layout(bits=8, block=OnnxWeightOnlyInt8Settings().block, symmetric=True)  # 8 bits need no small blocks
    return linear, linear if settings.embedding_bits == 4 else wide
