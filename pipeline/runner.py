"""Runs the stages: finds what is there already, does what is missing, each result whole or absent.

A result lives in ``<work>/<stage>/<key>/``. It is made in ``<key>.draft/`` by a process of its own and renamed into
place, so a kill loses one stage at most; what a stage keeps in ``<key>.draft/.resume/`` outlives the kill. A lock per key
lets two runs at once end with one result. Failures are never kept.
"""

import fcntl
import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

from models.errors import GateError, StageDied, UserError
from models.progress import PROGRESS_FD
from pipeline.fingerprint import ROOT, difference, key_of, parts_of
from pipeline.recipe import Recipe
from pipeline.stage_notes import notes_of
from pipeline.stages import STAGES, Stage, leading_to, needed

logger = logging.getLogger(__name__)
RECORD = "stage.json"
FULL_BYTES = 2**20  # a disk with less is full: the file that failed was larger than what is left
QUIET = {
    "TF_CPP_MIN_LOG_LEVEL": "3",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONWARNINGS": "ignore",
    "PYTHONHASHSEED": "0",
    "LITERT_TORCH_SHOW_PROGRESS": "n",
    "OPENBLAS_NUM_THREADS": "1",  # numpy's small matrices only; two threads were several times slower on a busy machine
    "OMP_WAIT_POLICY": "PASSIVE",  # waiting threads sleep: on a busy machine spinning ones cost many times what they gain
}


@dataclass(frozen=True)
class Planned:
    """One stage of a plan: where its result is or will be, and why it has to run (no reasons: it is there)."""

    stage: Stage
    key: str
    parts: dict
    folder: Path
    reasons: tuple[str, ...]

    @property
    def cached(self) -> bool:
        return not self.reasons


@dataclass(frozen=True)
class StageRun:
    """What a stage cost: wall seconds and peak resident MB of its process in the run that made the result, MB that the result takes."""

    stage: str
    seconds: float
    peak_rss_mb: float
    disk_mb: float
    cached: bool


def plan(recipe: Recipe, work: Path, goals: tuple[str, ...] = ()) -> list[Planned]:
    """Every stage that the recipe's artifacts need, or only what leads to the stages ``goals``, with its key, in order.

    Nothing is run; only the inputs outside the road are read.
    """
    planned, keys = [], {}
    work = work.resolve()  # stages start processes of their own, wherever those may stand
    for stage in leading_to(STAGES, goals) if goals else needed(STAGES, recipe.artifacts):
        inputs = {keyword: keys[name] for keyword, name in stage.inputs.items()}
        parts = parts_of(stage, getattr(recipe, stage.name), inputs)
        keys[stage.name] = key = key_of(stage, parts)
        folder = work / stage.name / key
        reasons = () if (folder / RECORD).is_file() else tuple(why(folder.parent, parts))
        planned.append(Planned(stage, key, parts, folder, reasons))
    return planned


def why(stage_folder: Path, parts: dict) -> list[str]:
    """What differs from the newest result of the same stage."""
    record = newest(stage_folder)
    if record is None:
        return ["never run"]
    return difference(record["parts"], parts) or ["an older result with the same parts is gone"]


def run_stages(
    recipe: Recipe, work: Path, tell: Callable[[str, str], None], goals: tuple[str, ...] = ()
) -> tuple[dict[str, Path], list[StageRun]]:
    """Run what is missing, in order: what the recipe's artifacts need, or only what leads to the stages ``goals``.

    ``tell(stage, state)`` is called with ``runs`` before and ``ran`` or ``cached`` after each stage, then with what there is to know.
    Returns the folder of every stage and what each cost. Raises UserError and GateError as the stages do.
    """
    folders, runs = {}, []
    for item in plan(recipe, work, goals):
        name = item.stage.name
        if not item.cached:
            logger.info("%s runs: %s%s", name, "; ".join(item.reasons), last_time(item.folder.parent))
            tell(name, "runs")
        made = make(item, getattr(recipe, name), {keyword: folders[source] for keyword, source in item.stage.inputs.items()})
        folders[name] = item.folder
        record = json.loads((item.folder / RECORD).read_text())
        runs.append(StageRun(name, record["seconds"], record["peak_rss_mb"], disk_mb(item.folder), cached=not made))
        tell(name, f"ran {record['seconds']:.1f} s, {record['peak_rss_mb']:.0f} MB" if made else "cached")
        logger.info("%s lies in %s", name, item.folder)
        for note in notes_of(name, item.folder):
            tell(name, note)
    return folders, runs


def last_time(stage_folder: Path) -> str:
    """How long the newest result of the same stage took, as the end of a sentence; empty where there is none."""
    record = newest(stage_folder)
    return f" (the last time {record['seconds']:.0f} s)" if record else ""


def newest(stage_folder: Path) -> dict | None:
    """The record of a stage's newest result."""
    path = max(stage_folder.glob(f"*/{RECORD}"), key=lambda path: path.stat().st_mtime, default=None)
    return json.loads(path.read_text()) if path else None


def disk_mb(folder: Path) -> float:
    """10^6 bytes that a result takes, with everything in it."""
    return round(sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6, 3)


def make(item: Planned, settings, inputs: dict[str, Path]) -> bool:
    """Make one stage's result unless it is there. Returns whether this call made it."""
    item.folder.parent.mkdir(parents=True, exist_ok=True)
    with locked(item.folder.with_suffix(".lock")):
        if (item.folder / RECORD).is_file():
            return False
        draft = fresh_draft(item.folder.with_suffix(".draft"))
        started = time.perf_counter()
        outcome = run_process(item.stage, settings, draft, inputs)
        raise_failure(item.stage.name, outcome, draft)
        shutil.rmtree(draft / ".resume", ignore_errors=True)
        record = {
            "stage": item.stage.name,
            "key": item.key,
            "parts": item.parts,
            "seconds": round(time.perf_counter() - started, 3),
            "peak_rss_mb": outcome["peak_rss_mb"],
        }
        (draft / RECORD).write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
        draft.rename(item.folder)
        return True


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock; the kernel drops it when its holder dies."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def fresh_draft(draft: Path) -> Path:
    """An empty draft folder, except for what an interrupted run of the same stage left to resume from."""
    draft.mkdir(exist_ok=True)
    for item in draft.iterdir():
        if item.name == ".resume":
            continue
        shutil.rmtree(item) if item.is_dir() else item.unlink()
    return draft


def run_process(stage: Stage, settings, draft: Path, inputs: dict[str, Path]) -> dict:
    """Run a stage in a fresh process; its output goes to a log beside the draft. Returns what the process said at its end."""
    log = draft.with_suffix(".log")
    heard, said = os.pipe()  # not a file: what a process says of a full disk must not need the disk
    order = {
        "module": stage.module,
        "settings_class": [type(settings).__module__, type(settings).__name__],
        "settings": settings.model_dump(mode="json"),
        "out": str(draft),
        "inputs": {keyword: str(path) for keyword, path in inputs.items()},
        "said": said,
    }
    terminal = os.dup(sys.__stderr__.fileno())
    environment = {**os.environ, **QUIET, PROGRESS_FD: os.environ.get(PROGRESS_FD, str(terminal))}  # whoever is quiet has set it
    try:
        with log.open("wb") as file:
            process = subprocess.run(
                [sys.executable, "-m", "pipeline.stage_process", json.dumps(order)],
                cwd=Path.cwd(), env=with_our_path(environment), stdout=file, stderr=file, stdin=subprocess.DEVNULL,
                pass_fds=(terminal, said), check=False,
            )  # fmt: skip
    finally:
        os.close(terminal)
        os.close(said)
        with os.fdopen(heard, "rb") as pipe:
            answer = pipe.read()
    outcome = json.loads(answer) if answer else {"ended": "died", "message": died(process.returncode)}
    if outcome["ended"] == "done":
        log.unlink()
    return {**outcome, "log": log}


def with_our_path(environment: dict[str, str]) -> dict[str, str]:
    """The same environment, in which a child process finds the packages of this repository first."""
    found = environment.get("PYTHONPATH")
    return {**environment, "PYTHONPATH": os.pathsep.join([str(ROOT), *([found] if found else [])])}


def died(code: int) -> str:
    """How a process ended that said nothing."""
    if code == -9:
        return "the system killed it, most likely for want of memory; close other programs or take a smaller model, then run again"
    return f"its process ended with code {code} and said nothing"


def raise_failure(name: str, outcome: dict, draft: Path) -> None:
    """Turn what a stage said at its end into the error that the person sees."""
    if outcome["ended"] == "done":
        return
    full = shutil.disk_usage(draft.parent).free < FULL_BYTES  # before the draft goes
    resumable = (draft / ".resume").is_dir()
    if not resumable:
        shutil.rmtree(draft, ignore_errors=True)
    message = f"{name}: {outcome['message']}"
    if outcome["ended"] == "user":
        raise UserError(message)
    if full:  # libraries tell it in their own ways, or die of it
        raise UserError(f"{name}: no room left on the disk; free some and run again, finished stages are kept")
    if outcome["ended"] == "gate":
        raise GateError(message)
    logger.info("what %s printed:\n%s", name, outcome["log"].read_text(encoding="utf-8", errors="replace"))
    raise StageDied(f"{message}; the whole story is in {outcome['log']}")


def as_rows(runs: list[StageRun]) -> list[dict]:
    return [asdict(run) for run in runs]
