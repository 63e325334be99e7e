"""The rows of the benchmark: our artifacts in every runtime of theirs, and eager PyTorch. Peers are in `pipeline.bench_peers`."""

import fnmatch
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from device_tests.sessions import RUNTIMES
from models.errors import GateError, StageDied, UserError
from pipeline.bench_child import Order
from pipeline.fingerprint import distributions, library_versions
from pipeline.fit_shape import DecoderShape, parameters
from pipeline.measure import runtimes_of
from pipeline.recipe import Recipe
from pipeline.report import FP32_BYTES, read_json, sidecar_path
from pipeline.runner import StageRun, run_stages
from pipeline.stages import ARTIFACT_OF_STAGE

TORCH = "PyTorch eager fp32"
OURS, PYTORCH, PEER = "ours", "PyTorch", "peer"
Tell = Callable[[str, str], None]


@dataclass(frozen=True)
class Row:
    """What is timed: ``command`` and an order behind it. ``missing`` says why there is nothing to time.

    ``bytes`` are those of its files, ``bytes_read_per_token`` of the weights that a decoded token reads.
    """

    label: str
    group: str
    command: tuple[str, ...] = ()
    model: str = ""
    runtime: str | None = None
    bytes: int | None = None
    bytes_read_per_token: int | None = None
    version: str = ""
    notes: tuple[str, ...] = ()
    missing: str | None = None


def matches(label: str, only: tuple[str, ...]) -> bool:
    """Whether a row was asked for: each of ``only`` is a part of its name or a shell pattern, in any case."""
    return all(fnmatch.fnmatch(label.lower(), f"*{pattern.lower()}*") for pattern in only)


def torch_row(model: Path, shape: DecoderShape) -> Row:
    """Eager PyTorch on an exported checkpoint."""
    counts = parameters(shape)
    picked = counts.positions + (0 if shape.tied else counts.embedding)  # tables of which a row is read
    return Row(
        TORCH, PYTORCH, (sys.executable, "-m", "pipeline.torch_session"), str(model),
        bytes=sum(file.stat().st_size for file in model.glob("*.safetensors")),
        bytes_read_per_token=FP32_BYTES * (counts.total - picked),
        version=library_versions(frozenset(["torch"]))["torch"],
    )  # fmt: skip


@dataclass(frozen=True)
class Attempt:
    """What leads to a stage: folders and costs of the stages on the way, or why it cannot be made."""

    folders: dict[str, Path]
    runs: list[StageRun]
    failure: str | None = None


def attempt(recipe: Recipe, work: Path, stage: str, tell: Tell) -> Attempt:
    """Make one stage and what it needs. One that cannot be made is told and returned, not raised."""
    try:
        folders, runs = run_stages(recipe, work, lambda *_: None, (stage,))
    except (UserError, GateError, StageDied) as error:
        tell(stage, f"not made: {error}")
        return Attempt({}, [], " ".join(str(error).split()))
    tell(stage, f"{runs[-1].seconds:.1f} s, {runs[-1].peak_rss_mb:.0f} MB{' (cached)' if runs[-1].cached else ''}")
    return Attempt(folders, runs)


def artifact_rows(recipe: Recipe, work: Path, only: tuple[str, ...], tell: Tell) -> tuple[list[Row], list[StageRun]]:
    """Make every artifact that was asked for and return its rows. One that cannot be made is a row that says why."""
    rows, runs = [], {}
    for stage, name in ARTIFACT_OF_STAGE.items():
        if name not in recipe.artifacts or not any(matches(label, only) for label in labels_of(name)):
            continue
        made = attempt(recipe, work, stage, lambda _, state, name=name: tell(name, state))
        if made.failure:
            rows.append(Row(name, OURS, missing=f"not made: {made.failure}"))
            continue
        runs |= {run.stage: run for run in made.runs}
        rows += [row for row in rows_of(sidecar_path(made.folders, stage)) if matches(row.label, only)]
    return rows, list(runs.values())


def labels_of(artifact: str) -> list[str]:
    """The rows that an artifact may have, told before it is made: its name begins with its format."""
    return [f"{artifact} in {runtime}" for runtime, (form, *_) in RUNTIMES.items() if artifact.startswith(form)]


def rows_of(sidecar: Path) -> list[Row]:
    """One row for each runtime of an artifact."""
    record = read_json(sidecar)
    two_step = record["measured"].get("two_step_layers")
    notes = (f"{len(two_step)} of {record['measured']['linear_layers']} linear layers in two steps",) if two_step else ()
    return [
        Row(
            f"{record['name']} in {runtime}", OURS, (sys.executable, "-m", "pipeline.bench_artifact"), str(sidecar), runtime,
            record["bytes"], record["bytes_read_per_token"], version_of(runtime), notes,
        )
        for runtime in runtimes_of(record)
    ]  # fmt: skip


def version_of(runtime: str) -> str:
    """Version of the distribution that a runtime is."""
    package = RUNTIMES[runtime][3]
    return next(iter(library_versions(frozenset(top for top, names in distributions().items() if package in names)).values()), "")


def order_for(row: Row, threads: int, **how) -> Order:
    """The order of one run of a row."""
    return Order(model=row.model, threads=threads, runtime=row.runtime, **how)
