"""Opens an ONNX artifact in ONNX Runtime: one graph, or the two of a hybrid."""

from __future__ import annotations

from pathlib import Path

from device_tests.artifact import Artifact
from device_tests.errors import ArtifactFailure
from device_tests.onnx_hybrid import open_hybrid
from device_tests.onnx_session import OnnxSession, cache_names
from device_tests.process_memory import collapse, full_ranges, give_back

ORT_FORMAT = b"ORTM"  # after the first four bytes


def open_model(artifact: Artifact, ort, threads: int) -> OnnxSession:
    """Open with CPU kernels and ``threads`` intra-op threads. ArtifactFailure when it cannot be opened or has other tensors."""
    wanted = {"input_ids", "attention_mask", *(f"past_key_values.{name}" for name in cache_names(artifact.interface))}

    def open_graph(path: Path, given: dict):
        refuse_ort_format(path)
        options = session_options(ort, threads)
        if artifact.prompt is not None:  # threads of one graph must not spin on the cores that the other needs: it doubles the time
            options.add_session_config_entry("session.force_spinning_stop", "1")
        options.log_severity_level = 3  # errors only: they arrive as exceptions, stderr is for the verdict
        if given:
            options.add_external_initializers(list(given), list(given.values()))
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # weights need no room to grow
        give_back()
        before = full_ranges()
        try:
            session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # every error of the runtime is a class of its own below Exception
            raise ArtifactFailure(f"onnxruntime cannot open {path.name}: {error}") from error
        differing = wanted ^ {tensor.name for tensor in session.get_inputs()}
        if differing:
            raise ArtifactFailure(f"{path.name}: inputs differ from the contract in {', '.join(sorted(differing)[:3])}")
        give_back()
        if path == artifact.path:  # not a hybrid's prompt graph, which reads its weights once for many tokens
            collapse(full_ranges() - before)
        return session

    if artifact.prompt is not None:
        return open_hybrid(artifact, open_graph, ort)
    return OnnxSession(artifact, open_graph(artifact.path, {}), ort)


def refuse_ort_format(path: Path) -> None:
    """ArtifactFailure for a flatbuffer: a static int8 graph saved in ORT format's Runtime style runs 23 times slower, without a word."""
    with path.open("rb") as file:
        if file.read(8)[4:] == ORT_FORMAT:
            raise ArtifactFailure(f"{path.name} is in ORT format, which is not what was proved; give the ONNX file")


def session_options(ort, threads: int):
    """Options of ONNX Runtime for ``threads`` threads inside an operator, and one operator at a time."""
    options = ort.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    return options
