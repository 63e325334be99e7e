"""8-bit weight-only ONNX: linear layers, head and embedding in blocks of 8 bits, symmetric; activations stay fp32."""

from pathlib import Path

from exporters.onnx_weight_only import Variant, write_artifact
from exporters.settings import OnnxWeightOnlyInt8Settings
from exporters.weight_blocks import Layout

NAME = "onnx_weight_only_int8"


def run(settings: OnnxWeightOnlyInt8Settings, out: Path, onnx: Path, text: Path) -> None:
    """Write onnx_weight_only_int8.onnx and its sidecar. GateError unless every matrix runs from its blocks."""
    layout = Layout(bits=8, block=settings.block, symmetric=True)
    write_artifact(Variant(NAME, layout, layout, settings), out, onnx, text)
