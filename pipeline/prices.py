"""``make prices``: what every way of shrinking costs and saves, measured on the demo model. Resumable: every row is kept.

Rows of models are scored in PyTorch against the dense model. Rows of artifacts go the whole road and are measured in their
runtimes. ``docs/prices.json`` holds the numbers, ``docs/prices.md`` and the plots are made from it.
"""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from device_tests.devices.local import Run, run_local
from device_tests.gates import Gates
from models.checkpoint import load_model, save_model
from pipeline.compressed import deflated_bytes
from pipeline.measure import runtimes_of
from pipeline.outliers import inject
from pipeline.prices_kept import Earlier, kept, measured_here, row_key, stage_keys
from pipeline.prices_long import measure_long, priced_control
from pipeline.prices_measure import Dense
from pipeline.prices_plan import BATCH_WINDOWS, FULL_STEPS, QUICK_STEPS, ArtifactRow, ModelRow, artifact_rows, model_rows
from pipeline.recipe import DEMO, DEMO_TEXTS, Recipe, load_recipe
from pipeline.report import other_forms, read_json, sidecar_path
from pipeline.runner import plan, run_stages
from pipeline.settings import RecoverSettings
from pipeline.stages import ARTIFACT_OF_STAGE
from pipeline.whole_folder import made_whole

OUTLIER_CHANNELS, OUTLIER_FACTOR = 4, 40.0
Tell = Callable[[str, str], None]


@dataclass(frozen=True)
class Prices:
    """Where rows are kept, how many there are, whether only those are wanted that were measured before, and what was found earlier.

    ``keep_artifacts``: the earlier rows of artifacts stay as they are, whatever version measured them; new ones are measured.
    """

    work: Path
    quick: bool
    only_kept: bool = False
    keep_artifacts: bool = False
    earlier: Earlier = Earlier()


def measure_prices(prices: Prices, tell: Tell) -> dict:
    """Every row's numbers as JSON values; a row that was measured before with the same stages and code is not measured again."""
    steps = QUICK_STEPS if prices.quick else FULL_STEPS
    base, _ = run_stages(load_recipe(None, ["prune.ffn=0"]), prices.work, tell, ("prune",))
    dense = Dense(base["checkpoint"], np.load(base["text"] / "evaluation.npy"), read_json(base["text"] / "text.json")["prompt_tokens"])
    wanted = model_rows(prices.quick)
    left_out = [row for row in wanted if prices.only_kept and not is_known(row, prices) and not is_made(row, prices.work)]
    models = [priced_model(row, prices, dense, tell) for row in wanted if row not in left_out]
    tell("dense, trained on", "runs")
    control = priced_control(prices.work, None, steps, dense, "auto", prices.earlier)
    models.insert(1, {"name": "dense, trained on", "kind": "dense", "share": 0.0, "recovered": True, **control, "seconds": {}})
    artifacts, missing = priced_artifacts(prices, tell)
    return {
        "left_out": [row.name + (" recovered" if getattr(row, "recovered", False) else "") for row in (*left_out, *missing)],
        "quick": prices.quick,
        "recovery_steps": steps,
        "recovery_tokens": steps * BATCH_WINDOWS * RecoverSettings().window_tokens,
        "tokens": int(dense.windows[:, dense.prompt_tokens :].numel()),
        "dense_perplexity": dense.perplexity,
        "models": models,
        "long": {} if prices.quick else measure_long(prices.work, dense, prices.earlier, tell),
        "artifacts": artifacts,
    }


def priced_model(row: ModelRow, prices: Prices, dense: Dense, tell: Tell) -> dict:
    """One row of a model: taken over from an earlier measurement, or run what leads to it and score it."""
    key = key_of_model(row, prices.work)
    if known := prices.earlier.rows("models", key):
        return known[0]
    folders, runs = run_stages(row_recipe(row, prices.work), prices.work, tell_row(row.name, tell), (row.goal,))
    stages = [folders[row.goal].name, folders["text"].name]
    found = kept(prices.work, "model", stages, lambda: asdict(dense.price(folders[row.goal])))
    if row.goal == "cluster":
        found["download_indexed"] = read_json(folders["cluster"] / "cluster.json")["bytes"]["indexed_deflated"]
    seconds = {run.stage: run.seconds for run in runs if run.stage in ("prune", "recover", "cluster")}
    return {"name": row.name, "kind": row.kind, "share": row.share, "recovered": row.recovered, "key": key, **found, "seconds": seconds}


def key_of_model(row: ModelRow, work: Path) -> str:
    """All that decides the row, in 16 hex digits; nothing is run for it."""
    return row_key("model", stage_keys(plan(row_recipe(row, work), work, (row.goal,)), (row.goal, "text")))


def key_of_artifact(row: ArtifactRow, work: Path) -> str:
    """The same of an artifact's row, whatever the runtime."""
    goals = artifact_goals(row)
    return row_key("artifact", stage_keys(plan(row_recipe(row, work), work, goals), goals[::-1]))


def is_known(row: ModelRow, prices: Prices) -> bool:
    """Whether an earlier measurement holds the row."""
    return bool(prices.earlier.rows("models", key_of_model(row, prices.work)))


def is_made(row: ModelRow | ArtifactRow, work: Path) -> bool:
    """Whether every stage that leads to the row is done."""
    goals = (row.goal,) if isinstance(row, ModelRow) else artifact_goals(row)
    return all(planned.cached for planned in plan(row_recipe(row, work), work, goals))


def row_recipe(row: ModelRow | ArtifactRow, work: Path) -> Recipe:
    """The recipe that a row is made by."""
    if isinstance(row, ModelRow):
        return load_recipe(None, list(row.overrides))
    overrides = [*row.overrides, f'artifacts=["{row.artifact}"]']
    if row.outliers:
        overrides.append(f'checkpoint.source="{with_outliers(work)}"')
        overrides += [f'text.{name}="{path}"' for name, path in DEMO_TEXTS.items()]
    return load_recipe(None, overrides)


def artifact_goals(row: ArtifactRow) -> tuple[str, str]:
    """The stages whose results an artifact's row is measured from."""
    return "golden", next(stage for stage, artifact in ARTIFACT_OF_STAGE.items() if artifact == row.artifact)


def priced_artifacts(prices: Prices, tell: Tell) -> tuple[list[dict], list[ArtifactRow]]:
    """Every row of artifacts, and the rows that were left out. Times want one machine: all earlier rows, or all of this one.

    With ``keep_artifacts`` all earlier ones, and those of this machine that are new; each says who measured it.
    """
    wanted = artifact_rows(prices.quick, tuple(ARTIFACT_OF_STAGE.values()))
    keys = [key_of_artifact(row, prices.work) for row in wanted]
    earlier = prices.earlier.found.get("artifacts", [])
    known = {entry["name"] for entry in earlier}
    if not prices.keep_artifacts:
        if earlier and {entry["key"] for entry in earlier} >= set(keys):
            return earlier, []
        known, earlier = set(), []
    new = [(row, key) for row, key in zip(wanted, keys, strict=True) if row.name not in known]
    missing = [row for row, _ in new if prices.only_kept and not is_made(row, prices.work)]
    found = {
        row.name: [{**entry, "key": key, "measured_by": measured_here()} for entry in priced_artifact(row, prices, tell)]
        for row, key in new
        if row not in missing
    }
    for entry in earlier:
        found.setdefault(entry["name"], []).append(entry)
    order = [row.name for row in wanted if row.name in found] + [name for name in found if name not in {row.name for row in wanted}]
    return [entry for name in order for entry in found[name]], missing


def priced_artifact(row: ArtifactRow, prices: Prices, tell: Tell) -> list[dict]:
    """One artifact, one entry per runtime: the whole road, then quality and speed in that runtime."""
    goals = artifact_goals(row)
    stage = goals[-1]
    folders, _ = run_stages(row_recipe(row, prices.work), prices.work, tell_row(row.name, tell), goals)
    sidecar = sidecar_path(folders, stage)
    golden = read_json(folders["golden"] / "golden.json")
    entries = []
    for runtime in runtimes_of(read_json(sidecar)):
        key = [folders[stage].name, folders["golden"].name, runtime]
        result = kept(prices.work, "artifact", key, lambda runtime=runtime: run_local(sidecar, folders["golden"], in_runtime(runtime)))
        record = read_json(sidecar)
        entries.append(
            {
                "name": row.name,
                "artifact": row.artifact,
                "runtime": runtime,
                "outliers": row.outliers,
                "bytes": record["bytes"],
                "download": sum(deflated_bytes(sidecar.parent / file["path"]) for file in record["files"]),
                "bytes_dense_fp32": 4 * golden["reference"]["parameters"],
                "other_forms": other_forms(record["measured"]),
                "exported_perplexity": golden["exported"]["perplexity"],
                "quality": result["quality"],
                "device": {key: value for key, value in result["device"].items() if not isinstance(value, list)},
            }
        )
    return entries


def in_runtime(runtime: str) -> Run:
    """Measured, not judged: a price that is too high is a price too."""
    return Run(runtime=runtime, threads=1, gates=Gates(), quality=True)


def with_outliers(work: Path) -> Path:
    """The demo checkpoint with outliers in it, made once."""
    folder = work / "prices" / "outliers"
    if not (folder / "model.safetensors").is_file():
        model = load_model(DEMO)
        inject(model, OUTLIER_CHANNELS, OUTLIER_FACTOR, seed=0)
        with made_whole(folder) as draft:
            save_model(model, draft, tokenizer_from=DEMO)
    return folder.resolve()


def tell_row(name: str, tell: Tell) -> Tell:
    """Only what runs is told, under the row's name."""
    return lambda stage, state: tell(name, f"{stage} {state}") if state != "cached" else None
