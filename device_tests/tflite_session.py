"""LiteRT and tflite-runtime: static shapes, signatures ``prefill_N`` and ``decode``, the cache owned here and masked, not moved.

The caches are ``[1, kv_heads, rows, head_dim]`` arrays; each call returns the new slices, which are written at their positions.
Cache slots that hold nothing and prompt padding are hidden by the mask. Where the file and the runtime allow it, the caches have
no more rows than hold tokens, rounded up to a power of two: attention takes time by the row, hidden or not.

Mask, caches and logits are float32 or int8, as the file says. An int8 cache takes new slices as they are: they have its scale.
"""

from __future__ import annotations

import importlib
import time
from functools import lru_cache

import numpy as np

from device_tests.artifact import Artifact, Interface
from device_tests.errors import ArtifactFailure
from device_tests.sessions import check_room, check_tokens
from device_tests.tflite_calls import DECODE, Calls, InterpreterCalls, dequantised, quantised
from device_tests.tflite_compiled import CompiledCalls, CompiledUnavailable, weights_are_packed

HIDDEN = np.float32(-30.0)  # not -1e4: quantised attention has to represent it, and both siblings share this loop
FEWEST_ROWS = 64  # of a resizable cache: resizing takes longer than attending to so few
WITHOUT_XNNPACK = "XNNPACK is not in use: times and roundings are those of the plain kernels"
CALL_TOKENS = 16  # tokens of a prompt that take as long as a call by itself does, which reads all weights


class TfliteSession:
    """A model of the TFLite tensor contract with its cache, batch 1."""

    def __init__(self, artifact: Artifact, calls: Calls) -> None:
        """``calls`` is the open file. ArtifactFailure where it does not keep the contract."""
        self.interface: Interface = artifact.interface
        self.position = 0
        self.notes: list[str] = []
        self.runtime_s = 0.0  # spent inside the runtime's calls
        self._name = artifact.name
        self._calls = calls
        self._widths = {DECODE: 1, **{name: size for size, name in prefill_signatures(self.interface).items()}}
        sizes = self.interface
        shape = (1, sizes.kv_heads, sizes.context_tokens, sizes.head_dim)
        names = [f"{kind}_{layer}" for layer in range(sizes.layers) for kind in "kv"]
        self._check_inputs({name: shape for name in names})
        self._check_scales(names)
        details = calls.inputs[DECODE]
        self._empty = {name: quantised(0, details[name]) for name in names}  # an empty slot of an int8 cache is its zero point
        self._visible, self._hidden = (quantised(value, details["mask"]) for value in (0, HIDDEN))
        self._masks: dict[str, np.ndarray] = {}  # those whose part for the chunk itself is filled in

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits ``[vocab]`` after ``tokens`` int ``[n]``, in the calls that take least time; the last is right-padded."""
        ids = check_tokens(tokens, self.interface)
        check_room(self.position, ids.size, self.interface)
        names = prefill_signatures(self.interface)
        start = 0
        for width in cover(ids.size, self.interface.prefill_tokens):
            logits = self._run(names[width], ids[start : start + width])
            start += width
        return logits.copy()  # the runtime writes the next ones to the same place

    def step(self, token: int) -> np.ndarray:
        """Logits ``[vocab]`` after one more token."""
        check_room(self.position, 1, self.interface)
        return self._run(DECODE, check_tokens(token, self.interface))

    def reset(self) -> None:
        """Forget the cache."""
        self.rewind(0)

    def rewind(self, position: int) -> None:
        """Hold the first ``position`` tokens only. Zeros behind, because a hidden slot still weighs exp(-30) and keys could be large."""
        self.position = position
        for name, cache in self._calls.caches.items():
            cache[:, :, position:] = self._empty[name]

    def caches(self) -> dict[str, np.ndarray]:
        """The buffers ``[1, kv_heads, context, head_dim]`` of keys and values, by name; others after the next token."""
        self._calls.hold(self.interface.context_tokens)
        return self._calls.caches

    def _run(self, signature: str, ids: np.ndarray) -> np.ndarray:
        """Logits ``[vocab]`` after ``ids`` int ``[n]``, no more than the signature's width."""
        self._calls.hold(self._rows(self.position))
        self._fill(self._calls.feeds(signature), signature, ids)
        start = time.perf_counter()
        try:
            results = self._calls.run(signature)
        except (RuntimeError, ValueError) as error:
            raise ArtifactFailure(f"{self._name} could not be run at token {self.position}: {error}") from error
        self.runtime_s += time.perf_counter() - start
        end = self.position + ids.size
        self._calls.hold(self._rows(end))
        for name, cache in self._calls.caches.items():
            cache[:, :, self.position : end] = results[f"new_{name}"][:, :, : ids.size]
        self.position = end
        return dequantised(results["logits"].reshape(-1), self._calls.outputs[signature]["logits"])

    def _rows(self, tokens: int) -> int:
        """How many rows the cache has to have that holds so many tokens."""
        if not (self.interface.resizable_cache and self._calls.resizable):
            return self.interface.context_tokens
        return min(max(FEWEST_ROWS, 1 << (tokens - 1).bit_length()), self.interface.context_tokens)

    def _fill(self, feeds: dict[str, np.ndarray], signature: str, ids: np.ndarray) -> None:
        """Write what goes into a call beside the cache; padding keeps a position that the model has."""
        width, mask = self._widths[signature], feeds["mask"]
        rows = mask.shape[3] - width
        if self._masks.get(signature) is not mask:  # the chunk's own part is always the same
            mask[0, 0, :, rows:] = np.where(np.tri(width, dtype=bool), self._visible, self._hidden)
            self._masks[signature] = mask
        mask[..., : self.position] = self._visible
        mask[..., self.position : rows] = self._hidden
        feeds["tokens"][0, : ids.size] = ids
        feeds["tokens"][0, ids.size :] = 0
        feeds["positions"][0] = np.minimum(self.position + np.arange(width), self.interface.context_tokens - 1)
        if "last" in feeds:
            feeds["last"][0] = ids.size - 1

    def _check_inputs(self, caches: dict[str, tuple[int, ...]]) -> None:
        sizes = self.interface
        for signature, width in self._widths.items():
            wanted = dict(caches)
            wanted.update(tokens=(1, width), positions=(1, width), mask=(1, 1, width, sizes.context_tokens + width))
            if signature != DECODE:
                wanted["last"] = (1,)
            found = {name: tuple(int(size) for size in tensor["shape"]) for name, tensor in self._calls.inputs[signature].items()}
            for name in sorted(wanted.keys() | found.keys()):
                if wanted.get(name) != found.get(name):
                    difference = f"{name} is {found.get(name)}, the contract says {wanted.get(name)}"
                    raise ArtifactFailure(f"{self._name}: signature {signature}: {difference}")

    def _check_scales(self, caches: list[str]) -> None:
        """What goes into a cache must have its type and scale, or the copied numbers would mean something else."""
        inputs, outputs = self._calls.inputs, self._calls.outputs
        for signature, made in outputs.items():
            for name in ("logits", *(f"new_{cache}" for cache in caches)):
                if name not in made:
                    raise ArtifactFailure(f"{self._name}: signature {signature} has no output {name}; export the artifact again")
        for name in caches:
            expected = _type_and_scale(inputs[DECODE][name])
            found = [_type_and_scale(read[name]) for read in inputs.values()]
            found += [_type_and_scale(made[f"new_{name}"]) for made in outputs.values()]
            for other in found:
                if other != expected:
                    raise ArtifactFailure(
                        f"{self._name}: cache {name} is {expected}, what goes into it is {other}; export the artifact again"
                    )
        masks = {_type_and_scale(details["mask"]) for details in inputs.values()}
        if len(masks) > 1:
            raise ArtifactFailure(f"{self._name}: the masks of its signatures differ: {sorted(masks)}; export the artifact again")


def prefill_signatures(interface: Interface) -> dict[int, str]:
    """The signature for each length of a call, as LiteRT-LM calls them."""
    return {tokens: f"prefill_{tokens}" for tokens in interface.prefill_tokens}


@lru_cache(maxsize=1024)
def cover(tokens: int, lengths: tuple[int, ...]) -> tuple[int, ...]:
    """The calls, longest first, that take a prompt of so many tokens in the least time: a call's is its length and ``CALL_TOKENS``.

    Padding costs what tokens cost, and only the last call is padded: with more padding it would not be among the best.
    """
    best = [(0, 0, 0)]  # by number of tokens: what they cost, in how many calls, and the length of one of these
    for count in range(1, tokens + 1):
        tried = [(best[max(0, count - length)], length) for length in lengths]
        best.append(min((cost + length + CALL_TOKENS, calls + 1, length) for (cost, calls, _), length in tried))
    calls = []
    while tokens > 0:
        calls.append(best[tokens][2])
        tokens -= calls[-1]
    return tuple(sorted(calls, reverse=True))


def notes_on(interpreter) -> list[str]:
    """Says so where XNNPACK took no operator: both libraries then compute with plain kernels, slower and with other roundings."""
    names = {operator["op_name"] for operator in interpreter._get_ops_details()}  # both libraries have it, and nothing public tells
    return [] if "DELEGATE" in names else [WITHOUT_XNNPACK]


def _type_and_scale(tensor: dict) -> tuple[str, float, int]:
    scale, zero_point = tensor["quantization"]
    return np.dtype(tensor["dtype"]).name, float(scale), int(zero_point)


def open_model(artifact: Artifact, library, threads: int) -> TfliteSession:
    """Open in ``library`` (an interpreter module) with ``threads`` threads. ArtifactFailure when it will not open."""
    try:
        if library.__name__.startswith("ai_edge_litert"):
            return open_litert(artifact, library, threads)
        return open_interpreter(artifact, library, threads)
    except (RuntimeError, ValueError) as error:
        raise ArtifactFailure(f"{library.__name__} cannot open {artifact.name}: {error}") from error


def open_litert(artifact: Artifact, library, threads: int) -> TfliteSession:
    """In LiteRT's CompiledModel, or where that cannot be used in its interpreter, with a note why."""
    try:
        compiled = importlib.import_module("ai_edge_litert.compiled_model")
        calls = CompiledCalls(artifact.path, signatures_of(artifact), threads, compiled)
    except (ImportError, CompiledUnavailable) as error:
        session = open_interpreter(artifact, library, threads)
        session.notes.append(f"LiteRT's Interpreter is used, which packs the weights once for each signature: {error}")
        return session
    session = TfliteSession(artifact, calls)
    session.notes = [WITHOUT_XNNPACK] if weights_are_packed() is False else []
    return session


def open_interpreter(artifact: Artifact, library, threads: int) -> TfliteSession:
    """In ``library.Interpreter``."""
    interpreter = library.Interpreter(model_path=str(artifact.path), num_threads=threads)
    interpreter.allocate_tensors()  # before the runners: tflite-runtime 2.14 else leaves XNNPACK out without a word
    session = TfliteSession(artifact, InterpreterCalls(interpreter, signatures_of(artifact), resizable=True))
    session.notes = notes_on(interpreter)
    return session


def signatures_of(artifact: Artifact) -> list[str]:
    """Names of the signatures that the sidecar promises."""
    return [DECODE, *prefill_signatures(artifact.interface).values()]
