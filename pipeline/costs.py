"""What the road itself costs as models grow: wall time, peak memory and disk of every stage, at sizes from the demo's on.

The numbers of a stage are those of the run that made its result, wherever it is found done. A stage that fails is a row that says
why, and the other artifacts are still made.
"""

import json
import tomllib
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from pathlib import Path

from device_tests.board import describe
from models.errors import UserError
from pipeline.bench_rows import Tell, attempt
from pipeline.bench_sizes import SHARED, with_random_weights
from pipeline.fit_shape import parameters, shape_of_config
from pipeline.recipe import Recipe, load_recipe
from pipeline.runner import StageRun, as_rows
from pipeline.stages import stages_of

SIZES = Path(__file__).parent / "presets" / "costs.toml"
BESIDE_ARTIFACTS = ("tokenizer", "golden")  # stages of what a bundle holds too


@dataclass(frozen=True)
class CostSize:
    """A model to take down the road; a limit of None is none."""

    name: str
    settings: tuple[str, ...]
    config: str | None = None
    limit_minutes: float | None = None
    limit_mb: float | None = None


@cache
def sizes() -> dict[str, CostSize]:
    """The sizes by name, smallest first."""
    table = tomllib.loads(SIZES.read_text(encoding="utf-8"))
    every, random = (tuple(table.pop(shared)["settings"]) for shared in SHARED)
    return {
        name: CostSize(name, **{**entry, "settings": (*every, *(random if "config" in entry else ()), *entry.get("settings", ()))})
        for name, entry in table.items()
    }


def size_named(name: str) -> CostSize:
    """UserError for a size that there is not."""
    if name not in sizes():
        raise UserError(f"--size {name}: no such size; give one of {', '.join(sizes())}")
    return sizes()[name]


def recipe_of(size: CostSize, work: Path, overrides: list[str]) -> Recipe:
    """The default recipe for a size, with its random checkpoint where it has one; ``overrides`` (table.key=value) come last."""
    begin = [] if size.config is None else with_random_weights(size.name, size.config, work)
    return load_recipe(None, [*begin, *size.settings, *overrides])


def measure_costs(size: CostSize, work: Path, overrides: list[str], tell: Tell) -> dict:
    """Take one size down the road; what is made already is not made again. Returns its part of ``costs.json``."""
    recipe = recipe_of(size, work, overrides)
    runs: dict[str, StageRun] = {}
    failures: dict[str, str] = {}
    folders: dict[str, Path] = {}
    for stage in (*BESIDE_ARTIFACTS, *stages_of(recipe.artifacts)):
        made = attempt(recipe, work, stage, tell)
        folders |= made.folders
        runs |= {run.stage: run for run in made.runs}
        if made.failure:
            failures[stage] = made.failure
    config = folders["checkpoint"] / "config.json"
    shape = shape_of_config(json.loads(config.read_text(encoding="utf-8")), str(config))
    return {
        "name": size.name,
        "parameters": parameters(shape).total,
        "measured_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "environment": describe(),
        "settings": [*size.settings, *overrides],
        "stages": as_rows(list(runs.values())),
        "failures": failures,
        "minutes": sum(run.seconds for run in runs.values()) / 60,
        "peak_rss_mb": max(run.peak_rss_mb for run in runs.values()),
        "disk_mb": sum(run.disk_mb for run in runs.values()),
        "limits": {"minutes": size.limit_minutes, "peak_rss_mb": size.limit_mb},
    }


def over_limits(size: dict) -> list[str]:
    """One line for each limit that a size passes, and each artifact that was not made."""
    lines = [f"{size['name']}: {stage} was not made: {why}" for stage, why in size["failures"].items()]
    for field, unit in (("minutes", "minutes"), ("peak_rss_mb", "MB")):
        limit = size["limits"][field]
        if limit is not None and not size[field] <= limit:
            worst = max(size["stages"], key=lambda row: row["seconds" if field == "minutes" else field])["stage"]
            lines.append(f"{size['name']}: {size[field]:.0f} {unit}, limit {limit:.0f}; most of it in {worst}")
    return lines
