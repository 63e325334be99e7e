"""README.md of a bundle, for the mobile developer: what the model costs and how to call it, with this bundle's own numbers."""

import json
import re

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.manifest import Artifact, Manifest
from pipeline.report import Report, report_json
from pipeline.report_html import TEMPLATES

OTHER_TENSORS = ("tflite_full_int8",)  # its inputs, outputs and cache are int8: the examples feed floats


def readme(manifest: Manifest, report: Report) -> str:
    """README.md for whoever puts the bundle into an app; its numbers come from the report."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(first_layer=first_layer, shown=shown, percent=percent, agreements=agreements)
    return environment.get_template("bundle_readme.md.j2").render(
        manifest=manifest,
        report=json.loads(report_json(report)),
        formats={entry.format for entry in manifest.artifacts},
        onnx=recommended(manifest, "onnx"),
        tflite=recommended(manifest, "tflite"),
    )


def recommended(manifest: Manifest, form: str) -> Artifact | None:
    """The file that the examples open: static int8 if it is there, else the smallest that takes floats; None without one."""
    fitting = [entry for entry in manifest.artifacts if entry.format == form and entry.name not in OTHER_TENSORS]
    return min(fitting, key=lambda entry: (not entry.name.endswith("static_int8"), entry.bytes), default=None)


def agreements(report: dict) -> dict[str, float]:
    """By device that is not the one that built: the smallest share of equal first choices over all that ran there."""
    found: dict[str, float] = {}
    for artifact in report["artifacts"]:
        for device in artifact["devices"]:
            if device["against_local"]:
                name = f"{device['device']} ({device['isa']}{', emulated' if device['emulated'] else ''})"
                found[name] = min(found.get(name, 1.0), device["against_local"]["top1"])
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
