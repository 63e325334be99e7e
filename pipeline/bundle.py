"""Writes the bundle: a folder and a zip that hold what passed, the proof, and how to use it.

Both are made beside their place and renamed into it, so that the last bundle stays whole until the next one is.
"""

import os
import shutil
from dataclasses import dataclass
from pathlib import Path

from models.errors import NO_ROOM, GateError, UserError
from models.provenance import sha256_of
from pipeline.bundle_files import (
    ROLE_OF_FOLDER,
    BundleInputs,
    copy_artifact,
    copy_golden,
    copy_program,
    copy_tokenizer,
    described,
    write_licence,
)
from pipeline.bundle_readme import readme
from pipeline.contents import opened, read
from pipeline.manifest import MANIFEST, SUMS, Manifest, Provenance, manifest_json, sums
from pipeline.recipe import recipe_toml
from pipeline.report import Report, report_json
from pipeline.report_html import report_html
from pipeline.runner import locked
from pipeline.stages import stages_of
from pipeline.verify import verify_bundle
from pipeline.zip_folder import write_zip


@dataclass(frozen=True)
class Bundle:
    """Where a bundle lies, and how large it is."""

    folder: Path
    archive: Path
    archive_bytes: int
    artifacts: tuple[str, ...]


def build_bundle(inputs: BundleInputs, out: Path) -> Bundle:
    """Write ``<out>/<name>-android-bundle/`` and its zip.

    Raises GateError when the report did not pass: then only the report is written, as ``<name>-failed-report.json`` and
    ``.html``, and an older bundle stays. UserError when there is no room, or ``out`` can be no folder.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{out}: no folder can be made there ({error.strerror}); give another --out") from error
    aside = [out / f"{inputs.recipe.name}-failed-report{ending}" for ending in (".json", ".html")]
    if not inputs.report.passed:
        write_report(inputs.report, *aside)
        failures = failures_of(inputs.report)
        counted = f"{len(failures)} gate{'s' if len(failures) != 1 else ''} failed"
        raise GateError("\n".join([f"{counted}, no bundle was written; see {aside[1]}", *failures]))
    folder, archive = out / inputs.name, out / f"{inputs.name}.zip"
    with locked(out / f".{inputs.name}.lock"):
        draft, draft_zip = out / f".{inputs.name}.draft", out / f".{inputs.name}.draft.zip"
        try:
            shutil.rmtree(draft, ignore_errors=True)
            fill(draft, inputs)
            write_zip(draft, draft_zip, inputs.name)
        except BaseException as error:
            shutil.rmtree(draft, ignore_errors=True)
            draft_zip.unlink(missing_ok=True)
            if isinstance(error, OSError) and error.errno in NO_ROOM:
                raise UserError(f"{out}: the bundle cannot be written ({error.strerror}); make room and run again") from error
            raise
        put_in_place(draft, folder)
        os.replace(draft_zip, archive)
        for path in aside:
            path.unlink(missing_ok=True)
    return Bundle(folder, archive, archive.stat().st_size, tuple(artifact.name for artifact in inputs.report.artifacts))


def bundle_is_whole(folder: Path, archive: Path, key: str) -> bool:
    """Whether folder and zip were made with ``key``, hold the same, and have every byte that they were made with."""
    if not (folder / MANIFEST).is_file() or not archive.is_file():
        return False
    try:
        found = [verify_bundle(path, replay=False) for path in (folder, archive)]
        manifests = {read_manifest(path) for path in (folder, archive)}
    except UserError:  # a zip that cannot be read is not whole
        return False
    whole = all(verified.passed for verified in found) and len(manifests) == 1
    return whole and Manifest.model_validate_json(manifests.pop()).provenance.build_key == key


def read_manifest(path: Path) -> bytes:
    """The manifest's bytes in a folder or zip."""
    with opened(path) as contents:
        return read(contents, MANIFEST) if MANIFEST in contents.sizes else b""


def write_report(report: Report, json_path: Path, html_path: Path) -> None:
    """The report as JSON and as a page."""
    json_path.write_text(report_json(report), encoding="utf-8")
    html_path.write_text(report_html(report), encoding="utf-8")


def failures_of(report: Report) -> list[str]:
    """One line per missed gate, crash or missing measurement."""
    lines = [failure for artifact in report.artifacts for device in artifact.devices for failure in device.failures]
    return lines + [f"{artifact.name} was not measured" for artifact in report.artifacts if not artifact.devices]


def put_in_place(draft: Path, place: Path) -> None:
    """Rename ``draft`` to ``place``; the folder that stood there goes only after the new one stands."""
    old = draft.with_suffix(".old")
    shutil.rmtree(old, ignore_errors=True)
    if place.exists():
        place.rename(old)
    draft.rename(place)
    shutil.rmtree(old, ignore_errors=True)


def fill(bundle: Path, inputs: BundleInputs) -> None:
    """Everything in its place; the manifest over it, and the sums over both."""
    report, folders = inputs.report, inputs.folders
    for folder in ROLE_OF_FOLDER:
        (bundle / folder).mkdir(parents=True)
    entries = [copy_artifact(bundle, inputs, stage) for stage in stages_of(inputs.recipe.artifacts)]
    tokenizer = copy_tokenizer(folders["tokenizer"], bundle / "tokenizer")
    copy_golden(folders["golden"], bundle / "golden", inputs.recipe)
    copy_program(bundle / "device_tests")
    licence = write_licence(folders["checkpoint"], bundle / "LICENSE", report.model.licence)
    (bundle / "recipe.toml").write_text(recipe_toml(inputs.recipe), encoding="utf-8")
    write_report(report, bundle / "report.json", bundle / "report.html")
    manifest = Manifest(
        name=inputs.recipe.name,
        licence=licence,
        context_tokens=min(entry.interface.context_tokens for entry in entries),
        artifacts=entries,
        tokenizer=tokenizer,
        provenance=Provenance(
            source=report.model.source,
            commit=report.model.commit,
            checkpoint_sha256=report.model.sha256,
            recipe_sha256=sha256_of(bundle / "recipe.toml"),
            build_key=inputs.key,
            versions=report.versions,
        ),
        files=[],
    )
    (bundle / "README.md").write_text(readme(manifest, report), encoding="utf-8")
    manifest = manifest.model_copy(update={"files": described(bundle)})
    (bundle / MANIFEST).write_text(manifest_json(manifest), encoding="utf-8")
    (bundle / SUMS).write_text(sums(manifest, sha256_of(bundle / MANIFEST)), encoding="utf-8")
