"""The whole road: stages, measurement, report, bundle. What is there and whole is not made or measured again."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.bundle import BundleInputs, build_bundle, bundle_is_whole
from pipeline.fingerprint import ROOT, code_of, text_sha256, tree_sha256
from pipeline.measure import check_devices, measure, measuring_modules
from pipeline.recipe import Recipe
from pipeline.report import build_report, report_json
from pipeline.runner import as_rows, run_stages


@dataclass(frozen=True)
class Places:
    """``work`` holds stage results, ``out`` receives bundles."""

    work: Path
    out: Path


@dataclass(frozen=True)
class Built:
    """A bundle: its folder, its zip, its report as plain data, and whether this call measured it."""

    folder: Path
    archive: Path
    report: dict
    measured: bool


def build(recipe: Recipe, places: Places, tell: Callable[[str, str], None], measure_again: bool = False) -> Built:
    """Run the stages that are missing, measure, judge, and write the bundle.

    A bundle that was built from the same stage results, gates and measuring code, and whose every byte is still right, is
    left as it is unless ``measure_again``. Raises GateError when an artifact fails; the report then lies beside the bundle's
    place and an older bundle stays untouched.
    """
    check_devices(recipe)
    folders, runs = run_stages(recipe, places.work, tell)
    key = build_key(recipe, folders)
    folder = places.out / f"{recipe.name}-android-bundle"
    archive = folder.with_suffix(".zip")
    if not measure_again and bundle_is_whole(folder, archive, key):
        return Built(folder, archive, json.loads((folder / "report.json").read_text(encoding="utf-8")), measured=False)
    report = build_report(recipe, folders, measure(recipe, folders, places.work, tell), as_rows(runs))
    build_bundle(BundleInputs(recipe, folders, report, key), places.out)
    return Built(folder, archive, json.loads(report_json(report)), measured=True)


def build_key(recipe: Recipe, folders: dict[str, Path]) -> str:
    """Changes with any stage's result, the gates, the way devices measure, and the code that measures and writes."""
    code = {}
    for top in ("pipeline.road", *measuring_modules()):
        code |= code_of(top)[0]
    templates = tree_sha256(ROOT / "pipeline" / "templates")
    stages = {name: path.name for name, path in folders.items()}
    settings = recipe.model_dump(mode="json", include={"name", "gates", "device"})
    return text_sha256(json.dumps([stages, settings, code, templates], sort_keys=True))
