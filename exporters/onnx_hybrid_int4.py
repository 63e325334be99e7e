"""Hybrid ONNX with 4 bits: decoding from 4-bit blocks, prompts as static int8 made of the same numbers."""

from pathlib import Path

from exporters.onnx_hybrid import Hybrid, write_artifact
from exporters.onnx_weight_only_int4 import layouts
from exporters.settings import OnnxHybridInt4Settings

NAME = "onnx_hybrid_int4"


def run(settings: OnnxHybridInt4Settings, out: Path, onnx: Path, text: Path) -> None:
    """Write both graphs of onnx_hybrid_int4, their weights and the sidecar. GateError unless every matrix runs as it was chosen to."""
    linear, embedding = layouts(settings)
    write_artifact(Hybrid(NAME, settings, linear, embedding), out, onnx, text)
