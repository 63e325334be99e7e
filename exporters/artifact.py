"""The JSON beside every exported model file: what it is, what it came from, what was measured. Shared by ONNX and TFLite.

A sidecar states facts of the files that lie beside it (sha256, bytes), so it is written last, and by nobody else.
"""

import hashlib
import json
from pathlib import Path

from exporters.bytes_read import bytes_read_per_token
from models.provenance import library_versions, settings_record, sha256_of, write_json
from models.settings import StageSettings


def checkpoint_sha256(folder: Path) -> str:
    """Identity of a Hugging Face folder's weights: the file's SHA-256, or for shards that of their digests in name order."""
    return combined_sha256([sha256_of(shard) for shard in sorted(folder.glob("*.safetensors"))])


def combined_sha256(digests: list[str]) -> str:
    """One digest of several files: that of a single one is its own, else the SHA-256 of theirs one after the other.

    A graph whose weights lie in another file does not say by its own bytes which model it is.
    """
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def read_sidecar(path: Path) -> dict:
    """The sidecar as written by ``write_sidecar``."""
    return json.loads(path.read_text(encoding="utf-8"))


def write_sidecar(
    out: Path,
    name: str,
    format: str,
    *,
    files: list[Path],
    interface: dict,
    tensors: dict,
    parent: str,
    settings: StageSettings,
    measured: dict,
    libraries: tuple[str, ...],
    runtimes: tuple[str, ...] | None = None,
    prompt: dict | None = None,
) -> dict:
    """Write ``out/<name>.json`` and return what it holds.

    ``files`` are the artifact's files, model file first, all in ``out``; ``parent`` is the SHA-256 of what it was made from;
    ``libraries`` are the distributions whose versions matter to the bytes; ``runtimes`` are those in which the file was proved
    right, None for every runtime of its format; ``prompt`` is the second graph of a hybrid (`exporters.onnx_hybrid`).
    No times, hosts or paths: same inputs, same bytes.
    """
    described = [{"path": path.name, "sha256": sha256_of(path), "bytes": path.stat().st_size} for path in files]
    sidecar = {
        "name": name,
        "format": format,
        "file": described[0]["path"],
        "files": described,
        "sha256": combined_sha256([file["sha256"] for file in described]),
        "bytes": sum(file["bytes"] for file in described),
        "bytes_read_per_token": bytes_read_per_token(files[0], format),
        **({"runtimes": list(runtimes)} if runtimes is not None else {}),
        **({"prompt": prompt} if prompt is not None else {}),
        "interface": interface,
        "tensors": tensors,
        "parent": parent,
        "settings": settings_record(settings),
        "versions": library_versions(*libraries),
        "measured": measured,
    }
    write_json(out / f"{name}.json", sidecar)
    return sidecar
