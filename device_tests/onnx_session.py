"""ONNX Runtime: past and present of every layer are bound to one buffer of the whole context, written in place.

The graph's GroupQueryAttention appends to the buffer and takes the real length from the attention mask, so that a step copies
neither the cache nor, but for one row after a prompt, the logits.
"""

from __future__ import annotations

import time

import numpy as np

from device_tests.artifact import Artifact, Interface
from device_tests.errors import ArtifactFailure
from device_tests.sessions import check_room, check_tokens

CACHE_TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}
CHUNK_TOKENS = 128  # of a prompt in one call: memory stays bounded, and larger chunks were no faster with 4 to 139 M parameters
PROMPT_LOGITS_BYTES = 64 << 20  # where the graph gives logits of every prompt token: fewer tokens of a large vocabulary


class OnnxSession:
    """A model of the ONNX tensor contract with its cache, batch 1."""

    def __init__(self, artifact: Artifact, session, ort) -> None:
        """``session`` is an InferenceSession, ``ort`` the onnxruntime module."""
        self.interface: Interface = artifact.interface
        self.position = 0
        self.notes: list[str] = []
        self.runtime_s = 0.0  # spent inside the runtime's calls
        self._name = artifact.name
        self._session = session
        self._binding = session.io_binding()
        sizes = self.interface
        self._chunk = min(CHUNK_TOKENS, max(1, PROMPT_LOGITS_BYTES // (4 * sizes.vocab_size)))
        self._token = np.zeros((1, 1), dtype=np.int64)
        self._ones = np.ones((1, sizes.context_tokens), dtype=np.int64)
        self._step_logits = np.zeros((1, 1, sizes.vocab_size), dtype=np.float32)
        self._caches, kind = {}, cache_type(session, artifact.name)
        for name in cache_names(sizes):
            cache = np.zeros((1, sizes.kv_heads, sizes.context_tokens, sizes.head_dim), dtype=kind)
            self._caches[name] = cache, ort.OrtValue.ortvalue_from_numpy(cache)  # shares the memory of the array
        self._bind_caches(self._binding)
        self._step_bound = False
        self._seen_in_place: set[int] = set()  # bindings, by identity

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits ``[vocab]`` after the last of ``tokens`` int ``[n]``."""
        ids = self._checked(tokens)
        self._step_bound = False
        for start in range(0, ids.size, self._chunk):
            chunk = np.ascontiguousarray(ids[None, start : start + self._chunk])  # [1, n]
            logits = np.empty((1, chunk.shape[1], self.interface.vocab_size), dtype=np.float32)
            self._run(chunk, logits)
        return logits[0, -1].copy()

    def step(self, token: int) -> np.ndarray:
        """Logits ``[vocab]`` after one more token; a view that the next step overwrites."""
        check_room(self.position, 1, self.interface)
        self._token[0, 0] = check_tokens(token, self.interface)[0]
        if self._step_bound:
            self._run_bound(self._session, self._binding, 1)
        else:
            self._run(self._token, self._step_logits)
            self._step_bound = True
        return self._step_logits[0, 0]

    def score(self, tokens: np.ndarray) -> np.ndarray:
        """Append int ``[n]`` tokens; logits ``[n, vocab]`` after each of them."""
        ids = self._checked(tokens)
        self._step_bound = False
        logits = np.empty((1, ids.size, self.interface.vocab_size), dtype=np.float32)
        self._run(np.ascontiguousarray(ids[None]), logits)
        return logits[0]

    def reset(self) -> None:
        """Forget the cache."""
        self.rewind(0)

    def rewind(self, position: int) -> None:
        """Hold the first ``position`` tokens only: what lies beyond the mask is never read."""
        self.position = position

    def caches(self) -> dict[str, np.ndarray]:
        """The buffers ``[1, kv_heads, context, head_dim]`` of keys and values, by name."""
        return {name: cache for name, (cache, _) in self._caches.items()}

    def _checked(self, tokens: np.ndarray) -> np.ndarray:
        """``tokens`` int ``[n]`` as int64. DeviceTestError where they do not fit the vocabulary or the context."""
        ids = check_tokens(tokens, self.interface)
        check_room(self.position, ids.size, self.interface)
        return ids

    def _bind_caches(self, binding) -> None:
        """Past and present of every layer to the one buffer."""
        for name, (_, value) in self._caches.items():
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)

    def _run(self, ids: np.ndarray, logits: np.ndarray) -> None:
        self._binding.bind_input("input_ids", "cpu", 0, np.int64, ids.shape, ids.ctypes.data)
        self._binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
        self._run_bound(self._session, self._binding, ids.shape[1])

    def _run_bound(self, session, binding, new_tokens: int) -> None:
        length = self.position + new_tokens
        binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, length), self._ones.ctypes.data)
        start = time.perf_counter()
        try:
            session.run_with_iobinding(binding)
        except Exception as error:  # every error of the runtime is a class of its own below Exception
            raise ArtifactFailure(f"onnxruntime could not run {self._name} at token {self.position}: {error}") from error
        self.runtime_s += time.perf_counter() - start
        self.position = length
        if id(binding) not in self._seen_in_place:
            self._check_in_place(binding)
            self._seen_in_place.add(id(binding))

    def _check_in_place(self, binding) -> None:
        """ArtifactFailure unless the runtime wrote keys and values into the session's own buffers: else every step copies the cache."""
        written = {value.data_ptr() for value in binding.get_outputs()}
        for name, (cache, _) in self._caches.items():
            if cache.ctypes.data not in written:
                raise ArtifactFailure(f"{self._name}: present.{name} is not the buffer of its past, so that every step copies the cache")


def cache_type(session, name: str) -> type:
    """The type of keys and values as the graph has it. ArtifactFailure, naming the artifact, for one that is not known here."""
    kinds = {value.type for value in session.get_inputs() if value.name.startswith("past_key_values.")}
    if len(kinds) != 1 or not kinds <= CACHE_TYPES.keys():
        raise ArtifactFailure(f"{name}: a KV cache of {' and '.join(sorted(kinds)) or 'no tensors'}; known are {', '.join(CACHE_TYPES)}")
    return CACHE_TYPES[kinds.pop()]


def cache_names(interface: Interface) -> list[str]:
    """Key and value of every layer in turn, as the tensors' names end."""
    return [f"{layer}.{kind}" for layer in range(interface.layers) for kind in ("key", "value")]
