"""README.md of a bundle, for the mobile developer: what the model costs and how to call it, with this bundle's own numbers."""

import json
import re

from pipeline.manifest import Artifact, Manifest
from pipeline.rendering import environment
from pipeline.report import Report, report_json
from pipeline.variants import OTHER_TENSORS


def readme(manifest: Manifest, report: Report) -> str:
    """README.md for whoever puts the bundle into an app; its numbers come from the report, its files from the manifest."""
    templates = environment()
    templates.globals.update(first_layer=first_layer, shown=shown, percent=percent, agreements=agreements)
    templates.globals.update(signatures=signatures, shown_signatures=shown_signatures)
    files = {file.path: file for file in manifest.files}
    opened = {other.name for other in manifest.other_runtimes if other.opens}
    return templates.get_template("bundle_readme.md.j2").render(
        manifest=manifest,
        report=json.loads(report_json(report)),
        has=files.__contains__,
        opens=opened.__contains__,
        tokenizer_bytes=files[manifest.tokenizer.file].bytes,
        examples=sorted(path for path, file in files.items() if file.role == "example" and path.endswith(".py")),
        onnx=recommended(manifest, "onnx"),
        tflite=recommended(manifest, "tflite"),
        other_tensors=OTHER_TENSORS,
    )


def recommended(manifest: Manifest, form: str) -> Artifact | None:
    """The file of a format to begin with, or None where the bundle has no such file."""
    return next((entry for entry in manifest.artifacts if entry.format == form and entry.recommended), None)


def signatures(artifact: Artifact) -> dict[str, int]:
    """Tokens of one call of each signature of a TFLite file, fewest first."""
    tokens = {name: [tensor for tensor in sides["inputs"] if tensor["name"] == "tokens"] for name, sides in artifact.tensors.items()}
    sizes = {name: found[0]["shape"][-1] for name, found in tokens.items() if found}
    return dict(sorted(sizes.items(), key=lambda entry: entry[1]))


def shown_signatures(artifact: Artifact) -> list[str]:
    """The signature for single tokens, and one of those for prompts: the others differ in one size."""
    return list(signatures(artifact))[:2]


def agreements(manifest: Manifest) -> dict[str, float]:
    """By device that is not the one that built: the smallest share of equal first choices over all files here that ran there."""
    found: dict[str, float] = {}
    for artifact in manifest.artifacts:
        for device in artifact.runtimes:
            if device.against_local:
                name = f"{device.device} ({device.isa}{', emulated' if device.emulated else ''})"
                found[name] = min(found.get(name, 1.0), device.against_local.top1)
    return found


def first_layer(tensors: list[dict]) -> list[dict]:
    """The tensors without those of layers above 0, whose number stands between dots or at the end of the name."""
    return [tensor for tensor in tensors if not re.search(r"[._][1-9]\d*(\.|$)", tensor["name"])]


def percent(share: float | None, form: str) -> str:
    """A share of one as a percentage."""
    return shown(None if share is None else 100 * share, f"{form} %%")


def shown(value: float | None, form: str) -> str:
    """A number as text, or a dash where none was measured."""
    return "\u2013" if value is None else form % value
