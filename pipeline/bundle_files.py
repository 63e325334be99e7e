"""Copies what belongs in a bundle to its place: artifacts with their proof, tokenizer, golden vectors, program."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from models.errors import GateError
from models.provenance import sha256_of, write_json
from pipeline.bundle_onnx import write_tokenizer_config
from pipeline.manifest import UNLISTED, File, LeftOut, Prompt, Tokenizer
from pipeline.manifest import Artifact as ArtifactEntry
from pipeline.recipe import ROOT, Recipe
from pipeline.report import Artifact, Report, read_json, sidecar_path
from pipeline.stages import stages_of
from pipeline.variants import Choice

FOLDER_OF_FORMAT = {"onnx": "onnx", "tflite": "litert"}
ROLE_OF_FOLDER = {
    "onnx": "artifact",
    "litert": "artifact",
    "tokenizer": "tokenizer",
    "golden": "golden",
    "device_tests": "program",
    "android": "android",
    "python": "example",
}
ROLE_OF_FILE = {
    "recipe.toml": "recipe",
    "report.json": "report",
    "report.html": "report",
    "LICENSE": "licence",
    "NOTICE": "licence",
    "README.md": "documentation",
    "MODEL_CARD.md": "documentation",
    "sbom.cdx.json": "sbom",
    "onnx/genai_config.json": "runtime",
    "onnx/config.json": "runtime",
    "onnx/generation_config.json": "runtime",
    "onnx/required_operators.config": "runtime",
    "onnx/chat_template.jinja": "tokenizer",
}
TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_PARITY = "tokenizer.json", "tokenizer_config.json", "tokenizer_graph.json"
GRAPHS = ("tokenizer_encode.onnx", "tokenizer_decode.onnx")
CHAT_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class BundleOptions:
    """What a person may ask of a bundle: which artifacts (None: the best of each format), more forms of them, parts, a signature."""

    variants: tuple[str, ...] | None = None
    ort: bool = False
    litert_lm: bool = False
    split_mb: float | None = None
    key: Ed25519PrivateKey | None = None

    @property
    def part_bytes(self) -> int | None:
        return None if self.split_mb is None else max(1, round(self.split_mb * 1e6))


@dataclass(frozen=True)
class BundleInputs:
    """What a bundle is made of: stage names mapped to their results' folders, the report, and a key over all that made them."""

    recipe: Recipe
    folders: dict[str, Path]
    report: Report
    key: str
    options: BundleOptions = field(default_factory=BundleOptions)

    @property
    def name(self) -> str:
        return f"{self.recipe.name}-android-bundle"


def copy_artifacts(bundle: Path, inputs: BundleInputs, choice: Choice) -> list[ArtifactEntry]:
    """The chosen artifacts; the best of a format as ``model.onnx`` or ``model.tflite``, where others look for a model."""
    stages = stages_of(inputs.recipe.artifacts)
    return [copy_artifact(bundle, inputs, stage, choice) for stage, name in stages.items() if name in choice.taken]


def copy_artifact(bundle: Path, inputs: BundleInputs, stage: str, choice: Choice) -> ArtifactEntry:
    """Copy one artifact with its JSON; GateError unless the report has a passing result for these very bytes."""
    source = sidecar_path(inputs.folders, stage)
    sidecar = read_json(source)
    measured = proof_of(sidecar, inputs.report)
    target = bundle / FOLDER_OF_FORMAT[sidecar["format"]]
    target.mkdir(parents=True, exist_ok=True)
    recommended = sidecar["name"] in choice.best
    names = {file["path"]: file["path"] for file in sidecar["files"]}
    if recommended:
        names[sidecar["file"]] = f"model{Path(sidecar['file']).suffix}"
    for file in sidecar["files"]:
        copied = target / names[file["path"]]
        shutil.copyfile(source.parent / file["path"], copied)
        if sha256_of(copied) != file["sha256"]:
            raise GateError(f"{file['path']}: its bytes are not those that were measured; run `pocketlm test` again")
    files = [{**file, "path": names[file["path"]]} for file in sidecar["files"]]
    write_json(target / source.name, {**sidecar, "file": names[sidecar["file"]], "files": files})
    prompt = sidecar.get("prompt")
    return ArtifactEntry(
        name=sidecar["name"],
        format=sidecar["format"],
        recommended=recommended,
        file=f"{target.name}/{names[sidecar['file']]}",
        prompt_file=f"{target.name}/{prompt['file']}" if prompt else None,
        sidecar=f"{target.name}/{source.name}",
        files=[f"{target.name}/{file['path']}" for file in files],
        sha256=sidecar["sha256"],
        bytes=sidecar["bytes"],
        bytes_compressed=measured.bytes_compressed,
        why=choice.taken[sidecar["name"]],
        interface=sidecar["interface"],
        tensors=sidecar["tensors"],
        gates=getattr(inputs.recipe.gates, sidecar["name"]).model_dump(),
        quality=measured.quality,
        runtimes=[device.model_copy(update={"decode_ms": []}) for device in measured.devices],
    )


def left_out(choice: Choice) -> list[LeftOut]:
    return [LeftOut(name=name, why=why) for name, why in choice.left_out.items()]


def proof_of(sidecar: dict, report: Report) -> Artifact:
    """The report's entry that proves an artifact; GateError when there is none for its bytes."""
    for artifact in report.artifacts:
        if artifact.name == sidecar["name"] and artifact.sha256 == sidecar["sha256"] and artifact.passed:
            return artifact
    raise GateError(f"{sidecar['name']}: no passing measurement of these bytes; run `pocketlm test` and look at its report")


def copy_tokenizer(source: Path, bundle: Path, formats: set[str], template: Path) -> Tokenizer:
    """The tokenizer in ``tokenizer/`` and beside the models, where their runtimes look; the graphs only where they equal it.

    ``template`` is the file of a chat template, if there is one.
    """
    found = read_json(source / TOKENIZER_PARITY)
    home = bundle / "tokenizer"
    home.mkdir()
    for name in (TOKENIZER, TOKENIZER_CONFIG, TOKENIZER_PARITY):
        shutil.copyfile(source / name, home / name)
    for form in formats:
        shutil.copyfile(source / TOKENIZER, bundle / FOLDER_OF_FORMAT[form] / TOKENIZER)
    graphs = home
    if "onnx" in formats:
        graphs = bundle / FOLDER_OF_FORMAT["onnx"]
        proved_class = found.get("tokenizer_class") if found["parity"] else None
        write_tokenizer_config(source / TOKENIZER_CONFIG, graphs / TOKENIZER_CONFIG, proved_class)
        if template.is_file():
            shutil.copyfile(template, graphs / CHAT_TEMPLATE)
    for name in GRAPHS if found["parity"] else ():
        shutil.copyfile(source / name, graphs / name)
    encode, decode = (f"{graphs.name}/{graph}" if found["parity"] else None for graph in GRAPHS)
    reason, limits = found["reason"], found["limits"]
    return Tokenizer(file=f"tokenizer/{TOKENIZER}", encode_graph=encode, decode_graph=decode, reason=reason, limits=limits)


def prompt_of(tokenizer_config: Path, file: Path) -> Prompt:
    """The chat template that the tokenizer brings, in its configuration or as ``file``; plain text without one."""
    template = read_json(tokenizer_config).get("chat_template")
    if isinstance(template, list):  # several by name: the one called default is what tokenizers take
        template = next((each["template"] for each in template if each.get("name") == "default"), None)
    if template is None and file.is_file():
        template = file.read_text(encoding="utf-8")
    return Prompt(format="chat" if template else "plain text", chat_template=template)


def copy_golden(source: Path, target: Path, recipe: Recipe, names: list[str]) -> None:
    """The golden vectors and the gates of the artifacts ``names``. The evaluation vectors stay: they are many times larger."""
    target.mkdir(parents=True)
    for name in ("golden.npz", "golden.json"):
        shutil.copyfile(source / name, target / name)
    for name, gate in recipe.gates.model_dump(include=set(names)).items():
        write_json(target / f"{name}.gates.json", gate)


def copy_program(target: Path) -> None:
    """The program that replays the golden vectors: a package that needs numpy and one runtime, with its licence."""
    target.mkdir(parents=True)
    for path in sorted((ROOT / "device_tests").glob("*.py")):
        shutil.copyfile(path, target / path.name)
    shutil.copyfile(ROOT / "LICENSE", target / "LICENSE")


def described(bundle: Path, listed: list[File]) -> list[File]:
    """Every file under the bundle, by path, with its hash. Those that are ``listed`` already are not read again: none is rewritten."""
    known = {file.path: file for file in listed}
    files = []
    for name in sorted(path.relative_to(bundle).as_posix() for path in bundle.rglob("*") if path.is_file()):
        if name not in UNLISTED:
            path = bundle / name
            files.append(known.get(name) or File(path=name, sha256=sha256_of(path), bytes=path.stat().st_size, role=role_of(name)))
    return files


def role_of(name: str) -> str:
    """What a file is there for, by its path."""
    folder, _, file = name.rpartition("/")
    if folder in FOLDER_OF_FORMAT.values() and file.startswith("tokenizer"):
        return "tokenizer"
    return ROLE_OF_FILE.get(name) or ROLE_OF_FOLDER[name.split("/")[0]]
