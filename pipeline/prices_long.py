"""The rows of ``make prices`` that recover for about ten minutes of two cores instead of one: how far heavy cuts come back.

So many steps need more text than stands beside the demo model, or they would learn it by heart: whole files of the corpus that it
was trained on, none of them held-out. The curve is part of the numbers, with the CPU seconds that each point took.
"""

import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from models.checkpoint import load_model, save_model
from models.corpus import collect, split_of
from models.demo_data import choose
from models.progress import track
from pipeline.course import learning_rate_at, training_windows
from pipeline.gradual import last_pruning_step
from pipeline.prices_kept import Earlier, kept, row_key, stage_keys
from pipeline.prices_measure import Dense
from pipeline.prices_plan import BATCH_WINDOWS, LONG_STEPS, LongRow, long_rows
from pipeline.recipe import Recipe, load_recipe
from pipeline.recover import course_of
from pipeline.report import read_json
from pipeline.runner import plan, run_stages
from pipeline.settings import RecoverSettings
from pipeline.team import Team

TEXT_BYTES = 8_000_000  # 2.4 million tokens, more than any row draws
PRECISION = "bfloat16"
CONTROL_RATE = 1e-4  # what recovery takes for a lightly damaged model
CLIP_NORM = 1.0
Tell = Callable[[str, str], None]


def recovery_text(work: Path) -> Path:
    """The text that long recoveries are trained on, made once from what the environment installs."""
    path = work / "prices" / "recovery_text.txt"
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        sources = choose([source for source in collect() if split_of(source.path) == "train"], TEXT_BYTES)
        draft = path.with_suffix(".draft")
        draft.write_text("\n".join(source.text for source in sources), encoding="utf-8")
        draft.replace(path)
    return path.resolve()


def long_recipe(row: LongRow, text: Path) -> Recipe:
    """The recipe of a row, on the long text; judged on the same held-out windows as every other row."""
    steps = (f"recover.steps={row.steps}", f"recover.batch_windows={BATCH_WINDOWS}", f'recover.precision="{PRECISION}"')
    return load_recipe(None, ["prune.ffn=0", f'text.calibration="{text}"', *row.overrides, *steps])


def measure_long(work: Path, dense: Dense, earlier: Earlier, tell: Tell) -> dict:
    """Every long row with its curve, and the dense model trained on the same text."""
    text = recovery_text(work)
    rows = [priced_long(row, work, dense, earlier, tell) for row in long_rows()]
    return {
        "rows": rows,
        "control": priced_control(work, text, LONG_STEPS, dense, PRECISION, earlier),
        "text_bytes": text.stat().st_size,
    }


def priced_long(row: LongRow, work: Path, dense: Dense, earlier: Earlier, tell: Tell) -> dict:
    """One row: recover, score on held-out windows, and put the curve together with its CPU seconds."""
    recipe = long_recipe(row, recovery_text(work))
    key = row_key("model", stage_keys(plan(recipe, work, ("recover",)), ("recover", "text")))
    known = [found for found in earlier.found.get("long", {}).get("rows", ()) if found["key"] == key]
    if known:
        return known[0]
    folders, runs = run_stages(recipe, work, lambda stage, state: state != "cached" and tell(row.name, f"{stage} {state}"), ("recover",))
    recovered, times = read_json(folders["recover"] / "recover.json"), read_json(folders["recover"] / "times.json")
    window_tokens = RecoverSettings().window_tokens
    curve = [
        {**entry, "tokens": entry["step"] * BATCH_WINDOWS * window_tokens, "cpu_seconds": seconds}
        for entry, seconds in zip(recovered["curve"], times["curve_cpu_seconds"], strict=True)
    ]
    return {
        "name": row.name,
        "target": row.target,
        "key": key,
        "steps": row.steps,
        "tokens": recovered["tokens_seen"],
        "sparsity": recovered["sparsity"],
        "pruned_until_step": last_pruning_step(row.steps) if recipe.recover.sparsity else 0,
        "learning_rate": recovered["learning_rate"],
        "kept": recovered["kept"],
        "cpu_seconds": curve[-1]["cpu_seconds"],
        "threads": times["threads"],
        "prune_seconds": next(run.seconds for run in runs if run.stage == "prune"),
        **asdict(dense.price(folders["recover"])),
        "curve": curve,
    }


def priced_control(work: Path, text: Path | None, steps: int, dense: Dense, precision: str, earlier: Earlier) -> dict:
    """The dense model trained on for ``steps`` on ``text`` (None: the recipe's own): what training alone would give."""
    recipe = load_recipe(None, ["prune.ffn=0", *([f'text.calibration="{text}"'] if text else [])])
    folders, _ = run_stages(recipe, work, lambda stage, state: None, ("text",))
    parts = [steps, folders["checkpoint"].name, folders["text"].name, precision]

    def measured() -> dict:
        folder = work / "prices" / "control"
        folder.mkdir(parents=True, exist_ok=True)
        model, spent = trained_on(folders["checkpoint"], folders["text"], steps, precision)
        save_model(model, folder, tokenizer_from=folders["checkpoint"])
        return {**asdict(dense.price(folder)), "cpu_seconds": spent}

    key = row_key("control", parts)
    known = [row for row in (earlier.found.get("long", {}).get("control", {}), *earlier.found.get("models", ())) if row.get("key") == key]
    found = known[0] if known else kept(work, "control", parts, measured)
    return {**found, "key": key, "steps": steps}


def trained_on(checkpoint: Path, text: Path, steps: int, precision: str) -> tuple[nn.Module, float]:
    """The checkpoint after ``steps`` of plain next-token training on the recovery text, in recovery's batches and schedule.

    Also the CPU seconds that it took.
    """
    began = time.process_time()
    model = load_model(checkpoint).requires_grad_(True)
    validation = torch.from_numpy(np.load(text / "validation.npy").astype(np.int64))
    course = course_of(RecoverSettings(steps=steps, batch_windows=BATCH_WINDOWS), model, CONTROL_RATE, validation, text)
    optimizer = torch.optim.AdamW(model.parameters(), lr=CONTROL_RATE, betas=(0.9, 0.98), weight_decay=0.0)
    for step in track(range(steps), "training the control"):
        windows = training_windows(course, step)
        with Team().autocast(precision):
            logits = model(windows, use_cache=False).logits[:, :-1]  # [batch, seq - 1, vocab]
            loss = functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate_at(course, step)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return model.requires_grad_(False), round(time.process_time() - began, 1)
