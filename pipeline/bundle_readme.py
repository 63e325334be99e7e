"""README.md of a bundle, for the mobile developer: what the model costs and how to call it, with this bundle's own numbers."""

import json
import re

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from pipeline.manifest import Manifest
from pipeline.report import Report, report_json
from pipeline.report_html import TEMPLATES


def readme(manifest: Manifest, report: Report) -> str:
    """README.md for whoever puts the bundle into an app; its numbers come from the report."""
    environment = Environment(loader=FileSystemLoader(TEMPLATES), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.globals.update(first_layer=first_layer, shown=shown, percent=percent)
    by_name = {entry.name: entry for entry in manifest.artifacts}
    return environment.get_template("bundle_readme.md.j2").render(
        manifest=manifest,
        report=json.loads(report_json(report)),
        onnx=by_name["onnx_static_int8"],
        tflite=by_name["tflite_static_int8"],
    )


def first_layer(tensors: list[dict]) -> list[dict]:
    """The tensors without those of layers above 0, whose number stands between dots or at the end of the name."""
    return [tensor for tensor in tensors if not re.search(r"[._][1-9]\d*(\.|$)", tensor["name"])]


def percent(share: float | None, form: str) -> str:
    """A share of one as a percentage."""
    return shown(None if share is None else 100 * share, f"{form} %%")


def shown(value: float | None, form: str) -> str:
    """A number as text, or a dash where none was measured."""
    return "\u2013" if value is None else form % value
