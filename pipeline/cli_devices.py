"""The commands of ``pocketlm`` that measure artifacts on devices. Imports stand in the command."""

import json
from pathlib import Path
from typing import Annotated

import typer

from models.errors import UserError
from pipeline.cli_bundle import build
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
Devices = Annotated[
    list[str] | None,
    typer.Option("--device", help="local, arm64, arm64?cpu=cortex-a72, avx2, ssh://user@host, adb://serial; may be given again"),
]


@app.command(
    epilog="Examples: `pocketlm test` measures the recipe's artifacts again; `pocketlm test --device ssh://pi@raspberrypi.local` on that "
    "board; `pocketlm test dist/demo-android-bundle --device local --device arm64` a bundle's"
)
def test(
    path: Annotated[Path | None, typer.Argument(metavar="[BUNDLE]", help="a bundle; without it the recipe's artifacts")] = None,
    device: Devices = None,
    threads: Annotated[int | None, typer.Option(min=1, help="threads of each runtime")] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="fresh processes that time each artifact")] = None,
    recipe: RecipeFile = None, model: Model = None, calibration: Calibration = None, evaluation: Evaluation = None,
    settings: Settings = None, work: Work = WORK, out: Out = OUT, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Measure artifacts on devices and judge them against the gates. The exit code is the verdict.

    With a bundle or a device, the record goes to <name>-devices.json beside the bundles; else the bundle is made anew.
    """
    given = {"devices": tuple(device) if device else None, "threads": threads, "rounds": rounds}
    changed = [f"device.{key}={json.dumps(value)}" for key, value in given.items() if value is not None]
    if path is None:
        chosen = read_recipe(recipe, model, calibration, evaluation, [*(settings or []), *changed])
        if device is None:
            build(chosen, work, out, as_json, again=True)
        else:
            test_recipe(chosen, work, out, as_json)
        return
    from pipeline.road import Places

    others = (recipe, model, calibration, evaluation, settings)
    if any(others):
        raise UserError("a bundle has its own recipe; leave out --recipe, --model, --set and the texts, or the bundle")
    test_bundle(path, {key: value for key, value in given.items() if value is not None}, Places(work, out), as_json)


def test_recipe(chosen, work: Path, out: Path, as_json: bool) -> None:
    """The recipe's artifacts with all evaluation text on the devices that it names; no bundle is touched."""
    from pipeline import runner
    from pipeline.measure import check_devices, measure

    check_devices(chosen)
    folders, _ = runner.run_stages(chosen, work, tell)
    tell_outcome(chosen.name, measure(chosen, folders, work, tell), out, as_json)


def test_bundle(path: Path, given: dict, places, as_json: bool) -> None:
    """A bundle's artifacts, judged by its golden vectors; on this machine where no device is given."""
    from pydantic import ValidationError

    from pipeline.measure import measure_bundle
    from pipeline.recipe import told as faults
    from pipeline.settings import DeviceSettings

    try:
        settings = DeviceSettings(**{"devices": ("local",), **given})
    except ValidationError as error:
        raise UserError(faults(error, None)) from error
    tell_outcome(path.stem.removesuffix("-android-bundle"), measure_bundle(path, settings, places.work, tell), places.out, as_json)


def tell_outcome(name: str, outcome, out: Path, as_json: bool) -> None:
    """Write the record and its page, print it, and end with the verdict."""
    from pipeline.device_report import device_report, raise_for, write_device_report
    from pipeline.report_html import device_report_html
    from pipeline.table import DEVICE_COLUMNS, MATRIX_COLUMNS, device_rows, matrix_rows, skipped_lines

    report = device_report(name, outcome)
    place = out / f"{name}-devices.json"
    write_device_report(report, place, device_report_html(report))
    record = report.model_dump(mode="json")
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        print_table(DEVICE_COLUMNS, device_rows(record["artifacts"]), "difference and top-1: logits on the golden vectors, against PyTorch")
        if matrix := matrix_rows(record["artifacts"]):
            print_table(MATRIX_COLUMNS, matrix, "each against the same artifact in the same runtime on this machine")
        print("\n".join([*skipped_lines(record["skipped"]), str(place)]))
    raise_for(report)
