"""ONNX models on disk: what fits in one file, and what doesn't."""

from pathlib import Path

import onnx

from models.errors import UserError

ONE_FILE_BYTES = 1_800_000_000  # protobuf ends at 2 GiB, headers and graph included


def require_one_file(parent: dict, artifact: str) -> None:
    """UserError for a parent whose weights lie outside its graph file: calibration hands ONNX Runtime the graph as one message."""
    if len(parent["files"]) > 1:
        size = f"{parent['bytes'] / 1e9:.1f} GB of fp32 weights"
        raise UserError(f"{artifact}: {size} are more than calibration for ONNX takes (1.8 GB); use a smaller model or prune more")


def save_one_file(model: onnx.ModelProto, path: Path, artifact: str) -> None:
    """Write ``model`` with its weights inside. UserError where they are too many for that."""
    size = model.ByteSize()
    if size > ONE_FILE_BYTES:
        raise UserError(f"{artifact}: {size / 1e9:.1f} GB do not fit in one ONNX file (1.8 GB); use fewer bits or a smaller model")
    onnx.save(model, path)
