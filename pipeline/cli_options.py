"""What the commands of ``pocketlm`` share: their options, the recipe that these make, and how results are printed."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

RecipeFile = Annotated[Path | None, typer.Option("--recipe", help="TOML file; without it the default recipe")]
Model = Annotated[str | None, typer.Option("--model", help="Hugging Face folder or hub id; without it the demo model")]
Calibration = Annotated[Path | None, typer.Option(help="UTF-8 text for calibration and recovery; without it sampled from the model")]
Evaluation = Annotated[Path | None, typer.Option(help="UTF-8 text, held out, for the quality numbers; without it sampled")]
Settings = Annotated[list[str] | None, typer.Option("--set", help="table.key=value over the recipe, such as prune.ffn=0.5")]
Work = Annotated[Path, typer.Option(help="folder of cached stage results")]
Out = Annotated[Path, typer.Option(help="folder that the bundle is written to")]
AsJson = Annotated[bool, typer.Option("--json", help="print JSON for programs")]
WORK, OUT = Path(".pocketlm"), Path("dist")


def read_recipe(recipe: Path | None, model: str | None, calibration: Path | None, evaluation: Path | None, settings: list[str] | None):
    """The recipe with the options of the command line over it."""
    from pipeline.recipe import load_recipe

    options = {"checkpoint.source": model, "text.calibration": calibration, "text.evaluation": evaluation}
    overrides = [f"{key}={json.dumps(str(value))}" for key, value in options.items() if value is not None]
    return load_recipe(recipe, overrides + (settings or []))


def print_table(columns: tuple[str, ...], lines: list[tuple[str, ...]], caption: str) -> None:
    """A table as wide as it needs to be, also where there is no terminal."""
    from pipeline.table import table_of

    table = table_of(columns, lines, caption)
    wide = Console(highlight=False)
    if not wide.is_terminal:
        wide.width = max(wide.width, wide.measure(table, options=wide.options.update(max_width=400)).maximum)
    wide.print(table)
