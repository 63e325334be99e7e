"""Running an exported decoder in ONNX Runtime, with the cache handed on or in one shared buffer."""

import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import onnx
import onnxruntime

from exporters.onnx_files import save_with_data

LARGE_BYTES = 1_000_000_000  # of weights: from here on memory counts for more than the runtime's speed
WARNINGS_OFF = 3  # ORT's severity "error": it warns about operators that run on the CPU on purpose
CACHE_TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


def open_session(model: Path, level=onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL) -> onnxruntime.InferenceSession:
    """A CPU session of a file."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = WARNINGS_OFF
    options.graph_optimization_level = level
    data = model.with_name(model.name + ".data")
    if data.is_file() and data.stat().st_size > LARGE_BYTES:
        options.add_session_config_entry("session.disable_prepacking", "1")  # it would copy every matrix out of the mapped file
    return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])


def open_session_of(model: onnx.ModelProto) -> onnxruntime.InferenceSession:
    """A CPU session of a model in memory, of any size: its weights go through a file that the session maps and that has no name any more.

    Handed over as one message they would be in memory twice more, and 2 GiB at most.
    """
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        save_with_data(model, path)
        return open_session(path)


def past_names(session: onnxruntime.InferenceSession) -> list[str]:
    """Names of the cache's inputs, key and value of every layer in turn."""
    return [value.name for value in session.get_inputs() if value.name.startswith("past_key_values.")]


def empty_past(session: onnxruntime.InferenceSession, batch: int, tokens: int = 0) -> dict[str, np.ndarray]:
    """A cache of ``tokens`` zeroed slots: ``[batch, kv_heads, tokens, head_dim]`` in the graph's own type, per name."""
    inputs = {value.name: value for value in session.get_inputs()}
    return {
        name: np.zeros((batch, inputs[name].shape[1], tokens, inputs[name].shape[3]), CACHE_TYPES[inputs[name].type])
        for name in past_names(session)
    }


def feed(tokens: np.ndarray, past: dict[str, np.ndarray], mask: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """The inputs of one call. ``tokens`` ``[batch, seq]``; without ``mask`` every token, cached ones too, is real."""
    if mask is None:
        cached = next(iter(past.values())).shape[2]
        mask = np.ones((len(tokens), cached + tokens.shape[1]))
    return {"input_ids": tokens.astype(np.int64), "attention_mask": mask.astype(np.int64), **past}


def run_tokens(
    session: onnxruntime.InferenceSession, tokens: np.ndarray, past: dict[str, np.ndarray], mask: np.ndarray | None = None
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Logits ``[batch, seq, vocab]`` and the cache for the next call."""
    names = past_names(session)
    logits, *presents = session.run(["logits", *map(present_name, names)], feed(tokens, past, mask))
    return logits, dict(zip(names, presents, strict=True))


def present_name(past: str) -> str:
    return past.replace("past_key_values.", "present.")


def shared_buffer_logits(session: onnxruntime.InferenceSession, chunks: Iterator[np.ndarray], capacity: int) -> Iterator[np.ndarray]:
    """Logits ``[seq, vocab]`` for each ``chunks`` item ``[seq]``; past and present are one buffer of ``capacity`` tokens."""
    buffers = {name: onnxruntime.OrtValue.ortvalue_from_numpy(array) for name, array in empty_past(session, 1, capacity).items()}
    binding, length = session.io_binding(), 0
    for chunk in chunks:
        length += len(chunk)
        binding.bind_cpu_input("input_ids", chunk[None].astype(np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, length), np.int64))
        for name, buffer in buffers.items():
            binding.bind_ortvalue_input(name, buffer)
            binding.bind_ortvalue_output(present_name(name), buffer)
        binding.bind_output("logits")
        session.run_with_iobinding(binding)
        yield binding.copy_outputs_to_cpu()[-1][0]
