"""``manifest.json``: what is in a bundle. The models below are its schema; ``SHA256SUMS`` covers the manifest itself."""

from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.report import Device, Quality

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"  # in the form of `sha256sum -c`, of every file and of the manifest
Role = Literal["artifact", "tokenizer", "golden", "program", "recipe", "report", "licence", "documentation"]


class Entry(BaseModel):
    """Part of a manifest: frozen, and an unknown key is a fault."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class File(Entry):
    """One file; ``path`` is relative to the bundle's folder, with forward slashes."""

    path: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    bytes: int = Field(ge=0)
    role: Role

    @field_validator("path")
    @classmethod
    def stays_inside(cls, path: str) -> str:
        """Only plain relative paths: anything else could write outside the folder that it is unpacked into."""
        parts = PurePosixPath(path).parts
        plain = bool(parts) and not path.startswith("/") and "/".join(parts) == path
        if not plain or ".." in parts or any(bad in path for bad in ("\\", ":", "\0")):
            raise ValueError(f"{path!r} is no plain path inside the bundle")
        return path


class Interface(Entry):
    """The sizes that a host loop needs; ``prefill_tokens`` null: prompts of any length in one call."""

    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    prefill_tokens: int | None
    bos_token_id: int | None
    eos_token_id: int | None


class Artifact(Entry):
    """One exported model: how to call it, where it was proved, and within which limits."""

    name: str
    format: Literal["onnx", "tflite"]
    file: str = Field(description="path of the model file in the bundle")
    sidecar: str = Field(description="path of the JSON beside it, which device_tests reads")
    sha256: str
    bytes: int
    interface: Interface
    tensors: dict = Field(description="names, types and shapes of inputs and outputs; for TFLite by signature")
    gates: dict[str, float | None]
    quality: Quality | None
    runtimes: list[Device] = Field(description="every runtime that it passed in, with its version and what was measured")


class Tokenizer(Entry):
    """How text becomes ids. ``encode_graph`` and ``decode_graph`` are null where parity failed; ``reason`` says why."""

    file: str
    encode_graph: str | None
    decode_graph: str | None
    reason: str | None
    limits: list[str]


class Provenance(Entry):
    """What the bundle was made from."""

    source: str
    commit: str | None
    checkpoint_sha256: list[str]
    recipe_sha256: str
    build_key: str = Field(description="changes with any stage result, gate, or code that measures and writes")
    versions: dict[str, str]


class Manifest(Entry):
    """The whole manifest."""

    format_version: Literal[1] = FORMAT_VERSION
    name: str
    licence: str
    prompt_format: Literal["plain text"] = "plain text"
    context_tokens: int = Field(description="the smallest context of the artifacts")
    artifacts: list[Artifact]
    tokenizer: Tokenizer
    provenance: Provenance
    files: list[File] = Field(description="every file but the manifest and SHA256SUMS, by path")


def manifest_json(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=1) + "\n"


def sums(manifest: Manifest, manifest_sha256: str) -> str:
    """The text of ``SHA256SUMS``."""
    digests = {file.path: file.sha256 for file in manifest.files} | {MANIFEST: manifest_sha256}
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items()))
