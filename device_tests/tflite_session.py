"""LiteRT and tflite-runtime: static shapes, signatures prefill and decode, the cache owned here and masked, not moved.

The caches are ``[1, kv_heads, context, head_dim]`` arrays; each call returns the new slices, which are written at their
positions. Cache slots that hold nothing and prompt padding are hidden by the mask.
"""

from __future__ import annotations

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
        self._name = artifact.name
        self._interpreter = interpreter  # runners hold no reference that keeps it alive in every version
        self._prefill = interpreter.get_signature_runner("prefill")
        self._decode = interpreter.get_signature_runner("decode")
        sizes = self.interface
        shape = (1, sizes.kv_heads, sizes.context_tokens, sizes.head_dim)
        names = [f"{kind}_{layer}" for layer in range(sizes.layers) for kind in "kv"]
        self._caches = {name: np.zeros(shape, dtype=np.float32) for name in names}
        chunk = sizes.prefill_tokens
        self._chunk_mask = np.full((1, 1, chunk, sizes.context_tokens + chunk), HIDDEN, dtype=np.float32)
        self._chunk_mask[0, 0, :, sizes.context_tokens :] = np.where(np.tri(chunk, dtype=bool), np.float32(0), HIDDEN)
        self._step_mask = np.full((1, 1, 1, sizes.context_tokens + 1), HIDDEN, dtype=np.float32)
        self._step_mask[..., -1] = 0
        self._check_inputs()

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits ``[vocab]`` after ``tokens`` int ``[n]``: chunks of ``prefill_tokens``, the last one right-padded."""
        ids = check_tokens(tokens, self.interface)
        check_room(self.position, ids.size, self.interface)
        chunk = self.interface.prefill_tokens
        for start in range(0, ids.size, chunk):
            part = ids[start : start + chunk]
            padded = np.zeros((1, chunk), dtype=np.int32)
            padded[0, : part.size] = part
            self._chunk_mask[..., : self.position] = 0
            self._chunk_mask[..., self.position : self.interface.context_tokens] = HIDDEN
            # padding keeps a position that the model has
            positions = np.minimum(self.position + np.arange(chunk), self.interface.context_tokens - 1).astype(np.int32)
            last = np.array([part.size - 1], dtype=np.int32)
            feeds = {"tokens": padded, "positions": positions[None], "mask": self._chunk_mask, "last": last}
            logits = self._run(self._prefill, feeds, part.size)
        return logits

    def step(self, token: int) -> np.ndarray:
        """Logits ``[vocab]`` after one more token."""
        check_room(self.position, 1, self.interface)
        tokens = check_tokens(token, self.interface).astype(np.int32)[None]  # [1, 1]
        self._step_mask[..., : self.position] = 0
        self._step_mask[..., self.position : self.interface.context_tokens] = HIDDEN
        positions = np.array([[self.position]], dtype=np.int32)
        return self._run(self._decode, {"tokens": tokens, "positions": positions, "mask": self._step_mask}, 1)

    def reset(self) -> None:
        """Forget the cache. Zeros, because a hidden slot still weighs exp(-30) and old keys could be large."""
        self.position = 0
        for cache in self._caches.values():
            cache.fill(0)

    def _run(self, runner, feeds: dict, new_tokens: int) -> np.ndarray:
        try:
            results = runner(**feeds, **self._caches)
        except (RuntimeError, ValueError) as error:
            raise ArtifactFailure(f"{self._name} could not be run at token {self.position}: {error}") from error
        for name, cache in self._caches.items():
            cache[:, :, self.position : self.position + new_tokens] = results[f"new_{name}"][:, :, :new_tokens]
        self.position += new_tokens
        return results["logits"].reshape(-1)

    def _check_inputs(self) -> None:
        sizes = self.interface
        for signature, runner, width in (("prefill", self._prefill, sizes.prefill_tokens), ("decode", self._decode, 1)):
            wanted = {name: cache.shape for name, cache in self._caches.items()}
            wanted.update(tokens=(1, width), positions=(1, width), mask=(1, 1, width, sizes.context_tokens + width))
            if signature == "prefill":
                wanted["last"] = (1,)
            found = {name: tuple(int(size) for size in tensor["shape"]) for name, tensor in runner.get_input_details().items()}
            for name in sorted(wanted.keys() | found.keys()):
                if wanted.get(name) != found.get(name):
                    difference = f"{name} is {found.get(name)}, the contract says {wanted.get(name)}"
                    raise ArtifactFailure(f"{self._name}: signature {signature}: {difference}")


def open_model(artifact: Artifact, library, threads: int) -> TfliteSession:
    """Open in ``library`` (an interpreter module) with ``threads`` threads. ArtifactFailure when it will not open."""
    try:
        interpreter = library.Interpreter(model_path=str(artifact.path), num_threads=threads)
        interpreter.allocate_tensors()  # before the runners: tflite-runtime 2.14 else leaves XNNPACK out without a word
        return TfliteSession(artifact, interpreter)
    except (RuntimeError, ValueError) as error:
        raise ArtifactFailure(f"{library.__name__} cannot open {artifact.name}: {error}") from error
