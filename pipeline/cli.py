"""The command line ``pocketlm``. It parses, calls one function that does the work, and prints what that returns.

Exit codes: 0 well; 1 a gate failed; 2 the user's mistake; 3 a stage broke; 130 interrupted. Imports of a command stand in
the command, so that ``pocketlm --help`` is instant.
"""

import json
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from device_tests.errors import DeviceTestError
from models.errors import NO_ROOM, GateError, StageDied, UserError
from pipeline import cli_bundle, cli_devices, cli_records, cli_study, cli_text
from pipeline.cli_options import (
    OUT,
    WORK,
    AsJson,
    Calibration,
    Evaluation,
    Model,
    RecipeFile,
    Settings,
    Work,
    print_table,
    read_recipe,
)
from pipeline.cli_voice import Commands, Quiet, Verbose, errors, tell

app = typer.Typer(
    cls=Commands,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    help="Takes a PyTorch language model and hands a mobile developer a bundle that is small, fast and proved.",
)


@app.callback()
def say(quiet: Quiet = False, verbose: Verbose = False) -> None:
    """The options of every command; their callbacks do what there is to do."""


@app.command(epilog="Example: `pocketlm plan --set prune.ffn=0.5`")
def plan(
    recipe: RecipeFile = None, model: Model = None, calibration: Calibration = None, evaluation: Evaluation = None,
    settings: Settings = None, work: Work = WORK, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Show which stages are done and which will run, and why. Nothing is run."""
    from pipeline import runner

    chosen = read_recipe(recipe, model, calibration, evaluation, settings)
    planned = runner.plan(chosen, work)
    if as_json:
        stages = [{"stage": p.stage.name, "key": p.key, "cached": p.cached, "reasons": list(p.reasons)} for p in planned]
        print(json.dumps({"recipe": chosen.model_dump(mode="json"), "stages": stages}, indent=1))
        return
    for item in planned:
        print(f"{item.stage.name:<12} {'done' if item.cached else 'runs: ' + '; '.join(item.reasons[:4])}")


@app.command(epilog="Example: `pocketlm run --model my-model --set recover.steps=0`")
def run(
    recipe: RecipeFile = None, model: Model = None, calibration: Calibration = None, evaluation: Evaluation = None,
    settings: Settings = None, work: Work = WORK, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Run the stages: prune, recover, smooth, export and quantise. Finished stages are not run again."""
    from pipeline import runner

    chosen = read_recipe(recipe, model, calibration, evaluation, settings)
    folders, runs = runner.run_stages(chosen, work, tell)
    if as_json:
        print(json.dumps({"folders": {name: str(path) for name, path in folders.items()}, "stages": runner.as_rows(runs)}, indent=1))


@app.command(epilog="Examples: `pocketlm bench --threads 1 --threads 2`; `pocketlm bench --size 139m --only onnx_ --rounds 5`")
def bench(
    recipe: RecipeFile = None, model: Model = None, calibration: Calibration = None, evaluation: Evaluation = None,
    settings: Settings = None, work: Work = WORK, as_json: AsJson = False,
    size: Annotated[list[str] | None, typer.Option(help="demo, 139m, 139m-half or 0.5b; may be given again; without it demo")] = None,
    threads: Annotated[list[int] | None, typer.Option(min=1, help="thread counts; may be given again; without it 1")] = None,
    rounds: Annotated[int, typer.Option(min=1, help="interleaved rounds of which medians are taken")] = 3,
    decode_tokens: Annotated[int, typer.Option(min=1, help="single tokens timed in each run")] = 64,
    only: Annotated[str | None, typer.Option(help="only rows with this in their name, or a shell pattern such as 'onnx_*int8*'")] = None,
    out: Annotated[Path, typer.Option(help="folder for bench.json, bench.md and plots; sizes that it holds stay")] = OUT / "bench",
) -> None:  # fmt: skip
    """Time every artifact, eager PyTorch, and the peers of `make bench-peers` in one interleaved run. Exit code 1: int8 is no gain."""
    from pipeline import bench_command
    from pipeline.bench import BenchPlan
    from pipeline.bench_report import PAGE, full_columns, full_rows

    own = read_recipe(recipe, model, calibration, evaluation, settings) if recipe or model or calibration or evaluation else None
    request = bench_command.Request(tuple(size or ()), own, tuple(settings or ()))
    plan = BenchPlan(tuple(threads or (1,)), rounds, decode_tokens, (only,) if only else ())
    record, lines = bench_command.run(request, work, out, plan, tell)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        for each in record["sizes"].values():
            print_table(full_columns(each), full_rows(each), f"{each['name']}: {each['about']}. {each['how']}")
        print(out / PAGE)
    if lines:
        raise GateError("\n".join(["bench: int8 is not what it should be", *lines]))


app.add_typer(cli_bundle.app)
app.add_typer(cli_text.app)
app.add_typer(cli_devices.app)
app.add_typer(cli_records.app)
app.add_typer(cli_study.app)


def main() -> None:
    """Run the command line; every foreseen error becomes one line and an exit code."""
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `pocketlm ... | head` ends quietly
    try:
        app(standalone_mode=True)
    except (UserError, DeviceTestError) as error:
        errors.print(f"pocketlm: {error}", markup=False)
        sys.exit(2)
    except GateError as error:
        errors.print(f"pocketlm: {error}", markup=False)
        sys.exit(1)
    except StageDied as error:
        errors.print(f"pocketlm: {error}", markup=False)
        sys.exit(3)
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        errors.print("pocketlm: no room left on the disk; free some and run again, finished stages are kept")
        sys.exit(2)
    except KeyboardInterrupt:
        errors.print("pocketlm: interrupted; what was finished is kept")
        sys.exit(130)
