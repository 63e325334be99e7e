"""LiteRT and tflite-runtime: static shapes, signatures prefill and decode, the cache owned here and masked, not moved.

The caches are ``[1, kv_heads, context, head_dim]`` arrays; each call returns the new slices, which are written at their
positions. Cache slots that hold nothing and prompt padding are hidden by the mask.

Mask, caches and logits are float32 or int8, as the file says. An int8 cache takes new slices as they are: they have its scale.
"""

from __future__ import annotations

import time

import numpy as np

from device_tests.artifact import Artifact, Interface
from device_tests.errors import ArtifactFailure
from device_tests.sessions import check_room, check_tokens

HIDDEN = np.float32(-30.0)  # not -1e4: quantised attention has to represent it, and both siblings share this loop


class TfliteSession:
    """A model of the TFLite tensor contract with its cache, batch 1."""

    def __init__(self, artifact: Artifact, interpreter) -> None:
        """``interpreter`` must have its tensors allocated before the signature runners are asked for."""
        self.interface: Interface = artifact.interface
        self.position = 0
        self.notes: list[str] = []
        self.runtime_s = 0.0  # spent inside the runtime's calls, which copy the caches in and the new slices out
        self._name = artifact.name
        self._interpreter = interpreter  # runners hold no reference that keeps it alive in every version
        self._prefill = interpreter.get_signature_runner("prefill")
        self._decode = interpreter.get_signature_runner("decode")
        sizes = self.interface
        shape = (1, sizes.kv_heads, sizes.context_tokens, sizes.head_dim)
        names = [f"{kind}_{layer}" for layer in range(sizes.layers) for kind in "kv"]
        self._inputs = {"prefill": self._prefill.get_input_details(), "decode": self._decode.get_input_details()}
        self._outputs = {"prefill": self._prefill.get_output_details(), "decode": self._decode.get_output_details()}
        self._check_inputs({name: shape for name in names})
        self._check_scales(names)
        details = self._inputs["prefill"]
        self._empty = {name: quantised(0, details[name]) for name in names}  # an empty slot of an int8 cache is its zero point
        self._caches = {name: np.full(shape, self._empty[name]) for name in names}
        chunk = sizes.prefill_tokens
        self._visible, self._hidden = (quantised(value, details["mask"]) for value in (0, HIDDEN))
        self._chunk_mask = np.full((1, 1, chunk, sizes.context_tokens + chunk), self._hidden)
        self._chunk_mask[0, 0, :, sizes.context_tokens :] = np.where(np.tri(chunk, dtype=bool), self._visible, self._hidden)
        self._step_mask = np.full((1, 1, 1, sizes.context_tokens + 1), self._hidden)
        self._step_mask[..., -1] = self._visible

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits ``[vocab]`` after ``tokens`` int ``[n]``: chunks of ``prefill_tokens``, the last one right-padded."""
        ids = check_tokens(tokens, self.interface)
        check_room(self.position, ids.size, self.interface)
        chunk = self.interface.prefill_tokens
        for start in range(0, ids.size, chunk):
            part = ids[start : start + chunk]
            padded = np.zeros((1, chunk), dtype=np.int32)
            padded[0, : part.size] = part
            self._chunk_mask[..., : self.position] = self._visible
            self._chunk_mask[..., self.position : self.interface.context_tokens] = self._hidden
            # padding keeps a position that the model has
            positions = np.minimum(self.position + np.arange(chunk), self.interface.context_tokens - 1).astype(np.int32)
            last = np.array([part.size - 1], dtype=np.int32)
            feeds = {"tokens": padded, "positions": positions[None], "mask": self._chunk_mask, "last": last}
            logits = self._run("prefill", feeds, part.size)
        return logits

    def step(self, token: int) -> np.ndarray:
        """Logits ``[vocab]`` after one more token."""
        check_room(self.position, 1, self.interface)
        tokens = check_tokens(token, self.interface).astype(np.int32)[None]  # [1, 1]
        self._step_mask[..., : self.position] = self._visible
        self._step_mask[..., self.position : self.interface.context_tokens] = self._hidden
        positions = np.array([[self.position]], dtype=np.int32)
        return self._run("decode", {"tokens": tokens, "positions": positions, "mask": self._step_mask}, 1)

    def reset(self) -> None:
        """Forget the cache."""
        self.rewind(0)

    def rewind(self, position: int) -> None:
        """Hold the first ``position`` tokens only. Zeros behind, because a hidden slot still weighs exp(-30) and keys could be large."""
        self.position = position
        for name, cache in self._caches.items():
            cache[:, :, position:] = self._empty[name]

    def caches(self) -> dict[str, np.ndarray]:
        """The buffers ``[1, kv_heads, context, head_dim]`` of keys and values, by name."""
        return self._caches

    def _run(self, signature: str, feeds: dict, new_tokens: int) -> np.ndarray:
        runner = self._prefill if signature == "prefill" else self._decode
        start = time.perf_counter()
        try:
            results = runner(**feeds, **self._caches)
        except (RuntimeError, ValueError) as error:
            raise ArtifactFailure(f"{self._name} could not be run at token {self.position}: {error}") from error
        self.runtime_s += time.perf_counter() - start
        for name, cache in self._caches.items():
            cache[:, :, self.position : self.position + new_tokens] = results[f"new_{name}"][:, :, :new_tokens]
        self.position += new_tokens
        return dequantised(results["logits"].reshape(-1), self._outputs[signature]["logits"])

    def _check_inputs(self, caches: dict[str, tuple[int, ...]]) -> None:
        sizes = self.interface
        for signature, width in (("prefill", sizes.prefill_tokens), ("decode", 1)):
            wanted = dict(caches)
            wanted.update(tokens=(1, width), positions=(1, width), mask=(1, 1, width, sizes.context_tokens + width))
            if signature == "prefill":
                wanted["last"] = (1,)
            found = {name: tuple(int(size) for size in tensor["shape"]) for name, tensor in self._inputs[signature].items()}
            for name in sorted(wanted.keys() | found.keys()):
                if wanted.get(name) != found.get(name):
                    difference = f"{name} is {found.get(name)}, the contract says {wanted.get(name)}"
                    raise ArtifactFailure(f"{self._name}: signature {signature}: {difference}")

    def _check_scales(self, caches: list[str]) -> None:
        """What goes into a cache must have its type and scale, or the copied numbers would mean something else."""
        for signature, outputs in self._outputs.items():
            for name in ("logits", *(f"new_{cache}" for cache in caches)):
                if name not in outputs:
                    raise ArtifactFailure(f"{self._name}: signature {signature} has no output {name}; export the artifact again")
        for name in caches:
            expected = _type_and_scale(self._inputs["prefill"][name])
            found = [_type_and_scale(self._inputs["decode"][name])]
            found += [_type_and_scale(outputs[f"new_{name}"]) for outputs in self._outputs.values()]
            for other in found:
                if other != expected:
                    raise ArtifactFailure(
                        f"{self._name}: cache {name} is {expected}, what goes into it is {other}; export the artifact again"
                    )
        masks = {_type_and_scale(details["mask"]) for details in self._inputs.values()}
        if len(masks) > 1:
            raise ArtifactFailure(f"{self._name}: the masks of its signatures differ: {sorted(masks)}; export the artifact again")


def notes_on(interpreter) -> list[str]:
    """Says so where XNNPACK took no operator: both libraries then compute with plain kernels, slower and with other roundings."""
    names = {operator["op_name"] for operator in interpreter._get_ops_details()}  # both libraries have it, and nothing public tells
    return [] if "DELEGATE" in names else ["XNNPACK is not in use: times and roundings are those of the plain kernels"]


def quantised(value: float, tensor: dict) -> np.ndarray:
    """``value`` as a number of the described tensor's type: int8 by its scale and zero point, or float32."""
    if tensor["dtype"] == np.float32:
        return np.float32(value)
    if tensor["dtype"] != np.int8:
        raise ArtifactFailure(f"{tensor['name']} is {np.dtype(tensor['dtype']).name}; float32 and int8 are known")
    scale, zero_point = tensor["quantization"]
    return np.int8(np.clip(np.round(value / scale) + zero_point, -128, 127))


def dequantised(values: np.ndarray, tensor: dict) -> np.ndarray:
    """Numbers of the described tensor's type as float32."""
    scale, zero_point = tensor["quantization"]
    return values if values.dtype == np.float32 else (values.astype(np.float32) - np.float32(zero_point)) * np.float32(scale)


def _type_and_scale(tensor: dict) -> tuple[str, float, int]:
    scale, zero_point = tensor["quantization"]
    return np.dtype(tensor["dtype"]).name, float(scale), int(zero_point)


def open_model(artifact: Artifact, library, threads: int) -> TfliteSession:
    """Open in ``library`` (an interpreter module) with ``threads`` threads. ArtifactFailure when it will not open."""
    try:
        interpreter = library.Interpreter(model_path=str(artifact.path), num_threads=threads)
        interpreter.allocate_tensors()  # before the runners: tflite-runtime 2.14 else leaves XNNPACK out without a word
        session = TfliteSession(artifact, interpreter)
    except (RuntimeError, ValueError) as error:
        raise ArtifactFailure(f"{library.__name__} cannot open {artifact.name}: {error}") from error
    session.notes = notes_on(interpreter)
    return session
