"""How a session calls the signatures of a TFLite file: arrays that go in, arrays that come out, and the cache that all share.

``InterpreterCalls`` works with every runtime: the interpreter copies the cache in at each call. In LiteRT ``CompiledCalls``
(`device_tests.tflite_compiled`) lets all signatures read one cache where it lies.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from device_tests.errors import ArtifactFailure

Details = dict  # what a runtime tells of a tensor: name, shape, dtype, quantization
DECODE = "decode"


class Calls(Protocol):
    """The signatures of an open file, and the cache ``[1, kv_heads, rows, head_dim]`` that goes into each of them.

    ``inputs`` and ``outputs`` describe the tensors by signature and name. ``resizable``: ``hold`` may be asked for any length.
    """

    inputs: dict[str, dict[str, Details]]
    outputs: dict[str, dict[str, Details]]
    caches: dict[str, np.ndarray]
    resizable: bool

    def hold(self, rows: int) -> None:
        """Give the cache ``rows`` slots, if it has another number: what is in those that stay is kept, new ones are empty."""

    def feeds(self, signature: str) -> dict[str, np.ndarray]:
        """What goes into a signature beside the cache, to be written to; other arrays after the cache's length has changed."""

    def run(self, signature: str) -> dict[str, np.ndarray]:
        """Outputs by name, valid until the next call. RuntimeError or ValueError where the runtime cannot."""


class InterpreterCalls:
    """Signatures of an interpreter, of LiteRT, tflite-runtime or another that has ``get_signature_runner``."""

    def __init__(self, interpreter, signatures: list[str], resizable: bool = False) -> None:
        """``interpreter`` must have its tensors allocated before: tflite-runtime 2.14 else leaves XNNPACK out without a word."""
        self._interpreter = interpreter  # runners hold no reference that keeps it alive in every version
        self._runners = {name: interpreter.get_signature_runner(name) for name in signatures}
        self.inputs = {name: runner.get_input_details() for name, runner in self._runners.items()}
        self.outputs = {name: runner.get_output_details() for name, runner in self._runners.items()}
        self.resizable = resizable
        self._feeds: dict[str, dict[str, np.ndarray]] = {}
        decode = self.inputs[DECODE]
        self.caches = {name: np.full(tensor["shape"], quantised(0, tensor)) for name, tensor in decode.items() if is_cache(name)}

    def hold(self, rows: int) -> None:
        """See ``Calls``."""
        if rows != rows_of(self.caches):
            self.caches = {name: resized(cache, rows, quantised(0, self.inputs[DECODE][name])) for name, cache in self.caches.items()}
            self._feeds.clear()

    def feeds(self, signature: str) -> dict[str, np.ndarray]:
        """See ``Calls``."""
        if signature not in self._feeds:
            rows = rows_of(self.caches)
            tensors = {name: tensor for name, tensor in self.inputs[signature].items() if not is_cache(name)}
            self._feeds[signature] = {name: np.zeros(input_shape(name, each, rows), each["dtype"]) for name, each in tensors.items()}
        return self._feeds[signature]

    def run(self, signature: str) -> dict[str, np.ndarray]:
        """See ``Calls``. The runner takes the arrays' lengths over before it copies them in."""
        return self._runners[signature](**self._feeds[signature], **self.caches)


def is_cache(name: str) -> bool:
    """Whether a signature's input is keys or values of a layer: ``k_0``, ``v_0``, ``k_1`` ..."""
    return name[:2] in ("k_", "v_")


def rows_of(caches: dict[str, np.ndarray]) -> int:
    """How many slots caches ``[1, kv_heads, rows, head_dim]`` have."""
    return next(iter(caches.values())).shape[2]


def resized(cache: np.ndarray, rows: int, empty: np.generic) -> np.ndarray:
    """A cache with ``rows`` slots that holds what the other did, as far as it fits, and is empty behind."""
    made = np.full((*cache.shape[:2], rows, cache.shape[3]), empty, cache.dtype)
    made[:, :, : cache.shape[2]] = cache[:, :, :rows]
    return made


def input_shape(name: str, tensor: Details, rows: int) -> tuple[int, ...]:
    """Shape of an input where the cache has ``rows`` slots: the mask ``[1, 1, tokens, rows + tokens]`` goes with it."""
    shape = tuple(int(size) for size in tensor["shape"])
    if is_cache(name):
        return (*shape[:2], rows, shape[3])
    return (*shape[:3], rows + shape[2]) if name == "mask" else shape


def quantised(value: float, tensor: Details) -> np.generic:
    """``value`` as a number of the described tensor's type: int8 by its scale and zero point, or float32."""
    if tensor["dtype"] == np.float32:
        return np.float32(value)
    if tensor["dtype"] != np.int8:
        raise ArtifactFailure(f"{tensor['name']} is {np.dtype(tensor['dtype']).name}; float32 and int8 are known")
    scale, zero_point = tensor["quantization"]
    return np.int8(np.clip(np.round(value / scale) + zero_point, -128, 127))


def dequantised(values: np.ndarray, tensor: Details) -> np.ndarray:
    """Numbers of the described tensor's type as float32."""
    scale, zero_point = tensor["quantization"]
    return values if values.dtype == np.float32 else (values.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)
