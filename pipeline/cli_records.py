"""The commands of ``pocketlm`` that show what was measured before. Imports stand in the command."""

import json
from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli_options import AsJson, print_table
from pipeline.cli_voice import told

app = typer.Typer()
RECORD = "a bundle's folder or zip, a report.json, or what `pocketlm test` wrote"


@app.command(epilog="Example: `pocketlm report dist/demo-android-bundle.zip --out report.html`")
def report(
    path: Annotated[Path, typer.Argument(metavar="BUNDLE", help=RECORD)],
    out: Annotated[Path | None, typer.Option(help="the page; without it <name>-report.html beside the bundle, never in it")] = None,
    as_json: AsJson = False,
) -> None:
    """Write the page of a report again from its numbers, and say whether the bundle's own page has the same bytes."""
    from dataclasses import asdict

    from pipeline.report_again import write_again

    found = write_again(path, out)
    if as_json:
        print(json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in asdict(found).items()}, indent=1))
        return
    if found.same is not None:
        same = (
            "the same bytes as the bundle's own page"
            if found.same
            else "other bytes than the bundle's own page, which another version wrote"
        )
        told.print(same, markup=False)
    print(found.page)


@app.command(
    epilog="Examples: `pocketlm compare dist/demo-android-bundle other/demo-android-bundle --html compare.html`; "
    "`pocketlm compare before-devices.json dist/demo-devices.json`"
)
def compare(
    first: Annotated[Path, typer.Argument(metavar="A", help=RECORD)],
    second: Annotated[Path, typer.Argument(metavar="B", help="the other one")],
    html: Annotated[Path | None, typer.Option("--html", help="write a page with both side by side")] = None,
    as_json: AsJson = False,
) -> None:
    """Hold two bundles or records side by side: size, quality, recipe, and which times differ by more than the spread of their rounds."""
    from pipeline import compare as comparison
    from pipeline.compare_bundles import BUNDLE_COLUMNS, SETTING_COLUMNS, bundle_rows, setting_rows
    from pipeline.device_report import read_record

    records = tuple(read_record(path) for path in (first, second))
    found = comparison.compare(*records)
    if html is not None:
        from pipeline.compare_html import write_comparison

        write_comparison(records, found, html)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    if found["whole"]:
        differing = [entry for entry in found["whole"] if entry["a"] != entry["b"]]
        equal = f"{len(found['whole']) - len(differing)} other numbers of models, artifacts and stages are equal"
        print_table(BUNDLE_COLUMNS, bundle_rows(differing), equal)
    if found["settings"]:
        print_table(SETTING_COLUMNS, setting_rows(found["settings"]), "what differs in recipes and versions")
    print_table(comparison.COMPARE_COLUMNS, comparison.compare_rows(found), "ranges are least and most over each record's rounds")
    for line in [*found["notes"], *found["only"]]:
        print(line)
    if html is not None:
        print(html)
