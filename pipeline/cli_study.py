"""The commands of ``pocketlm`` that study: what shrinking costs, and what a size would need. Imports stand in the command."""

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
    RecipeFile,
    Settings,
    Work,
    print_table,
    read_recipe,
)
from pipeline.cli_voice import tell

app = typer.Typer()


@app.command(
    epilog="Examples: `pocketlm quality dist/demo-android-bundle`; "
    "`pocketlm quality .pocketlm/onnx_int8/<key>/onnx_static_int8.json my-model --worst 5`"
)
def quality(
    given: Annotated[list[Path], typer.Argument(metavar="A [B ...]", help="artifact's JSON, bundle, or Hugging Face folder")],
    golden: Annotated[Path | None, typer.Option(help="golden stage's folder to compare with; without it the recipe's")] = None,
    runtime: Annotated[str | None, typer.Option(help="of artifacts: onnxruntime, litert or tflite; without it all of theirs")] = None,
    threads: Annotated[int, typer.Option(help="threads of each runtime, PyTorch too")] = 1,
    worst: Annotated[int, typer.Option(help="how many of the worst windows are shown as text")] = 3,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json for their text; without it the reference's")] = None,
    recipe: RecipeFile = None, model: Model = None, calibration: Calibration = None, evaluation: Evaluation = None,
    settings: Settings = None, work: Work = WORK, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Perplexity, KL, agreement and the right token's probability of artifacts, each in its own runtime, against the fp32 model."""
    from pipeline import quality_command, quality_table
    from pipeline.quality_reference import find_reference

    recipe_options = (recipe, model, calibration, evaluation, settings)
    if golden is not None and any(recipe_options):
        raise UserError("--golden names the reference already; leave out --golden, or --recipe, --model, --set and the texts")
    folder = golden or find_reference(read_recipe(*recipe_options), work)
    found = quality_command.quality(given, folder, quality_command.QualityOptions(runtime, threads, worst, tokenizer), tell)
    if as_json:
        print(json.dumps(found, indent=1, allow_nan=False))
    else:
        print_table(quality_table.QUALITY_COLUMNS, quality_table.quality_rows(found), quality_table.caption(found))
        print_table(quality_table.POSITION_COLUMNS, quality_table.position_rows(found), "the same by position in the window")
        for result in found["results"]:
            print("\n".join([f"{result['artifact']} in {result['runtime']}: {result['belongs']}", *quality_table.worst_text(result)]))
    if failures := [line for result in found["results"] for line in result["failures"]]:
        raise GateError("\n".join(failures))


@app.command(
    epilog="Examples: `pocketlm fit --config gpt3-175b --context 2048`; `pocketlm fit --config demo --prune ffn=0.5,layers=2`; "
    "`pocketlm fit --config dist/demo-android-bundle --compare`"
)
def fit(
    config: Annotated[str, typer.Option(help="a preset, a config.json or its folder; a bundle or its report.json is compared as well")],
    context: Annotated[list[int] | None, typer.Option(help="tokens in the KV cache; may be given again")] = None,
    prune: Annotated[str, typer.Option(help="the prune table of a recipe, such as ffn=0.5,layers=2")] = "",
    memory_share: Annotated[float, typer.Option(help="of a device's memory, what weights and cache may take")] = 0.5,
    compare: Annotated[bool, typer.Option("--compare", help="fail unless predicted bytes are within 3 % of measured ones")] = False,
    as_json: AsJson = False,
) -> None:
    """Reckon parameters, bytes per format, KV cache and the speed that memory allows, for a model of any size."""
    from pipeline import fit as reckoning
    from pipeline import fit_table

    question = reckoning.Question(tuple(context or ()), reckoning.prune_settings(prune), memory_share)
    found = reckoning.fit(config, question)
    if as_json:
        print(json.dumps(reckoning.as_record(found), indent=1))
    else:
        print(fit_table.parameter_line(found))
        print_table(fit_table.SIZE_COLUMNS, fit_table.size_rows(found), fit_table.size_caption(found))
        print_table(fit_table.KV_COLUMNS, fit_table.kv_rows(found), "KV cache")
        print_table(fit_table.device_columns(), fit_table.device_rows(found), fit_table.device_caption(found, question))
    if compare:
        reckoning.require_close(found)


@app.command(epilog="Example: `pocketlm lottery --quick --out docs/lottery`")
def lottery(
    out: Annotated[Path, typer.Option(help="folder for lottery.json, lottery.md and lottery.png")] = Path("docs/lottery"),
    work: Work = WORK,
    quick: Annotated[bool, typer.Option("--quick", help="two minutes on one core instead of twenty on two")] = False,
    seeds: Annotated[int | None, typer.Option(help="runs from different first weights")] = None,
    sparsity: Annotated[float | None, typer.Option(help="share of the linear layers removed after the last round")] = None,
    scope: Annotated[str | None, typer.Option(help="within what weights compete: layer or model")] = None,
    as_json: AsJson = False,
) -> None:
    """Train a small decoder, find its lottery tickets, and hold them against what they must beat. Goes on where it was stopped."""
    import logging
    from dataclasses import replace

    logging.getLogger("torchao").setLevel(logging.ERROR)  # it tells of kernels for GPUs that are not there
    logging.getLogger("torch.utils._pytree").setLevel(logging.ERROR)

    from pipeline import lottery as tickets
    from pipeline import lottery_report

    given = {"seeds": seeds, "sparsity": sparsity, "scope": scope}
    plan = replace(tickets.QUICK if quick else tickets.Plan(), **{key: value for key, value in given.items() if value is not None})
    record = lottery_report.write(plan, tickets.run(plan, work, tell), out)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        print_table(lottery_report.COLUMNS, lottery_report.rows(record), "\n".join(lottery_report.verdicts(record)))
        print(out)


@app.command(
    "lm-eval",
    epilog="Example: `pocketlm lm-eval dist/demo-android-bundle/onnx/onnx_static_int8.json --tasks my_task --include-path my-tasks`",
)
def lm_eval(
    artifact: Annotated[Path, typer.Argument(metavar="ARTIFACT", help="the JSON beside a model file, in a bundle or a stage's result")],
    tasks: Annotated[str, typer.Option(help="names of tasks, with commas between them")],
    include_path: Annotated[Path | None, typer.Option(help="folder with the YAML files of tasks of your own")] = None,
    runtime: Annotated[str | None, typer.Option(help="onnxruntime, litert or tflite; without it the artifact's first")] = None,
    threads: Annotated[int, typer.Option(min=1, help="threads of the runtime")] = 1,
    tokenizer: Annotated[Path | None, typer.Option(help="tokenizer.json; without it that of the bundle or the stages")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="documents per task; without it all")] = None,
    fewshot: Annotated[int | None, typer.Option(min=0, help="examples before each question; without it as the task says")] = None,
    as_json: AsJson = False,
) -> None:
    """Run lm-evaluation-harness on an artifact in its own runtime."""
    from importlib.util import find_spec

    if find_spec("lm_eval") is None:
        install = ".venv/bin/pip install --constraint constraints.txt --editable '.[eval]'"
        raise UserError(f"lm-evaluation-harness is not installed; run: {install}")
    from pipeline import lm_eval_adapter as adapter

    wanted = adapter.Evaluation(tuple(tasks.split(",")), include_path, runtime, threads, tokenizer, limit, fewshot)
    found = adapter.evaluate(artifact, wanted)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        caption = f"lm-evaluation-harness {found['lm_eval']} on {found['artifact']} in {found['runtime']}"
        print_table(adapter.METRIC_COLUMNS, adapter.metric_rows(found), caption)


@app.command(epilog="Example: `pocketlm prices --quick`")
def prices(
    quick: Annotated[bool, typer.Option(help="fewer rows and shorter recovery")] = False,
    only_kept: Annotated[bool, typer.Option("--only-kept", help="leave out what was not made before")] = False,
    keep_artifacts: Annotated[
        bool,
        typer.Option("--keep-artifacts", help="measure no row of an artifact again that prices.json has, whatever version measured it"),
    ] = False,
    work: Work = WORK,
    out: Annotated[Path, typer.Option(help="folder that prices.json, prices.md and the plots are written to")] = Path("docs"),
    as_json: AsJson = False,
) -> None:
    """Measure what every way of shrinking costs and saves on the demo model. Rows that are there are not measured again."""
    from pipeline.prices import Prices, measure_prices
    from pipeline.prices_kept import Earlier
    from pipeline.prices_report import write_prices

    earlier = Earlier.read(out)
    if keep_artifacts and not earlier.found.get("artifacts"):
        raise UserError(f"--keep-artifacts: {out / 'prices.json'} holds no rows of artifacts; leave the option out")
    found = measure_prices(Prices(work, quick, only_kept, keep_artifacts, earlier), tell)
    write_prices(found, out)
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        print(out / "prices.md")


@app.command(epilog="Example: `pocketlm costs --size demo --size 139m`")
def costs(
    size: Annotated[list[str] | None, typer.Option(help="demo, 139m, 0.5b or 1.1b; may be given again; without it demo")] = None,
    settings: Settings = None,
    work: Work = WORK,
    out: Annotated[Path, typer.Option(help="folder for costs.json, costs.md and costs.png; sizes that it holds stay")] = OUT / "costs",
    as_json: AsJson = False,
) -> None:
    """Measure what every stage costs in time, memory and disk as models grow. Exit code 1: a size passes its limits."""
    from pipeline import costs as road
    from pipeline import costs_report

    wanted = [road.size_named(name) for name in size or ["demo"]]
    found = (road.measure_costs(each, work, list(settings or ()), tell) for each in wanted)
    record = costs_report.write_costs(found, out)
    if as_json:
        print(json.dumps(record, indent=1))
    else:
        print_table(costs_report.COLUMNS, costs_report.rows(record), "limits are of the size as a whole; peak MB of any one stage")
        print(out / costs_report.PAGE)
    if lines := [line for each in wanted for line in road.over_limits(record["sizes"][each.name])]:
        raise GateError("\n".join(["costs: a limit is passed", *lines]))


@app.command(epilog="Example: `pocketlm sensitivity --model my-model`")
def sensitivity(
    recipe: RecipeFile = None, model: Model = None, calibration: Calibration = None, evaluation: Evaluation = None,
    settings: Settings = None, work: Work = WORK, as_json: AsJson = False,
) -> None:  # fmt: skip
    """Show what each layer, and each kind of layer, costs as static int8 when it alone is quantised; the dearest first."""
    from pipeline import runner
    from pipeline.report import read_json, sidecar_path

    chosen = read_recipe(recipe, model, calibration, evaluation, settings)
    folders, _ = runner.run_stages(chosen, work, tell, ("onnx_int8",))
    measured = read_json(sidecar_path(folders, "onnx_int8"))["measured"]
    if "sensitivity" not in measured:
        limit = chosen.onnx_int8.sensitivity_up_to_mb
        raise UserError(
            f"the fp32 model is larger than onnx_int8.sensitivity_up_to_mb ({limit:g} MB), so no layer was measured;"
            " give --set onnx_int8.sensitivity_up_to_mb=100000 (it takes five times the model's size in memory)"
        )
    if as_json:
        print(json.dumps({"sensitivity": measured["sensitivity"], "not_int8": measured["not_int8"]}, indent=1))
        return
    costs = measured["sensitivity"]
    lines = [(cost["name"], f"{cost['kl']:.2e}", f"{cost['top1']:.2%}") for kind in ("layers", "operators") for cost in costs[kind]]
    print_table(("row", "KL", "top-1"), lines, f"as int8 alone, against fp32, over {costs['tokens']} tokens; below, all layers of one kind")
    for entry in measured["not_int8"]:
        print(f"not int8: {entry['name']} ({entry['why']})")
