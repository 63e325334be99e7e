"""What decides a stage's key: settings, the code that runs, library versions, the content it reads, its inputs' keys.

Comments and docstrings are no part of it: code is hashed as its syntax tree. Settings modules are left out, because the
settings' values are in the key by themselves.
"""

import ast
import hashlib
import json
from functools import cache
from importlib import metadata
from pathlib import Path

from models.errors import UserError
from models.hub import resolve_commit
from models.provenance import sha256_of
from models.settings import StageSettings
from pipeline.stages import Stage

ROOT = Path(__file__).resolve().parent.parent
OURS = ("models", "pipeline", "exporters", "device_tests")
# They decide what is drawn or said, or hold values that the key has already: never what is computed.
NOT_CODE = ("models.settings", "pipeline.settings", "exporters.settings", "models.progress", "models.errors")


def tree_sha256(path: Path) -> str:
    """Hex SHA-256 over the names and contents of a folder's own files, or of one file."""
    if path.is_file():
        return sha256_of(path)
    files = sorted(item for item in path.iterdir() if item.is_file())
    return text_sha256(json.dumps([[item.name, sha256_of(item)] for item in files]))


def text_sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def module_file(module: str) -> Path | None:
    """The file of one of our modules, or None when ``module`` is not ours or names something inside a module."""
    if module.split(".")[0] not in OURS:
        return None
    path = ROOT.joinpath(*module.split("."))
    candidates = (path.with_suffix(".py"), path / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


@cache
def parsed(module: str) -> tuple[str, tuple[str, ...]]:
    """Hash of a module's syntax tree without docstrings, and the names that it imports."""
    tree = ast.parse(module_file(module).read_text(encoding="utf-8"))
    imported = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imported += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            imported += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        body = getattr(node, "body", None)
        if isinstance(body, list) and body and isinstance(body[0], ast.Expr) and isinstance(body[0].value, ast.Constant):
            body[0].value.value = None
    return text_sha256(ast.dump(tree)), tuple(imported)


@cache
def code_of(module: str) -> tuple[dict[str, str], frozenset[str]]:
    """The modules of ours that ``module`` runs on, each with its hash, and the top-level names of foreign imports."""
    hashes, foreign, waiting = {}, set(), [module]
    while waiting:
        name = waiting.pop()
        if name in hashes or name in NOT_CODE:
            continue
        if not module_file(name):
            raise FileNotFoundError(f"{module} needs {name}, which is no module of this repository")
        hashes[name], imported = parsed(name)
        for target in imported:
            if module_file(target):
                waiting.append(target)
            elif target.split(".")[0] not in OURS:
                foreign.add(target.split(".")[0])
    return dict(sorted(hashes.items())), frozenset(foreign)


@cache
def distributions() -> dict[str, list[str]]:
    return metadata.packages_distributions()


def library_versions(foreign: frozenset[str]) -> dict[str, str]:
    """Version of every installed distribution behind the given import names; the standard library has none."""
    names = sorted({name for top in foreign for name in distributions().get(top, ())})
    return {name: metadata.version(name) for name in names}


def content_of(stage: Stage, settings: StageSettings) -> dict[str, str | None]:
    """Hash of what each path among the settings points to; a hub id stands for its resolved commit."""
    found = {}
    for name in stage.content:
        value = getattr(settings, name)
        if value is None:
            found[name] = None
        elif Path(value).exists():
            found[name] = tree_sha256(Path(value))
        elif name == "source":
            found[name] = resolve_commit(value, settings.revision)
        else:
            raise UserError(f"{stage.name}.{name}: no file {value}; give the path of a UTF-8 text file")
    return found


def parts_of(stage: Stage, settings: StageSettings, input_keys: dict[str, str]) -> dict:
    """Everything that a stage's result depends on, as plain data: hashed it is the key, compared it tells why a key changed."""
    code, foreign = code_of(stage.module)
    values = settings.model_dump(mode="json", exclude=set(stage.content))
    return {
        "settings": values,
        "code": code,
        "libraries": library_versions(foreign),
        "content": content_of(stage, settings),
        "inputs": input_keys,
    }


def key_of(stage: Stage, parts: dict) -> str:
    """The name of a stage's result: 16 hex digits of SHA-256."""
    return text_sha256(json.dumps([stage.name, parts], sort_keys=True))[:16]


def difference(before: dict, after: dict) -> list[str]:
    """What changed between two sets of parts, one phrase each, such as ``settings.sparsity: 0.5 -> 0.7``."""
    phrases = []
    for part in after:
        old, new = before.get(part, {}), after[part]
        for name in sorted(old.keys() | new.keys()):
            if old.get(name) == new.get(name):
                continue
            if part in ("settings", "libraries"):
                phrases.append(f"{part}.{name}: {old.get(name)} -> {new.get(name)}")
            else:
                phrases.append(f"{part} {name} changed")
    return phrases
