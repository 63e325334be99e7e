"""``manifest.json``: what is in a bundle. The models below are its schema; ``SHA256SUMS`` covers the manifest itself.

``SHA256SUMS.sig``, if it is there, signs the sums, and so everything.
"""

from pathlib import PurePosixPath
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from pipeline.report import Device, Quality

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
SUMS = "SHA256SUMS"  # in the form of `sha256sum -c`, of every file and of the manifest
SIGNATURE = "SHA256SUMS.sig"  # of the sums: 64 bytes of Ed25519 (RFC 8032)
UNLISTED = (MANIFEST, SUMS, SIGNATURE)
Role = Literal[
    "artifact", "runtime", "tokenizer", "golden", "program", "android", "example", "recipe", "report", "licence", "sbom", "documentation"
]  # fmt: skip


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
        if not (plain and path.isprintable()) or ".." in parts or path in UNLISTED or "\\" in path or ":" in path:
            raise ValueError(f"{path!r} is no plain path inside the bundle")
        return path


class Interface(Entry):
    """The sizes that a host loop needs; ``prefill_tokens``, the tokens of one call for a prompt, or several such: null is any length."""

    vocab_size: int
    layers: int
    kv_heads: int
    head_dim: int
    context_tokens: int
    prefill_tokens: int | list[int] | None
    bos_token_id: int | None
    eos_token_id: int | None
    resizable_cache: bool = Field(False, description="TFLite: k_*, v_* and mask may be resized to fewer tokens than the context")


class Artifact(Entry):
    """One exported model: how to call it, where it was proved, and within which limits."""

    name: str
    format: Literal["onnx", "tflite"]
    recommended: bool = Field(description="the one of its format to take; its file is called model.onnx or model.tflite")
    file: str = Field(description="path of the model file in the bundle")
    prompt_file: str | None = Field(None, description="a hybrid's second graph, for prompts; file is whole without it")
    sidecar: str = Field(description="path of the JSON beside it, which device_tests reads")
    files: list[str] = Field(description="paths of all that belongs to the model: file, prompt_file, and weights that lie apart")
    ort_file: str | None = Field(None, description="file in ORT format, Fixed style, for ONNX Runtime's minimal builds")
    litert_lm_file: str | None = Field(None, description="file for LiteRT-LM with the same weights and the tokenizer")
    sha256: str = Field(description="of the one file, or of the digests of files one after the other")
    bytes: int = Field(description="of files")
    bytes_compressed: int = Field(description="of files, deflated: what they add to a download")
    why: str = Field(description="why this artifact is in the bundle")
    interface: Interface
    tensors: dict = Field(description="names, types and shapes of inputs and outputs; for TFLite by signature")
    gates: dict[str, float | None]
    quality: Quality | None
    runtimes: list[Device] = Field(description="every runtime that it passed in, with its version and what was measured")


class LeftOut(Entry):
    """An artifact that passed too and is not in the bundle; the report has its numbers."""

    name: str
    why: str


class OtherRuntime(Entry):
    """A program of others and whether it opens a part of this bundle unchanged."""

    name: str
    opens: str | None = Field(description="the folder or file that it is given; null where it cannot")
    note: str | None = Field(description="why it cannot, or what to know")


class Prompt(Entry):
    """How text is put before the model: as it is, or through the template that its tokenizer brings."""

    format: Literal["plain text", "chat"]
    chat_template: str | None = Field(description="Jinja template over messages, as Hugging Face's tokenizers have it")


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
    variants: list[str] | None = Field(description="the artifacts that were asked for; null: the best of each format")
    versions: dict[str, str]


class Manifest(Entry):
    """The whole manifest."""

    format_version: Literal[2] = FORMAT_VERSION
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,63}$")
    licence: str
    prompt: Prompt
    context_tokens: int = Field(description="the smallest context of the artifacts")
    parameters: int = Field(description="of the exported model; a tied head is counted once")
    fp32_bytes: int = Field(description="its parameters in 4 bytes each: what the download is held against")
    artifacts: list[Artifact] = Field(min_length=1)
    left_out: list[LeftOut]
    tokenizer: Tokenizer
    other_runtimes: list[OtherRuntime]
    signer: str | None = Field(description="SHA-256 of the public key (DER) whose signature SHA256SUMS.sig is; null: not signed")
    provenance: Provenance
    files: list[File] = Field(description="every file but the manifest, SHA256SUMS and its signature, by path")

    @field_validator("files")
    @classmethod
    def each_once(cls, files: list[File]) -> list[File]:
        """No path twice, nor two that are one file where case does not count."""
        seen: dict[str, str] = {}
        for file in files:
            if former := seen.get(file.path.casefold()):
                raise ValueError(f"{file.path!r} and {former!r} are one file on some systems")
            seen[file.path.casefold()] = file.path
        return files


def manifest_json(manifest: Manifest) -> str:
    return manifest.model_dump_json(indent=1) + "\n"


def sums(manifest: Manifest, manifest_sha256: str) -> str:
    """The text of ``SHA256SUMS``."""
    digests = {file.path: file.sha256 for file in manifest.files} | {MANIFEST: manifest_sha256}
    return "".join(f"{digest}  {path}\n" for path, digest in sorted(digests.items()))
