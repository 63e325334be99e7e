"""Every artifact, eager PyTorch, fp32 ONNX Runtime and the peers on one checkpoint: interleaved rounds of one run.

A noisy machine slows all rows of a round alike, so ratios of one run hold where absolute times do not. Every row of every round
is a fresh process. A row that gave no result is not run again and says why.
"""

import json
import os
import tempfile
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from device_tests.board import describe
from device_tests.devices.job import how_it_ended
from device_tests.devices.local import bandwidth_here
from models.errors import UserError
from pipeline.bench_peers import peer_rows, run_limited
from pipeline.bench_record import MAIN_PROMPT_TOKENS, OTHER_PROMPTS_TOKENS, Runs, kept, median, row_record
from pipeline.bench_rows import TORCH, Row, Tell, artifact_rows, matches, order_for, torch_row
from pipeline.fingerprint import library_versions
from pipeline.fit_shape import DecoderShape, parameters, shape_of_config
from pipeline.recipe import Recipe
from pipeline.runner import as_rows, run_stages

MEASURED_WITH = ("numpy", "torch", "transformers", "onnxruntime", "ai_edge_litert", "tflite_runtime")  # import names
# A row that was well with the first number of threads and takes so many times as long with another hangs
HANGS_AFTER_TIMES, HANGS_AFTER_MORE_S = 5, 20.0


@dataclass(frozen=True)
class BenchPlan:
    """How much is run: every row at every thread count, ``rounds`` times, ``decode_tokens`` single tokens each.

    Each of ``only`` is a part of the names of the rows that are wanted, or a shell pattern.
    """

    threads: tuple[int, ...] = (1,)
    rounds: int = 3
    decode_tokens: int = 64
    only: tuple[str, ...] = ()
    prompts: tuple[int, ...] = OTHER_PROMPTS_TOKENS


@dataclass(frozen=True)
class Subject:
    """What is measured: the recipe's road, what the reader is told of it, and whether its quality means anything.

    ``limit_s`` is what one process of a row may take, ``only`` as in ``BenchPlan``.
    """

    name: str
    about: str
    recipe: Recipe
    trained: bool
    limit_s: float = 600.0
    only: tuple[str, ...] = ()


@dataclass(frozen=True)
class Feed:
    """The files that every process of a run is given: the prompt int32 ``[n]``, and the folder of evaluation windows."""

    prompt: Path
    golden: Path
    interface: dict


def bench(subject: Subject, work: Path, plan: BenchPlan, tell: Tell) -> dict:
    """Make what is missing, time all rows, and return the size's part of ``bench.json``. UserError where ``only`` fits no row."""
    folders, runs = run_stages(subject.recipe, work, tell, ("golden",))
    exported = folders["cluster"]
    config = json.loads((exported / "config.json").read_text(encoding="utf-8"))
    shape = shape_of_config(config, str(exported))
    rows, made = artifact_rows(subject.recipe, work, plan.only, tell)
    rows += [torch_row(exported, shape)] if matches(TORCH, plan.only) else []
    # Peers get the weights before smoothing, which is our own preparation; clustered weights are another function, so those they get.
    theirs = exported if subject.recipe.cluster.centroids else folders["recover"]
    rows += peer_rows(theirs, work, plan.only, tell, max(plan.threads))
    if not rows:
        raise UserError(f"--only {' and '.join(plan.only)}: no row has such a name; leave it out to see all of them")
    with tempfile.TemporaryDirectory(prefix="bench-") as scratch:
        feed = Feed(write_prompt(folders["golden"], Path(scratch)), folders["golden"], interface_of(shape, config))
        found, bandwidth = time_rounds(rows, feed, plan, subject, tell)
    stages = {row["stage"]: row for row in as_rows([*runs, *made])}
    return {
        "name": subject.name,
        "about": subject.about,
        "parameters": parameters(shape).total,
        "context_tokens": shape.context_tokens,
        "measured_at": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "how": how(plan, subject),
        "environment": {**describe(), "versions": library_versions(frozenset(MEASURED_WITH)), "load_average": os.getloadavg()},
        "threads": list(plan.threads),
        "rounds": plan.rounds,
        "decode_tokens": plan.decode_tokens,
        "bandwidth_gb_s": {str(threads): {"median": median(values), "rounds": values} for threads, values in bandwidth.items()},
        "stages": list(stages.values()),
        "rows": [row_record(each, median(bandwidth[each.threads])) for each in found],
    }


def write_prompt(golden: Path, scratch: Path) -> Path:
    """The text that is timed, from the evaluation windows, repeated where a window is shorter."""
    with np.load(golden / "golden.npz", allow_pickle=False) as vectors:
        prompt = np.resize(vectors["windows"][0], MAIN_PROMPT_TOKENS)
    np.save(scratch / "prompt.npy", prompt)
    return scratch / "prompt.npy"


def interface_of(shape: DecoderShape, config: dict) -> dict:
    """The fields of ``Interface`` for a row that has no sidecar."""
    ends = {key: value if isinstance(value := config.get(key), int) else None for key in ("bos_token_id", "eos_token_id")}
    sizes = {key: getattr(shape, key) for key in ("vocab_size", "layers", "kv_heads", "head_dim", "context_tokens")}
    return {**sizes, "prefill_tokens": None, **ends}


def time_rounds(rows: list[Row], feed: Feed, plan: BenchPlan, subject: Subject, tell: Tell) -> tuple[list[Runs], dict[int, list]]:
    """All rounds. Returns the rows' runs and GB/s of memory by threads; quality is scored in the first run of each row."""
    found = {(row.label, threads): Runs(row, threads) for threads in plan.threads for row in rows}
    bandwidth: dict[int, list[float | None]] = {threads: [] for threads in plan.threads}
    for turn in range(plan.rounds):
        for threads in plan.threads:
            bandwidth[threads].append(bandwidth_here(threads))
            for row in rows:
                runs, before = found[row.label, threads], found[row.label, plan.threads[0]]
                if row.missing or runs.failure:
                    continue
                first = subject.trained and runs is before and turn == 0
                tell(f"round {turn + 1}/{plan.rounds}", f"{threads} threads: {row.label}")
                run_once(runs, feed, plan, first, limit_of(before, runs, subject.limit_s))
        if turn == 0:
            for (label, _), runs in found.items():
                runs.quality = found[label, plan.threads[0]].quality
    return list(found.values()), bandwidth


def limit_of(before: Runs, runs: Runs, most_s: float) -> float:
    """Seconds that the next run may take: less where the row is known to be quicker with the first number of threads."""
    if runs is before or not before.wall_s:
        return most_s
    return min(most_s, HANGS_AFTER_MORE_S + HANGS_AFTER_TIMES * max(before.wall_s))


def run_once(runs: Runs, feed: Feed, plan: BenchPlan, scored: bool, limit_s: float) -> None:
    """One fresh process of a row; ``runs`` takes what it gave, or why it gave nothing."""
    order = order_for(
        runs.row, runs.threads, prompt=str(feed.prompt), decode_tokens=plan.decode_tokens, lengths=plan.prompts,
        golden=str(feed.golden.resolve()) if scored else None, interface=feed.interface,
    )  # fmt: skip
    started = time.perf_counter()
    code, said, words = run_limited([*runs.row.command, order.as_json()], runs.threads, limit_s)
    if code is None:
        runs.failure = f"no result after {limit_s:.0f} s"
        return
    if code != 0 or not said.strip():
        runs.failure = how_it_ended(code, words, limit_s)
        return
    timing = json.loads(said.splitlines()[-1])
    runs.wall_s.append(time.perf_counter() - started - timing["scoring_s"])
    runs.quality = timing["quality"] or runs.quality
    shorter = timing["context_tokens"] != feed.interface["context_tokens"]
    notes = [*timing["notes"], *([f"a cache of {timing['context_tokens']} tokens"] if shorter else [])]
    runs.rounds.append({**kept(timing), "notes": notes})


def how(plan: BenchPlan, subject: Subject) -> str:
    """How the numbers came about, in a few sentences."""
    lengths = ", ".join(str(tokens) for tokens in sorted({MAIN_PROMPT_TOKENS, *plan.prompts}))
    quality = "" if subject.trained else " The weights are random, so quality is measured on the demo model only."
    return (
        f"Measured by `make bench`: medians of {plan.rounds} interleaved rounds, a fresh process per row and round, prompts of {lengths} "
        f"tokens and, after {MAIN_PROMPT_TOKENS} of them, {plan.decode_tokens} single tokens after warm-up; MB are 10^6 bytes, `x` says "
        f"how many times as fast; spread is (most - least) / median of decode tokens/s.{quality}"
    )
