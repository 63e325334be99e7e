"""Opens an ONNX artifact in ONNX Runtime: one graph, or the two of a hybrid."""

from __future__ import annotations

from pathlib import Path

from device_tests.artifact import Artifact
from device_tests.errors import ArtifactFailure
from device_tests.onnx_hybrid import open_hybrid
from device_tests.onnx_session import OnnxSession, cache_names


def open_model(artifact: Artifact, ort, threads: int) -> OnnxSession:
    """Open with CPU kernels and ``threads`` intra-op threads. ArtifactFailure when it cannot be opened or has other tensors."""
    wanted = {"input_ids", "attention_mask", *(f"past_key_values.{name}" for name in cache_names(artifact.interface))}

    def open_graph(path: Path, given: dict):
        options = session_options(ort, threads)
        options.log_severity_level = 3  # errors only: they arrive as exceptions, stderr is for the verdict
        if given:
            options.add_external_initializers(list(given), list(given.values()))
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # every error of the runtime is a class of its own below Exception
            raise ArtifactFailure(f"onnxruntime cannot open {path.name}: {error}") from error
        differing = wanted ^ {tensor.name for tensor in session.get_inputs()}
        if differing:
            raise ArtifactFailure(f"{path.name}: inputs differ from the contract in {', '.join(sorted(differing)[:3])}")
        return session

    if artifact.prompt is not None:
        return open_hybrid(artifact, open_graph, ort)
    return OnnxSession(artifact, open_graph(artifact.path, {}), ort)


def session_options(ort, threads: int):
    """Options of ONNX Runtime for ``threads`` threads inside an operator, and one operator at a time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return options
