"""The whole road: stages, measurement, report, bundle. What is there and whole is not made or measured again."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from pipeline.bundle import Bundle, build_bundle, bundle_at
from pipeline.bundle_files import BundleInputs, BundleOptions
from pipeline.bundle_kept import as_asked, kept_bundle
from pipeline.fingerprint import ROOT, code_of, text_sha256, tree_sha256
from pipeline.measure import check_devices, measure, measuring_modules
from pipeline.recipe import Recipe
from pipeline.report import Report, build_report, report_json
from pipeline.runner import StageRun, as_rows, run_stages
from pipeline.variants import check_variants


@dataclass(frozen=True)
class Places:
    """``work`` holds stage results, ``out`` receives bundles."""

    work: Path
    out: Path


@dataclass(frozen=True)
class Built:
    """A bundle, its report as plain data, and whether this call measured it and wrote it."""

    bundle: Bundle
    report: dict
    measured: bool
    written: bool


def build(
    recipe: Recipe,
    places: Places,
    tell: Callable[[str, str], None],
    measure_again: bool = False,
    options: BundleOptions | None = None,
) -> Built:
    """Run the stages that are missing, measure, judge, and write the bundle.

    A bundle that was built from the same stage results, gates and measuring code, and whose every byte is still right, is
    left as it is unless ``measure_again``. Where ``options`` ask for another form of it, or only its folder or its zip is still
    right, it is written anew from its own report.
    Raises GateError when an artifact fails; the report then lies beside the bundle's place and an older bundle stays untouched.
    """
    options = options or BundleOptions()
    check_devices(recipe)
    check_variants(options.variants or (), recipe.artifacts)
    folders, runs = run_stages(recipe, places.work, tell)
    key = build_key(recipe, folders)
    folder = places.out / f"{recipe.name}-android-bundle"
    archive = folder.with_suffix(".zip")
    kept = None if measure_again else kept_bundle(folder, archive, key)
    if kept and kept.manifest and as_asked(kept.manifest, archive, options):
        return Built(bundle_at(folder, archive), as_data(kept.report), measured=False, written=False)
    report = kept.report if kept else measured_report(recipe, folders, places.work, runs, tell)
    bundle = build_bundle(BundleInputs(recipe, folders, report, key, options), places.out)
    return Built(bundle, as_data(report), measured=kept is None, written=True)


def measured_report(
    recipe: Recipe, folders: dict[str, Path], work: Path, runs: list[StageRun], tell: Callable[[str, str], None]
) -> Report:  # fmt: skip
    """What the artifacts are, measured now."""
    return build_report(recipe, folders, measure(recipe, folders, work, tell), as_rows(runs))


def as_data(report: Report) -> dict:
    return json.loads(report_json(report))


def build_key(recipe: Recipe, folders: dict[str, Path]) -> str:
    """Changes with any stage's result, the gates, the way devices measure, and the code that measures and writes."""
    code = {}
    for top in ("pipeline.road", *measuring_modules()):
        code |= code_of(top)[0]
    templates = tree_sha256(ROOT / "pipeline" / "templates")
    stages = {name: path.name for name, path in folders.items()}
    settings = recipe.model_dump(mode="json", include={"name", "gates", "device"})
    return text_sha256(json.dumps([stages, settings, code, templates], sort_keys=True))
