"""Hybrid ONNX with 8 bits: static int8 prompts and weight-only decoding of the very same int8 numbers."""

from pathlib import Path

from exporters.onnx_hybrid import Hybrid, write_artifact
from exporters.settings import OnnxHybridInt8Settings
from exporters.weight_blocks import Layout

NAME = "onnx_hybrid_int8"


def run(settings: OnnxHybridInt8Settings, out: Path, onnx: Path, text: Path) -> None:
    """Write both graphs of onnx_hybrid_int8, their weights and the sidecar. GateError unless every matrix runs as it was chosen to."""
    write_artifact(Hybrid(NAME, settings, None, Layout(bits=8, block=settings.block, symmetric=True)), out, onnx, text)
