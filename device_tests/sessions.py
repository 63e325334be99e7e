"""One way to talk to an exported model, whatever runs it: feed a prompt, feed a token, get logits.

``open_session`` is for programs (text generation); device tests call ``import_runtime`` and ``open_artifact`` one after the
other, so that importing a library and loading a model are timed apart.
"""

from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType
from typing import Protocol

import numpy as np

from device_tests.artifact import Artifact, Interface, read_artifact
from device_tests.errors import DeviceTestError

# runtime -> (format that it runs, module of ours that drives it, module that is imported, name for pip)
RUNTIMES = {
    "onnxruntime": ("onnx", "device_tests.onnx_model", "onnxruntime", "onnxruntime"),
    "litert": ("tflite", "device_tests.tflite_session", "ai_edge_litert.interpreter", "ai-edge-litert"),
    "tflite": ("tflite", "device_tests.tflite_session", "tflite_runtime.interpreter", "tflite-runtime"),
}


class Session(Protocol):
    """A model with its KV cache. ``position`` counts the tokens that the cache holds; ``notes`` is what a reader must know.

    ONNX sessions also have ``score(tokens)``: logits float32 ``[n, vocab]`` after each of int ``[n]`` tokens.
    """

    interface: Interface
    position: int
    notes: list[str]

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Append int ``[n]`` tokens to the cache; logits float32 ``[vocab]`` after the last of them."""

    def step(self, token: int) -> np.ndarray:
        """Append one token; logits float32 ``[vocab]``, valid until the next call."""

    def reset(self) -> None:
        """Forget the cache."""

    def rewind(self, position: int) -> None:
        """Hold the first ``position`` tokens only, which may be more than before where a caller has filled the cache itself."""

    def caches(self) -> dict[str, np.ndarray]:
        """The buffers ``[1, kv_heads, context, head_dim]`` of keys and values, by name: not copies."""


def open_session(sidecar: Path, runtime: str, threads: int = 1, packed: Path | None = None) -> Session:
    """Check the artifact's hashes and open it. DeviceTestError for a person's mistake, ArtifactFailure when it will not open."""
    artifact = read_artifact(Path(sidecar))
    import_runtime(runtime)
    return open_artifact(artifact, runtime, threads, packed)


def import_runtime(runtime: str) -> str:
    """Import the runtime's library and return its version.

    Imported by name because a device has one runtime only, and because two of them do not live well in one process.
    """
    if runtime not in RUNTIMES:
        raise DeviceTestError(f"unknown runtime {runtime}; give one of {', '.join(RUNTIMES)}")
    _, _, library, package = RUNTIMES[runtime]
    try:
        importlib.import_module(library)
    except ImportError as error:
        raise DeviceTestError(f"runtime {runtime} is not installed here ({error}); run: pip install {package}") from error
    return str(importlib.import_module(library.split(".")[0]).__version__)


def open_artifact(artifact: Artifact, runtime: str, threads: int, packed: Path | None = None) -> Session:
    """Open a checked artifact in an imported runtime with ``threads`` threads; ``packed`` as in `device_tests.onnx_model.open_model`."""
    form, driver, library, _ = RUNTIMES[runtime]
    if artifact.format != form:
        raise DeviceTestError(f"{artifact.name} is {artifact.format}, {runtime} runs {form}; give another --runtime")
    if threads < 1:
        raise DeviceTestError(f"{threads} threads; give 1 or more")
    module: ModuleType = importlib.import_module(driver)
    if packed is None:
        return module.open_model(artifact, importlib.import_module(library), threads)
    if form != "onnx":
        raise DeviceTestError(f"{runtime} cannot keep packed weights in a folder, ONNX Runtime alone can; leave out --packed")
    return module.open_model(artifact, importlib.import_module(library), threads, packed)


def check_room(position: int, tokens: int, interface: Interface) -> None:
    """DeviceTestError unless ``tokens`` more fit the context."""
    if tokens < 1:
        raise DeviceTestError("an empty prompt; give at least one token")
    if position + tokens > interface.context_tokens:
        context = interface.context_tokens
        raise DeviceTestError(f"{position + tokens} tokens do not fit the context of {context}; give a shorter text")


def check_tokens(tokens: np.ndarray, interface: Interface) -> np.ndarray:
    """The tokens as int64 ``[n]``. DeviceTestError for an id outside the vocabulary: a runtime would read foreign memory."""
    ids = np.asarray(tokens, dtype=np.int64).reshape(-1)
    if ids.size and (ids.min() < 0 or ids.max() >= interface.vocab_size):
        found = f"token ids from {ids.min()} to {ids.max()}"
        raise DeviceTestError(f"{found}, the model has {interface.vocab_size}; check the tokenizer")
    return ids
