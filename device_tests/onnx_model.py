"""Opens an ONNX artifact in ONNX Runtime: one graph, or the two of a hybrid."""

from __future__ import annotations

from pathlib import Path

from device_tests import onnx_packed
from device_tests.artifact import Artifact
from device_tests.errors import ArtifactFailure
from device_tests.onnx_hybrid import HybridSession, given_values, open_hybrid
from device_tests.onnx_session import OnnxSession, cache_names
from device_tests.process_memory import collapse, forget_pages, full_ranges, give_back

ORT_FORMAT = b"ORTM"  # after the first four bytes


def open_model(artifact: Artifact, ort, threads: int, packed: Path | None = None) -> OnnxSession:
    """Open with CPU kernels and ``threads`` intra-op threads. ArtifactFailure when it cannot be opened or has other tensors.

    ``packed`` is a folder that keeps the weights as this machine's kernels want them (`device_tests.onnx_packed`).
    """
    opener = Opener(artifact, ort, threads)
    if packed is not None:
        return open_packed(opener, packed)
    if artifact.prompt is not None:
        return open_hybrid(artifact, opener.open, ort)
    return OnnxSession(artifact, opener.open(artifact.path), ort)


def open_packed(opener: Opener, folder: Path) -> OnnxSession:
    """From the packed form in ``folder``, which is made first where it is not there yet."""
    artifact, ort = opener.artifact, opener.ort
    place = onnx_packed.packed_place(folder, artifact, ort.__version__)
    kept = place.is_dir()
    if not kept:
        onnx_packed.make(place, opener.pack)
    try:
        if kept:
            onnx_packed.check(place)
        decode = opener.open(place / onnx_packed.DECODE)
        if artifact.prompt is not None:
            return HybridSession(artifact, decode, opener.open(place / onnx_packed.PROMPT), ort)
        return OnnxSession(artifact, decode, ort)
    except ArtifactFailure as error:
        raise ArtifactFailure(f"{error}; remove {place}, and it is made anew") from error


class Opener:
    """Opens graphs of one artifact in ONNX Runtime."""

    def __init__(self, artifact: Artifact, ort, threads: int) -> None:
        self.artifact, self.ort, self.threads = artifact, ort, threads
        self._wanted = {"input_ids", "attention_mask", *(f"past_key_values.{name}" for name in cache_names(artifact.interface))}

    def open(self, path: Path, given: dict | None = None, save_as: Path | None = None):
        """A session of the graph at ``path``; ``given`` are initializers that it has no file for, by name."""
        refuse_ort_format(path)
        options = session_options(self.ort, self.threads)
        options.log_severity_level = 3  # errors only: they arrive as exceptions, stderr is for the verdict
        if self.artifact.prompt is not None:  # threads of one graph must not spin on the cores that the other needs: it doubles the time
            options.add_session_config_entry("session.force_spinning_stop", "1")
        options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")  # weights need no room to grow
        if given:
            options.add_external_initializers(list(given), list(given.values()))
        if save_as is not None:
            onnx_packed.save_to(options, save_as)
        give_back()
        before = full_ranges()
        try:
            session = self.ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # every error of the runtime is a class of its own below Exception
            raise ArtifactFailure(f"onnxruntime cannot open {path.name}: {error}") from error
        differing = self._wanted ^ {tensor.name for tensor in session.get_inputs()}
        if differing:
            raise ArtifactFailure(f"{path.name}: inputs differ from the contract in {', '.join(sorted(differing)[:3])}")
        give_back()
        forget_pages(self.artifact.path.parent)
        if path == self.artifact.path and save_as is None:  # not a prompt graph, which reads its weights once for many tokens
            collapse(full_ranges() - before)
        return session

    def pack(self, folder: Path) -> None:
        """Write the packed form of every graph to ``folder``, one after another."""
        self.open(self.artifact.path, save_as=folder / onnx_packed.DECODE)
        if self.artifact.prompt is not None:
            given = given_values(self.artifact.prompt, self.ort)
            self.open(self.artifact.prompt.path, given, folder / onnx_packed.PROMPT)


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
