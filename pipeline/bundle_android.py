"""The bundle's ``android/`` folder: a Gradle project with the Kotlin library, the model as an AI pack for Play, and a sample screen.

No model is copied there: the project links the one that ``gradle.properties`` names from ``../onnx`` or ``../litert``.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

from pipeline import rendering
from pipeline.compressed import deflated_bytes
from pipeline.manifest import MANIFEST, Artifact, Manifest
from pipeline.rendering import environment
from pipeline.report import Report
from pipeline.text_rules import UnsupportedTokenizer, text_rules_json
from pipeline.variants import OTHER_TENSORS, Cost, cost_of

TEMPLATES = rendering.TEMPLATES / "android"
VALUES = ".j2"  # ends the name of a template that values go into
TEXT_RULES = "tokenizer/text_rules.json"
KOTLIN = "2.2.21"  # of the project's compiler; the tests compile with the same one
MIN_SDK = 24  # Android 7.0: the lowest that onnxruntime-android takes; LiteRT takes 23
# One AI or asset pack, as Play compresses it; from Google Play's table of size limits (answer 9859372 of its help)
PACK_LIMIT_BYTES = 1_500_000_000
# The runtime of an artifact's format that Android has a library of, and the source set that drives it
RUNTIME = {"onnx": ("onnxruntime", "onnx"), "tflite": ("litert", "litert")}


@dataclass(frozen=True)
class Model:
    """An artifact that the library can open: paths of all that goes into the app, and what that adds to the download, in bytes."""

    artifact: Artifact
    runtime_version: str
    files: tuple[str, ...]
    download_bytes: int
    cost: Cost

    @property
    def source_set(self) -> str:
        return RUNTIME[self.artifact.format][1]

    @property
    def too_large(self) -> str | None:
        """Why Play takes no pack with it, or None."""
        if self.download_bytes <= PACK_LIMIT_BYTES:
            return None
        size = f"{self.download_bytes / 1e9:.2f} GB compressed"
        return f"{self.artifact.name} is {size}; Play takes packs of {PACK_LIMIT_BYTES / 1e9} GB: let the app download it"


def write_android(bundle: Path, manifest: Manifest, report: Report) -> None:
    """Write ``bundle/android``, and ``tokenizer/text_rules.json`` where the Kotlin tokenizer knows the tokenizer.

    Nothing is written where the bundle holds no artifact that the library can open.
    """
    reason = write_text_rules(bundle, manifest)
    models = models_of(bundle, manifest, report)
    if not models:
        return
    default = default_of(models)
    values = {
        "project": f"{manifest.name}-android",
        "title": manifest.name,
        "default": default.artifact.name,
        "choices": [model.artifact.name for model in models],
        "pack": default.too_large is None,
        "min_sdk": MIN_SDK,
        "kotlin": KOTLIN,
        "versions": {model.source_set: model.runtime_version for model in models},
        "models": models,
        "manifest": manifest,
        "no_tokenizer": reason,
        "pack_limit_gb": PACK_LIMIT_BYTES / 1e9,
    }
    unused = {"onnx", "litert"} - {model.source_set for model in models} | (set() if values["pack"] else {"model"})
    render(TEMPLATES, bundle / "android", values, unused)
    (bundle / "android" / "artifacts.properties").write_text(properties(models), encoding="utf-8")


def write_text_rules(bundle: Path, manifest: Manifest) -> str | None:
    """Write ``tokenizer/text_rules.json``; where the tokenizer is of another kind, say why there is none."""
    try:
        text = text_rules_json((bundle / manifest.tokenizer.file).read_text(encoding="utf-8"))
    except UnsupportedTokenizer as error:
        return str(error)
    (bundle / TEXT_RULES).write_text(text, encoding="utf-8")
    return None


def models_of(bundle: Path, manifest: Manifest, report: Report) -> list[Model]:
    """Every artifact that the library can open: float tensors, proved in a runtime that Android has a library of."""
    measured = {artifact.name: artifact for artifact in report.artifacts}
    common = [MANIFEST, manifest.tokenizer.file, *([TEXT_RULES] if (bundle / TEXT_RULES).is_file() else [])]
    packed = sum(deflated_bytes(bundle / path) for path in common if (bundle / path).is_file())  # the manifest is written last
    found = []
    for artifact in manifest.artifacts:
        runtime, _ = RUNTIME[artifact.format]
        version = next((device.runtime_version for device in artifact.runtimes if device.runtime == runtime), None)
        if artifact.name in OTHER_TENSORS or version is None:
            continue
        files = (*common, artifact.sidecar, *artifact.files)
        size = packed + artifact.bytes_compressed
        found.append(Model(artifact, version, files, size, cost_of(measured[artifact.name])))
    return found


def default_of(models: list[Model]) -> Model:
    """The one to begin with: among those that Play takes as a pack, a recommended one, of the smallest answer time times download."""
    return min(models, key=lambda model: (model.too_large is not None, not model.artifact.recommended, model.cost.product))


def properties(models: list[Model]) -> str:
    """``artifacts.properties``: for each model the runtime and the files, for the Gradle scripts."""
    lines = ["artifacts=" + ", ".join(model.artifact.name for model in models)]
    for model in models:
        name = model.artifact.name
        lines += [f"{name}.runtime={model.source_set}", f"{name}.files={','.join(model.files)}"]
        lines += [f"{name}.too_large={model.too_large}"] if model.too_large else []
    return "\n".join(lines) + "\n"


def render(templates: Path, target: Path, values: dict, unused: set[str]) -> None:
    """Copy the tree but for the folders called as in ``unused``, filling in the templates."""
    filled = environment(templates, keep_trailing_newline=True)
    for source in sorted(path for path in templates.rglob("*") if path.is_file()):
        name = source.relative_to(templates).as_posix()
        if unused.intersection(name.split("/")[:-1]):
            continue
        place = target / name.removesuffix(VALUES)
        place.parent.mkdir(parents=True, exist_ok=True)
        if name.endswith(VALUES):
            place.write_text(filled.get_template(name).render(values), encoding="utf-8")
        else:
            shutil.copyfile(source, place)
