"""What every stage's JSON says besides its measurements: settings, library versions, hashes. Never a path of this machine."""

import hashlib
import importlib.metadata
import json
from pathlib import Path, PurePath

from models.settings import StageSettings


def sha256_of(path: Path) -> str:
    """Hex digest of a file's bytes, read in blocks so that memory does not grow with the file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def settings_record(settings: StageSettings) -> dict:
    """The settings as JSON values; of a path only the file's name is kept."""
    return {key: value.name if isinstance(value, PurePath) else value for key, value in settings.model_dump().items()}


def library_versions(*libraries: str) -> dict[str, str]:
    """Installed versions by distribution name."""
    return {library: importlib.metadata.version(library) for library in libraries}


def write_json(path: Path, record: dict) -> None:
    """Indented, in the order given, ending in a newline: the same record gives the same bytes."""
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
