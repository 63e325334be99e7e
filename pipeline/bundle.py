"""Writes the bundle: a folder and a zip that hold what passed, the proof, and how to use it.

Both are made beside their place and renamed into it, so that the last bundle stays whole until the next one is.
"""

import os
import shutil
import zipfile
from dataclasses import dataclass
from pathlib import Path

from models.errors import NO_ROOM, GateError, UserError
from models.provenance import sha256_of
from pipeline.bundle_android import write_android
from pipeline.bundle_example import write_example
from pipeline.bundle_files import (
    CHAT_TEMPLATE,
    TOKENIZER_CONFIG,
    BundleInputs,
    copy_artifacts,
    copy_golden,
    copy_program,
    copy_tokenizer,
    described,
    left_out,
    prompt_of,
)
from pipeline.bundle_kept import more_forms
from pipeline.bundle_licences import notice, write_licence
from pipeline.bundle_onnx import add_ort_file, complete_onnx
from pipeline.bundle_readme import readme
from pipeline.fingerprint import text_sha256
from pipeline.litert_lm import add_litert_lm, litert_lm
from pipeline.manifest import MANIFEST, SIGNATURE, SUMS, Manifest, OtherRuntime, Provenance, manifest_json, sums
from pipeline.model_card import CARD, model_card
from pipeline.recipe import recipe_toml
from pipeline.report import FP32_BYTES, Report, report_json
from pipeline.report_html import report_html
from pipeline.runner import locked
from pipeline.sbom import SBOM, sbom
from pipeline.signing import key_sha256
from pipeline.variants import choose
from pipeline.zip_folder import write_zip
from pipeline.zip_parts import existing_parts, part_count, remove_parts, split

AIM = 0.6  # of the fp32 weights' bytes: what a default bundle's zip should stay within
LARGEST_FILES = 5  # that are named where it does not


@dataclass(frozen=True)
class Bundle:
    """Where a bundle lies, and how large it is. ``parts`` are those of the zip, none where it was not cut."""

    folder: Path
    archive: Path
    archive_bytes: int
    fp32_bytes: int
    artifacts: tuple[str, ...]
    parts: tuple[Path, ...]

    @property
    def share(self) -> float:
        """The zip's bytes over those of the exported model's weights in fp32."""
        return self.archive_bytes / self.fp32_bytes


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
            if inputs.options.part_bytes is not None:
                part_count(draft_zip.stat().st_size, inputs.options.part_bytes)
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
        if inputs.options.part_bytes is None:
            remove_parts(archive)
        else:
            split(archive, inputs.options.part_bytes)
    return bundle_at(folder, archive)


def bundle_at(folder: Path, archive: Path) -> Bundle:
    """The bundle that lies there, which is whole."""
    manifest = Manifest.model_validate_json((folder / MANIFEST).read_bytes())
    names = tuple(artifact.name for artifact in manifest.artifacts)
    return Bundle(folder, archive, archive.stat().st_size, manifest.fp32_bytes, names, tuple(existing_parts(archive)))


def size_line(bundle: Bundle) -> str:
    """What the zip weighs against the model in fp32, and where that is more than ``AIM``, what in it weighs most."""
    told = f"{bundle.archive_bytes / 1e6:.1f} MB zip, {bundle.share:.0%} of the exported model's {bundle.fp32_bytes / 1e6:.1f} MB in fp32"
    if bundle.share <= AIM:
        return told
    with zipfile.ZipFile(bundle.archive) as archive:
        largest = sorted(archive.infolist(), key=lambda entry: -entry.compress_size)[:LARGEST_FILES]
    names = ", ".join(f"{entry.filename.split('/', 1)[1]} {entry.compress_size / 1e6:.1f} MB" for entry in largest)
    return f"{told}, more than {AIM:.0%}; most of it: {names}"


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
    """Everything in its place; the manifest over it, the sums over both, and the signature over these."""
    report, folders, key = inputs.report, inputs.folders, inputs.options.key
    bundle.mkdir(parents=True)
    manifest = with_models(bundle, inputs)
    copy_golden(folders["golden"], bundle / "golden", inputs.recipe, [entry.name for entry in manifest.artifacts])
    copy_program(bundle / "device_tests")
    (bundle / "recipe.toml").write_text(recipe_toml(inputs.recipe), encoding="utf-8")
    write_report(report, bundle / "report.json", bundle / "report.html")
    manifest = relisted(manifest, bundle)
    write_android(bundle, manifest, report)
    write_example(bundle, manifest)
    manifest = relisted(manifest, bundle)
    (bundle / "NOTICE").write_text(notice(manifest, report, bundle, folders["checkpoint"]), encoding="utf-8")
    (bundle / CARD).write_text(model_card(manifest, report, folders["checkpoint"]), encoding="utf-8")
    (bundle / "README.md").write_text(readme(manifest, report), encoding="utf-8")
    manifest = relisted(manifest, bundle)
    (bundle / SBOM).write_text(sbom(manifest), encoding="utf-8")
    manifest = relisted(manifest, bundle)
    (bundle / MANIFEST).write_text(manifest_json(manifest), encoding="utf-8")
    (bundle / SUMS).write_text(sums(manifest, sha256_of(bundle / MANIFEST)), encoding="utf-8")
    if key:
        (bundle / SIGNATURE).write_bytes(key.sign((bundle / SUMS).read_bytes()))


def with_models(bundle: Path, inputs: BundleInputs) -> Manifest:
    """Copy models, tokenizer and licence, and say what was copied; the files are not listed yet."""
    report, folders, options = inputs.report, inputs.folders, inputs.options
    choice = choose(report, options.variants)
    entries = copy_artifacts(bundle, inputs, choice)
    formats = {entry.format for entry in entries}
    template = folders["checkpoint"] / CHAT_TEMPLATE
    tokenizer = copy_tokenizer(folders["tokenizer"], bundle, formats, template)
    prompt = prompt_of(bundle / "tokenizer" / TOKENIZER_CONFIG, template)
    others: list[OtherRuntime] = []
    if "onnx" in formats:
        others += complete_onnx(bundle, folders, [entry for entry in entries if entry.format == "onnx"], tokenizer)
    if options.ort:
        entries = [add_ort_file(bundle, entry) if "ort" in more_forms(entry) else entry for entry in entries]
    if options.litert_lm:
        entries = [add_litert_lm(bundle, entry, prompt) if "litert_lm" in more_forms(entry) else entry for entry in entries]
    others += [litert_lm(entry) for entry in entries if entry.format == "tflite" and entry.recommended]
    return Manifest(
        name=inputs.recipe.name,
        licence=write_licence(folders["checkpoint"], bundle / "LICENSE", report.model.licence),
        prompt=prompt,
        context_tokens=min(entry.interface.context_tokens for entry in entries),
        parameters=report.pruned.parameters,
        fp32_bytes=FP32_BYTES * report.pruned.parameters,
        artifacts=entries,
        left_out=left_out(choice),
        tokenizer=tokenizer,
        other_runtimes=others,
        signer=key_sha256(options.key.public_key()) if options.key else None,
        provenance=Provenance(
            source=report.model.source,
            commit=report.model.commit,
            checkpoint_sha256=report.model.sha256,
            recipe_sha256=text_sha256(recipe_toml(inputs.recipe)),
            build_key=inputs.key,
            variants=None if options.variants is None else sorted(options.variants),
            versions=report.versions,
        ),
        files=[],
    )


def relisted(manifest: Manifest, bundle: Path) -> Manifest:
    """The same manifest over the files that are there by now."""
    return manifest.model_copy(update={"files": described(bundle, manifest.files)})
