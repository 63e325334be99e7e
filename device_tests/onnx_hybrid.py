"""A hybrid ONNX artifact: prompts through a static int8 graph, single tokens through a weight-only one, over one cache.

The prompt graph holds no matrices: they are the decode graph's numbers in another order, made here when the artifact is opened. The
file of weights is mapped, not read: its pages belong to the system, which can drop and read them again.
"""

from __future__ import annotations

import mmap

import numpy as np

from device_tests.artifact import Artifact, Interface, Matrix, Prompt
from device_tests.errors import ArtifactFailure
from device_tests.onnx_session import CHUNK_TOKENS, OnnxSession, cache_names, cache_type

PROBE_TOKENS = 4


class HybridSession(OnnxSession):
    """An ``OnnxSession`` of the decode graph whose prompts go through the prompt graph."""

    def __init__(self, artifact: Artifact, session, prompt_session, ort) -> None:
        super().__init__(artifact, session, ort)
        check_pair(session, prompt_session, artifact.prompt.path.name)
        self._prompt_session = prompt_session
        self._prompt_binding = prompt_session.io_binding()
        self._prompt_logits = np.zeros((1, 1, self.interface.vocab_size), dtype=np.float32)
        self._bind_caches(self._prompt_binding)
        self._prompt_binding.bind_output("logits", "cpu", 0, np.float32, self._prompt_logits.shape, self._prompt_logits.ctypes.data)
        self.kept: tuple = ()  # what the prompt session reads and does not own

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits ``[vocab]`` after the last of ``tokens`` int ``[n]``.

        All go through the prompt graph however few they are: what a prompt gives does not depend on how much of it was in a cache.
        """
        ids = self._checked(tokens)
        for start in range(0, ids.size, CHUNK_TOKENS):
            chunk = np.ascontiguousarray(ids[None, start : start + CHUNK_TOKENS])  # [1, n]
            self._prompt_binding.bind_input("input_ids", "cpu", 0, np.int64, chunk.shape, chunk.ctypes.data)
            self._run_bound(self._prompt_session, self._prompt_binding, chunk.shape[1])
        return self._prompt_logits[0, 0].copy()


def given_values(prompt: Prompt, ort) -> dict:
    """The matrices of ``given_matrices`` as OrtValues that keep them."""
    return {name: ort.OrtValue.ortvalue_from_numpy(matrix) for name, matrix in given_matrices(prompt).items()}


def given_matrices(prompt: Prompt) -> dict[str, np.ndarray]:
    """int8 ``[inputs, outputs]`` for every matrix of the prompt graph, by name.

    Each lies in a mapping of its own: what ``malloc`` is given back it keeps, or leaves as holes between what is needed longer.
    """
    data = np.memmap(prompt.data, np.uint8, "r")
    made = {}
    for matrix in prompt.weights:
        place = mmap.mmap(-1, matrix.inputs * matrix.outputs)
        made[matrix.name] = np.frombuffer(place, np.int8).reshape(matrix.inputs, matrix.outputs)
        made[matrix.name][:] = as_int8(data, matrix)
    return made


def as_int8(data: np.ndarray, matrix: Matrix) -> np.ndarray:
    """One matrix out of the bytes ``data`` of the file of weights, as `exporters.onnx_hybrid` describes it."""
    shape = (matrix.outputs, matrix.blocks)
    bytes_per_block = matrix.block * matrix.bits // 8
    codes = _part(data, matrix.offsets["codes"], matrix.outputs * matrix.blocks * bytes_per_block, np.uint8)
    if "row_scale" not in matrix.offsets:
        signed = codes.reshape(matrix.outputs, -1)[:, : matrix.inputs] ^ np.uint8(128)  # less 128, as bytes
        return np.ascontiguousarray(signed.T).view(np.int8)
    codes = codes.reshape(*shape, bytes_per_block)
    if matrix.bits == 4:
        codes = np.stack([codes & 15, codes >> 4], axis=-1)
    codes = codes.reshape(*shape, matrix.block).astype(np.float32)
    zeros = np.float32(1 << (matrix.bits - 1))
    if "zeros" in matrix.offsets:
        zeros = _zeros(data, matrix)[..., None].astype(np.float32)
    scales = _part(data, matrix.offsets["scales"], 4 * matrix.outputs * matrix.blocks, np.float32).reshape(*shape, 1)
    row_scale = _part(data, matrix.offsets["row_scale"], 4 * matrix.outputs, np.float32)
    values = ((codes - zeros) * scales).reshape(matrix.outputs, -1)[:, : matrix.inputs]
    return np.ascontiguousarray(np.rint(values / row_scale[:, None]).astype(np.int8).T)


def open_hybrid(artifact: Artifact, open_graph, ort) -> HybridSession:
    """Open both graphs with ``open_graph(path, given)``. The prompt graph first: what it was made of is gone before the other loads."""
    matrices = given_matrices(artifact.prompt)
    given = {name: ort.OrtValue.ortvalue_from_numpy(matrix) for name, matrix in matrices.items()}  # shares the memory of the array
    prompt_session = open_graph(artifact.prompt.path, given)
    if reads_its_own(prompt_session, matrices, artifact.interface):
        given, matrices = {}, {}
    else:
        for name, matrix in given_matrices(artifact.prompt).items():
            matrices[name][:] = matrix
    session = HybridSession(artifact, open_graph(artifact.path, {}), prompt_session, ort)
    session.kept = given, matrices
    return session


def check_pair(session, prompt_session, name: str) -> None:
    """ArtifactFailure unless the prompt graph, called ``name``, gives the decode graph's cache and the logits of one token."""
    kinds = [cache_type(each, name) for each in (prompt_session, session)]
    if kinds[0] != kinds[1]:
        raise ArtifactFailure(f"{name}: its KV cache is {kinds[0].__name__}, the decode graph's is {kinds[1].__name__}")
    given = {value.name: value.shape for value in prompt_session.get_outputs() if not value.name.startswith("present.")}
    if given.keys() != {"logits"} or given["logits"][1] != 1:
        found = ", ".join(f"{key} {shape}" for key, shape in given.items()) or "no logits"
        raise ArtifactFailure(f"{name}: beside the cache it gives {found}, not the logits of the last token alone; export it again")


def reads_its_own(prompt_session, matrices: dict[str, np.ndarray], interface: Interface) -> bool:
    """Whether the session has packed the matrices into memory of its own: then it does not see that they are zero from here on.

    It says nothing of that itself, and where a processor has no packed kernel it goes on reading ours.
    """
    before = _probe(prompt_session, interface)
    for matrix in matrices.values():
        matrix.fill(0)
    return all(np.array_equal(*pair) for pair in zip(before, _probe(prompt_session, interface)))


def _probe(prompt_session, interface: Interface) -> list[np.ndarray]:
    """What the graph gives for a few tokens."""
    past = np.zeros((1, interface.kv_heads, 0, interface.head_dim), cache_type(prompt_session, "the prompt graph"))
    ids = np.arange(PROBE_TOKENS, dtype=np.int64)[None] % interface.vocab_size
    feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), **{f"past_key_values.{name}": past for name in cache_names(interface)}}
    return prompt_session.run(None, feeds)


def _zeros(data: np.ndarray, matrix: Matrix) -> np.ndarray:
    """uint8 ``[outputs, blocks]``; two to a byte with 4 bits."""
    per_row = -(-matrix.blocks * matrix.bits // 8)
    zeros = _part(data, matrix.offsets["zeros"], matrix.outputs * per_row, np.uint8).reshape(matrix.outputs, per_row)
    if matrix.bits == 4:
        zeros = np.stack([zeros & 15, zeros >> 4], axis=-1).reshape(matrix.outputs, -1)
    return zeros[:, : matrix.blocks]


def _part(data: np.ndarray, offset: int, count: int, kind: type) -> np.ndarray:
    return data[offset : offset + count].view(kind)
