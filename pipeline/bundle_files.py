"""Copies what belongs in a bundle to its place: artifacts with their proof, tokenizer, golden vectors, program, licence."""

import shutil
from dataclasses import dataclass
from pathlib import Path

from models.errors import GateError
from models.provenance import sha256_of, write_json
from pipeline.manifest import Artifact as ArtifactEntry
from pipeline.manifest import File, Tokenizer
from pipeline.recipe import ROOT, Recipe
from pipeline.report import Artifact, Report, read_json, sidecar_path

FOLDER_OF_FORMAT = {"onnx": "onnx", "tflite": "litert"}
ROLE_OF_FOLDER = {
    "onnx": "artifact",
    "litert": "artifact",
    "tokenizer": "tokenizer",
    "golden": "golden",
    "device_tests": "program",
}
ROLE_OF_FILE = {
    "recipe.toml": "recipe",
    "report.json": "report",
    "report.html": "report",
    "LICENSE": "licence",
    "README.md": "documentation",
}
GRAPHS = ("tokenizer_encode.onnx", "tokenizer_decode.onnx")
LICENCE_PATTERNS = ("LICENSE*", "LICENCE*", "COPYING*", "NOTICE*")


@dataclass(frozen=True)
class BundleInputs:
    """What a bundle is made of: stage names mapped to their results' folders, the report, and a key over all that made them."""

    recipe: Recipe
    folders: dict[str, Path]
    report: Report
    key: str

    @property
    def name(self) -> str:
        return f"{self.recipe.name}-android-bundle"


def copy_artifact(bundle: Path, inputs: BundleInputs, stage: str) -> ArtifactEntry:
    """Copy one artifact with its JSON; GateError unless the report has a passing result for these very bytes."""
    source = sidecar_path(inputs.folders, stage)
    sidecar = read_json(source)
    measured = proof_of(sidecar, inputs.report)
    target = bundle / FOLDER_OF_FORMAT[sidecar["format"]]
    for file in sidecar["files"]:
        shutil.copyfile(source.parent / file["path"], target / file["path"])
        if sha256_of(target / file["path"]) != file["sha256"]:
            raise GateError(f"{file['path']}: its bytes are not those that were measured; run `pocketlm test` again")
    shutil.copyfile(source, target / source.name)
    if (source.parent / "genai_config.json").is_file():
        shutil.copyfile(source.parent / "genai_config.json", target / "genai_config.json")
    return ArtifactEntry(
        name=sidecar["name"],
        format=sidecar["format"],
        file=f"{target.name}/{sidecar['file']}",
        sidecar=f"{target.name}/{source.name}",
        sha256=sidecar["sha256"],
        bytes=sidecar["bytes"],
        interface=sidecar["interface"],
        tensors=sidecar["tensors"],
        gates=getattr(inputs.recipe.gates, sidecar["name"]).model_dump(),
        quality=measured.quality,
        runtimes=[device.model_copy(update={"decode_ms": []}) for device in measured.devices],
    )


def proof_of(sidecar: dict, report: Report) -> Artifact:
    """The report's entry that proves an artifact; GateError when there is none for its bytes."""
    for artifact in report.artifacts:
        if artifact.name == sidecar["name"] and artifact.sha256 == sidecar["sha256"] and artifact.passed:
            return artifact
    raise GateError(f"{sidecar['name']}: no passing measurement of these bytes; run `pocketlm test` and look at its report")


def copy_tokenizer(source: Path, target: Path) -> Tokenizer:
    """The tokenizer's files; the graphs only where they equal it."""
    found = read_json(source / "tokenizer_graph.json")
    names = ["tokenizer.json", "tokenizer_config.json", "tokenizer_graph.json", *(GRAPHS if found["parity"] else ())]
    for name in names:
        shutil.copyfile(source / name, target / name)
    encode, decode = (f"tokenizer/{graph}" if found["parity"] else None for graph in GRAPHS)
    return Tokenizer(
        file="tokenizer/tokenizer.json", encode_graph=encode, decode_graph=decode, reason=found["reason"], limits=found["limits"]
    )


def copy_golden(source: Path, target: Path, recipe: Recipe) -> None:
    """The golden vectors and each artifact's gates. The evaluation vectors stay: they are many times larger."""
    for name in ("golden.npz", "golden.json"):
        shutil.copyfile(source / name, target / name)
    for name, gate in recipe.gates.model_dump(include=set(recipe.artifacts)).items():
        write_json(target / f"{name}.gates.json", gate)


def copy_program(target: Path) -> None:
    """The program that replays the golden vectors: a package that needs numpy and one runtime."""
    for path in sorted((ROOT / "device_tests").glob("*.py")):
        shutil.copyfile(path, target / path.name)


def write_licence(checkpoint: Path, target: Path, stated: str | None) -> str:
    """The model's licence texts as one file; where it has none, what is known of it. Returns its name or ``unknown``."""
    texts = sorted({path for pattern in LICENCE_PATTERNS for path in checkpoint.glob(pattern) if path.is_file()})
    if texts:
        target.write_bytes(b"\n".join(path.read_bytes().rstrip() + b"\n" for path in texts))
    elif stated:
        text = f"The model's card states the licence {stated}; the checkpoint came without its text.\n"
        target.write_text(text, encoding="utf-8")
    else:
        target.write_text("The licence of this model is unknown: ask whoever made it before you ship it.\n", encoding="utf-8")
    return stated or ("see LICENSE" if texts else "unknown")


def described(bundle: Path) -> list[File]:
    """Every file under the bundle, by path, with its hash."""
    files = []
    for path in sorted(path for path in bundle.rglob("*") if path.is_file()):
        name = path.relative_to(bundle).as_posix()
        role = ROLE_OF_FILE.get(name) or ROLE_OF_FOLDER[name.split("/")[0]]
        files.append(File(path=name, sha256=sha256_of(path), bytes=path.stat().st_size, role=role))
    return files
