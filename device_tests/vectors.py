"""Reading golden.npz and evaluation.npz window by window: checked before use, never more than a window in memory, no pickle.

An .npz is a zip of .npy files; ``numpy.load`` would inflate whole arrays, which a measurement of memory must not see.
"""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from device_tests.artifact import Interface
from device_tests.errors import DeviceTestError

GOLDEN_DIMENSIONS = {"windows": "gT", "prompt_tokens": "", "logits": "gRV", "greedy_prompts": "qP", "greedy_tokens": "qN"}
EVALUATION_DIMENSIONS = {
    "windows": "mT", "prompt_tokens": "", "top_ids": "mSk", "top_logprob": "mSk", "rest_logprob": "mS", "target_logprob": "mS",
    "dense_target_logprob": "mS",
}  # fmt: skip
Sizes = dict[str, int]  # letter of a dimension -> length


@dataclass(frozen=True)
class Vectors:
    """A checked file: ``sizes`` maps the letters above to lengths, ``prompt_tokens`` is the length of each window's prompt."""

    path: Path
    sizes: Sizes
    prompt_tokens: int


def open_golden(folder: Path, interface: Interface) -> Vectors:
    """``golden.npz`` of ``folder``, checked against the artifact's sizes."""
    vectors = _open(folder / "golden.npz", GOLDEN_DIMENSIONS)
    sizes = vectors.sizes
    _require(sizes["V"] == interface.vocab_size, vectors.path, f"{sizes['V']} logits, the artifact has {interface.vocab_size}")
    longest = max(vectors.prompt_tokens + sizes["R"] - 1, sizes["P"] + sizes["N"] - 1)
    _require(longest <= interface.context_tokens, vectors.path, f"{longest} tokens, the context is {interface.context_tokens}")
    _require(vectors.prompt_tokens + sizes["R"] <= sizes["T"], vectors.path, "more scored tokens than its windows have")
    return vectors


def open_evaluation(folder: Path, interface: Interface) -> Vectors:
    """``evaluation.npz`` of ``folder``, checked against the artifact's sizes."""
    vectors = _open(folder / "evaluation.npz", EVALUATION_DIMENSIONS)
    sizes = vectors.sizes
    scored = sizes["T"] - vectors.prompt_tokens
    _require(sizes["S"] == scored, vectors.path, f"{sizes['S']} scored tokens per window, its windows leave {scored}")
    _require(sizes["T"] - 1 <= interface.context_tokens, vectors.path, f"windows of {sizes['T']} tokens exceed the context")
    return vectors


def read_rows(vectors: Vectors, names: tuple[str, ...]) -> Iterator[dict[str, np.ndarray]]:
    """Row by row along the first dimension: ``{name: array without that dimension}``."""
    with _faults_as_one_line(vectors.path), zipfile.ZipFile(vectors.path) as archive:
        members = {name: archive.open(f"{name}.npy") for name in names}
        headers = {name: _read_header(member) for name, member in members.items()}
        for _ in range(headers[names[0]][0][0]):
            yield {name: _read_block(member, headers[name][0][1:], headers[name][1]) for name, member in members.items()}


def write_arrays(path: Path, option: str, arrays: dict[str, object], compressed: bool = False) -> None:
    """An .npz, whole or not at all. DeviceTestError, which names the ``option`` that gave the path, where it cannot be written."""
    draft = path.with_name(path.name + ".draft")
    try:
        with draft.open("wb") as file:
            (np.savez_compressed if compressed else np.savez)(file, **arrays)
        os.replace(draft, path)
    except OSError as error:
        raise DeviceTestError(f"{path}: cannot be written ({error.strerror}); give another {option}") from error


def _open(path: Path, dimensions: dict[str, str]) -> Vectors:
    sizes: Sizes = {}
    with _faults_as_one_line(path), zipfile.ZipFile(path) as archive:
        for name, letters in dimensions.items():
            with archive.open(f"{name}.npy") as member:
                shape, dtype = _read_header(member)
                _require(len(shape) == len(letters), path, f"{name} has shape {shape}")
                kind = "f" if name.endswith(("logits", "logprob")) else "i"
                _require(dtype.kind == kind and min(shape, default=1) > 0, path, f"{name} is {dtype} of shape {shape}")
                for letter, length in zip(letters, shape):
                    known = sizes.setdefault(letter, length)
                    _require(known == length, path, f"{name} has shape {shape}, {letter} is {known} elsewhere")
        with archive.open("prompt_tokens.npy") as member:
            shape, dtype = _read_header(member)
            prompt_tokens = int(_read_block(member, shape, dtype))
    _require(0 < prompt_tokens < sizes["T"], path, f"a prompt of {prompt_tokens} in windows of {sizes['T']} tokens")
    return Vectors(path, sizes, prompt_tokens)


def _read_header(member: BinaryIO) -> tuple[tuple[int, ...], np.dtype]:
    """Shape and dtype of the .npy that ``member`` is at the start of."""
    version = np.lib.format.read_magic(member)
    reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = reader(member)
    if dtype.hasobject or (fortran and len(shape) > 1):
        raise ValueError("arrays must hold plain numbers in C order")
    return shape, dtype


def _read_block(member: BinaryIO, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    count = int(np.prod(shape, dtype=np.int64))
    block = member.read(count * dtype.itemsize)
    if len(block) != count * dtype.itemsize:
        raise EOFError("it ends too early")
    return np.frombuffer(block, dtype=dtype).reshape(shape)


def _require(condition: bool, path: Path, otherwise: str) -> None:
    if not condition:
        raise DeviceTestError(f"{path}: {otherwise}; these vectors were made for another model, or the file is damaged")


@contextmanager
def _faults_as_one_line(path: Path) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError as error:
        raise DeviceTestError(f"{path}: no such file; give the folder that holds the golden vectors") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, KeyError, ValueError, OSError, NotImplementedError) as error:
        raise DeviceTestError(f"{path}: damaged or not a vector file ({error}); copy it again") from error
