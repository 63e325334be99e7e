"""``make prices``: what every way of shrinking costs and saves, measured on the demo model. Resumable: every row is kept.

Rows of models are scored in PyTorch against the dense model. Rows of artifacts go the whole road and are measured in their
runtimes. ``docs/prices.json`` holds the numbers, ``docs/prices.md`` and the plots are made from it.
"""

import json
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from device_tests.devices.local import Run, run_local
from device_tests.gates import Gates
from models.checkpoint import load_model, save_model
from models.progress import track
from pipeline.compressed import deflated_bytes
from pipeline.course import learning_rate_at, training_windows
from pipeline.fingerprint import code_of, text_sha256
from pipeline.measure import measuring_modules, runtimes_of
from pipeline.outliers import inject
from pipeline.prices_measure import Dense
from pipeline.prices_plan import BATCH_WINDOWS, FULL_STEPS, QUICK_STEPS, ArtifactRow, ModelRow, artifact_rows, model_rows
from pipeline.recipe import DEMO, DEMO_TEXTS, Recipe, load_recipe
from pipeline.recover import course_of
from pipeline.report import other_forms, read_json, sidecar_path
from pipeline.runner import plan, run_stages
from pipeline.settings import RecoverSettings
from pipeline.stages import ARTIFACT_OF_STAGE

OUTLIER_CHANNELS, OUTLIER_FACTOR = 4, 40.0
CONTROL_RATE = 1e-4  # what recovery takes for a lightly damaged model
CLIP_NORM = 1.0
Tell = Callable[[str, str], None]


@dataclass(frozen=True)
class Prices:
    """Where rows are kept, how many there are, and whether only those are wanted that were measured before."""

    work: Path
    quick: bool
    only_kept: bool = False


def measure_prices(prices: Prices, tell: Tell) -> dict:
    """Every row's numbers as JSON values; a row that was measured before with the same stages and code is not measured again."""
    steps = QUICK_STEPS if prices.quick else FULL_STEPS
    base, _ = run_stages(load_recipe(None, ["prune.ffn=0"]), prices.work, tell, ("prune",))
    dense = Dense(base["checkpoint"], np.load(base["text"] / "evaluation.npy"), read_json(base["text"] / "text.json")["prompt_tokens"])
    wanted, wanted_artifacts = model_rows(prices.quick), artifact_rows(prices.quick, tuple(ARTIFACT_OF_STAGE.values()))
    left_out = []
    if prices.only_kept:
        left_out = [row for row in (*wanted, *wanted_artifacts) if not is_made(row, prices.work)]
    models = [priced_model(row, prices, dense, tell) for row in wanted if row not in left_out]
    models.insert(1, priced_control(base, steps, prices, dense, tell))
    artifacts = [entry for row in wanted_artifacts if row not in left_out for entry in priced_artifact(row, prices, tell)]
    return {
        "left_out": [row.name + (" recovered" if getattr(row, "recovered", False) else "") for row in left_out],
        "quick": prices.quick,
        "recovery_steps": steps,
        "recovery_tokens": steps * BATCH_WINDOWS * RecoverSettings().window_tokens,
        "tokens": int(dense.windows[:, dense.prompt_tokens :].numel()),
        "dense_perplexity": dense.perplexity,
        "models": models,
        "artifacts": artifacts,
    }


def priced_model(row: ModelRow, prices: Prices, dense: Dense, tell: Tell) -> dict:
    """One row of a model: run what leads to it, then score it."""
    folders, runs = run_stages(row_recipe(row, prices.work), prices.work, tell_row(row.name, tell), (row.goal,))
    key = [folders[row.goal].name, folders["text"].name]
    found = kept(prices.work, "model", key, lambda: asdict(dense.price(folders[row.goal])))
    if row.goal == "cluster":
        found["download_indexed"] = read_json(folders["cluster"] / "cluster.json")["bytes"]["indexed_deflated"]
    seconds = {run.stage: run.seconds for run in runs if run.stage in ("prune", "recover", "cluster")}
    return {"name": row.name, "kind": row.kind, "share": row.share, "recovered": row.recovered, **found, "seconds": seconds}


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


def priced_control(base: dict[str, Path], steps: int, prices: Prices, dense: Dense, tell: Tell) -> dict:
    """The dense model trained on the text for as long as the others recovered: what training alone would give."""
    tell("dense, trained on", "runs")

    def measured() -> dict:
        folder = prices.work / "prices" / "control"
        folder.mkdir(parents=True, exist_ok=True)
        save_model(trained_on(base["checkpoint"], base["text"], steps), folder, tokenizer_from=base["checkpoint"])
        return asdict(dense.price(folder))

    found = kept(prices.work, "control", [steps, base["checkpoint"].name, base["text"].name], measured)
    return {"name": "dense, trained on", "kind": "dense", "share": 0.0, "recovered": True, **found, "seconds": {}}


def trained_on(checkpoint: Path, text: Path, steps: int) -> nn.Module:
    """The checkpoint after ``steps`` of plain next-token training on the recovery text, in recovery's batches and schedule."""
    model = load_model(checkpoint).requires_grad_(True)
    validation = torch.from_numpy(np.load(text / "validation.npy").astype(np.int64))
    course = course_of(RecoverSettings(steps=steps, batch_windows=BATCH_WINDOWS), model, CONTROL_RATE, validation, text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONTROL_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for step in track(range(steps), "training the control"):
        windows = training_windows(course, step)
        logits = model(windows, use_cache=False).logits[:, :-1]  # [batch, seq - 1, vocab]
        functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(course, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.requires_grad_(False)


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
        draft = folder.with_suffix(".draft")
        draft.mkdir(parents=True, exist_ok=True)
        save_model(model, draft, tokenizer_from=DEMO)
        draft.rename(folder)
    return folder.resolve()


def kept(work: Path, kind: str, key: list, measured: Callable[[], dict]) -> dict:
    """What ``measured`` gives, or gave before with the same key and the same code."""
    tops = measuring_modules() if kind == "artifact" else ("pipeline.prices_measure",)
    code = {name: digest for top in tops for name, digest in code_of(top)[0].items()}
    path = work / "prices" / f"{kind}-{text_sha256(json.dumps([kind, key, code], sort_keys=True))[:16]}.json"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_suffix(".draft")
        draft.write_text(json.dumps(measured()), encoding="utf-8")
        os.replace(draft, path)
    return json.loads(path.read_text(encoding="utf-8"))


def tell_row(name: str, tell: Tell) -> Tell:
    """Only what runs is told, under the row's name."""
    return lambda stage, state: tell(name, f"{stage} {state}") if state != "cached" else None
