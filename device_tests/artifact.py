"""An artifact as its JSON sidecar describes it, with every byte checked before a runtime may open it."""

from __future__ import annotations

import hashlib
import json
from dataclasses import MISSING, dataclass, fields
from pathlib import Path, PurePath

from device_tests.errors import DeviceTestError

BLOCK_BYTES = 1 << 20


@dataclass(frozen=True)
class Interface:
    """The sizes that a host loop needs.

    ``prefill_tokens`` are the lengths of a TFLite file's calls for prompts, ascending, each N with a signature ``prefill_N``; None where
    prompts go in one call. ``resizable_cache``: the inputs ``k_*``, ``v_*`` and ``mask`` may be resized to fewer tokens than the context.
    """

    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    prefill_tokens: tuple[int, ...] | None
    bos_token_id: int | None
    eos_token_id: int | None
    resizable_cache: bool = False


@dataclass(frozen=True)
class Matrix:
    """A matrix of the prompt graph that is made of the decode graph's codes ``[outputs, blocks, block]``.

    ``offsets`` say where in the data file ``codes``, ``scales``, ``zeros`` and ``row_scale`` begin. Without a row scale the codes less
    their middle are the int8 numbers.
    """

    name: str
    inputs: int
    outputs: int
    blocks: int
    block: int
    bits: int
    offsets: dict[str, int]


@dataclass(frozen=True)
class Prompt:
    """The second graph of a hybrid ONNX artifact, for prompts: its file, the file of weights, and the matrices it has to be given."""

    path: Path
    data: Path
    weights: tuple[Matrix, ...]


@dataclass(frozen=True)
class Artifact:
    """One exported model: ``format`` is onnx or tflite, ``sha256`` that of its file, or of all its files' digests where it has several.

    ``cache_type`` is the element type of an ONNX artifact's keys and values, as the sidecar's tensors have it.
    """

    name: str
    format: str
    path: Path
    sha256: str
    bytes: int
    interface: Interface
    prompt: Prompt | None = None
    cache_type: str = "float32"


def read_artifact(sidecar: Path) -> Artifact:
    """Read the sidecar and check length and SHA-256 of every file it names.

    DeviceTestError names the file that is missing or differs. Reading also warms the page cache: load times are warm ones.
    """
    record = read_json(sidecar, "the artifact's JSON")
    try:
        named = [(str(file["path"]), str(file["sha256"]), int(file["bytes"])) for file in record["files"]]
        interface = _interface(record["interface"])
        name, form, main = str(record["name"]), str(record["format"]), str(record["file"])
    except (KeyError, TypeError, ValueError) as error:
        raise DeviceTestError(f"{sidecar}: no sidecar of an artifact ({error!r}); give the JSON beside the model file") from error
    sizes = [interface.vocab_size, interface.layers, interface.kv_heads, interface.head_dim, interface.context_tokens]
    sizes += interface.prefill_tokens or [0] if form == "tflite" else []
    if not all(isinstance(size, int) and size > 0 for size in sizes):
        raise DeviceTestError(f"{sidecar}: its interface has a size that is no positive number; export the artifact again")
    if main not in [path for path, _, _ in named]:
        raise DeviceTestError(f"{sidecar}: {main} is not among its files; export the artifact again")
    for path, sha256, size in named:
        _check_file(sidecar.parent, path, sha256, size)
    digests = [sha256 for _, sha256, _ in named]
    identity = digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()
    prompt = _prompt(record, sidecar, {path for path, _, _ in named})
    size = sum(size for _, _, size in named)
    return Artifact(name, form, sidecar.parent / main, identity, size, interface, prompt, _cache_type(record, sidecar))


def _interface(record: dict) -> Interface:
    """What a sidecar says of the sizes; fields that have a default may be missing."""
    known = {field.name: record[field.name] for field in fields(Interface) if field.default is MISSING or field.name in record}
    lengths = known["prefill_tokens"]
    return Interface(**{**known, "prefill_tokens": None if lengths is None else tuple(sorted(lengths))})


def read_json(path: Path, what: str) -> dict:
    """A JSON object from a file. DeviceTestError when it is missing or no JSON object."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DeviceTestError(f"{path}: cannot be read ({error.strerror}); give {what}") from error
    except ValueError as error:
        raise DeviceTestError(f"{path}: is not JSON ({error}); give {what}") from error
    if not isinstance(record, dict):
        raise DeviceTestError(f"{path}: holds no JSON object; give {what}")
    return record


def sha256_of(path: Path) -> str:
    """Hexadecimal SHA-256 of a file, read in blocks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(BLOCK_BYTES), b""):
            digest.update(block)
    return digest.hexdigest()


def _prompt(record: dict, sidecar: Path, files: set[str]) -> Prompt | None:
    if "prompt" not in record:
        return None
    try:
        prompt = record["prompt"]
        weights = tuple(Matrix(**weight) for weight in prompt["weights"])
        graph, data = str(prompt["file"]), str(prompt["data"])
    except (KeyError, TypeError) as error:
        raise DeviceTestError(f"{sidecar}: its prompt graph is not described ({error!r}); export the artifact again") from error
    if not {graph, data} <= files:
        raise DeviceTestError(f"{sidecar}: {graph} or {data} is not among its files; export the artifact again")
    return Prompt(sidecar.parent / graph, sidecar.parent / data, weights)


def _cache_type(record: dict, sidecar: Path) -> str:
    """Of an ONNX artifact's keys and values; TFLite files say it themselves."""
    tensors = record.get("tensors", {})
    listed = tensors.get("inputs", []) if record["format"] == "onnx" else []
    kinds = {str(tensor["dtype"]) for tensor in listed if str(tensor["name"]).startswith("past_key_values.")}
    if len(kinds) > 1:
        raise DeviceTestError(f"{sidecar}: its KV cache is {' and '.join(sorted(kinds))}; export the artifact again")
    return kinds.pop() if kinds else "float32"


def _check_file(folder: Path, name: str, sha256: str, size: int) -> None:
    if PurePath(name).name != name:
        raise DeviceTestError(f"{name}: an artifact's files lie beside its JSON; export the artifact again")
    path = folder / name
    try:
        found = path.stat().st_size
        digest = sha256_of(path) if found == size else ""
    except OSError as error:
        raise DeviceTestError(f"{path}: cannot be read ({error.strerror}); copy the artifact again") from error
    if found != size:
        raise DeviceTestError(f"{path}: {found} bytes, its JSON says {size}; copy the artifact again")
    if digest != sha256:
        raise DeviceTestError(f"{path}: SHA-256 {digest[:12]}… differs from its JSON ({sha256[:12]}…); copy the artifact again")
