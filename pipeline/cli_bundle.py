"""The commands of ``pocketlm`` that write a bundle and check one. Imports stand in the command."""

import json
from pathlib import Path
from typing import Annotated

import typer

from models.errors import GateError, UserError
from pipeline.cli_options import (
    OUT,
    WORK,
    AsJson,
    Calibration,
    Evaluation,
    Model,
    Out,
    RecipeFile,
    Settings,
    Work,
    print_table,
    read_recipe,
)
from pipeline.cli_voice import tell

app = typer.Typer()
SIGNATURES = {"none": "not signed", "checked": "signature right", "unchecked": "signed, which --key would check"}


@app.command(
    epilog="Examples: `pocketlm bundle --model org/name --out dist`; `pocketlm bundle --variants onnx_static_int8,tflite_fp32`; "
    "`pocketlm bundle --sign key.pem --split-mb 150`"
)
def bundle(
    recipe: RecipeFile = None, model: Model = None, calibration: Calibration = None, evaluation: Evaluation = None,
    settings: Settings = None, work: Work = WORK, out: Out = OUT, as_json: AsJson = False,
    variants: Annotated[
        str | None, typer.Option(help="artifacts to put in, with commas between, or all; without it the best of each format that passed")
    ] = None,
    ort: Annotated[bool, typer.Option("--ort", help="ONNX models in ORT format too, for minimal builds; bytes differ each time")] = False,
    litert_lm: Annotated[bool, typer.Option("--litert-lm", help="a file for LiteRT-LM too, as large as the TFLite model")] = False,
    split_mb: Annotated[float | None, typer.Option(help="cut the zip into parts of so many MB (10^6 bytes) as well")] = None,
    sign: Annotated[Path | None, typer.Option(metavar="KEY", help="sign with this Ed25519 private key (PEM)")] = None,
) -> None:  # fmt: skip
    """The whole road: run the stages, measure every artifact in its runtimes, judge, and write the bundle."""
    from pipeline.bundle_files import BundleOptions
    from pipeline.signing import read_private_key

    if split_mb is not None and not 0 < split_mb < float("inf"):
        raise UserError(f"--split-mb {split_mb:g}: give more than 0")
    names = None if variants is None else tuple(dict.fromkeys(name.strip() for name in variants.split(",") if name.strip()))
    if names == ():
        raise UserError("--variants names nothing; give artifacts with commas between, or all")
    options = BundleOptions(names, ort, litert_lm, split_mb, read_private_key(sign) if sign else None)
    build(read_recipe(recipe, model, calibration, evaluation, settings), work, out, as_json, options=options)


def build(chosen, work: Path, out: Path, as_json: bool, again: bool = False, options=None) -> None:
    """Build the recipe ``chosen`` and print what came of it."""
    from pipeline import road

    built = road.build(chosen, road.Places(work, out), tell, measure_again=again, options=options)
    if as_json:
        print(json.dumps(as_record(built), indent=1))
    else:
        print_built(built)


def as_record(built) -> dict:
    """A built bundle for programs."""
    bundle = built.bundle
    return {
        "folder": str(bundle.folder),
        "zip": str(bundle.archive),
        "zip_bytes": bundle.archive_bytes,
        "share_of_fp32": bundle.share,
        "parts": [str(part) for part in bundle.parts],
        "artifacts": list(bundle.artifacts),
        "measured": built.measured,
        "up_to_date": not built.written,
        "report": built.report,
    }


def print_built(built) -> None:
    """A built bundle for people: what was measured, what went in, where it lies."""
    from pipeline.bundle import size_line
    from pipeline.table import COLUMNS, MATRIX_COLUMNS, matrix_rows, price, rows, skipped_lines

    bundle = built.bundle
    print_table(COLUMNS, rows(built.report), price(built.report))
    if matrix := matrix_rows(built.report["artifacts"]):
        print_table(MATRIX_COLUMNS, matrix, "each against the same artifact in the same runtime on this machine")
    for line in skipped_lines(built.report["skipped"]):
        print(line)
    if built.measured:
        print("measured just now")
    else:
        state = "written anew from its report" if built.written else "artifacts and report are up to date"
        print(f"{state}; nothing was measured again")
    print(f"in the bundle: {', '.join(bundle.artifacts)}")
    print(size_line(bundle))
    print(bundle.folder)
    print(bundle.archive)
    if bundle.parts:
        first, last = bundle.parts[0], bundle.parts[-1].name
        print(f"{first} to {last}; joined again by: cat {bundle.archive.name}.* > {bundle.archive.name}")


@app.command(
    epilog="Examples: `pocketlm verify dist/demo-android-bundle.zip`; `pocketlm verify demo-android-bundle.zip.001 --key public.pem`"
)
def verify(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help="bundle folder, zip, or the first part of a zip")],
    key: Annotated[Path | None, typer.Option(help="Ed25519 public key (PEM) whose signature the bundle must have")] = None,
    threads: Annotated[int, typer.Option(min=1, help="threads of each runtime")] = 1,
    as_json: AsJson = False,
) -> None:
    """Check signature, names, sizes and hashes of a bundle, then replay its golden vectors in every runtime installed here."""
    from dataclasses import asdict

    from pipeline.signing import read_public_key
    from pipeline.verify import verify_bundle

    found = verify_bundle(path, threads, key=read_public_key(key) if key else None)
    if as_json:
        print(json.dumps({**asdict(found), "passed": found.passed}, indent=1))
    else:
        hashes = "NOT as it was built" if found.faults else "all hashes right"
        print(
            f"{found.name}: {found.files} files, {found.bytes} bytes, {hashes}{'' if found.faults else ', ' + SIGNATURES[found.signature]}"
        )
        for replay in found.replays:
            verdict = "passed" if replay.passed else "FAILED"
            print(f"  {replay.artifact} in {replay.runtime}: {verdict} (largest difference {replay.max_abs_diff})")
        for runtime in found.not_installed:
            print(f"  {runtime} is not installed here and was not tried")
    if not found.passed:
        failures = [line for replay in found.replays for line in replay.failures]
        raise GateError("\n".join([*found.faults, *failures, f"{path}: not verified; take the bundle from its source again"]))
