"""The stage that heals what pruning did, by distillation from the dense model.

Weights that pruning set to zero stay exactly zero; the learning rate follows the damage; by KL on validation windows the best of
before and after is kept, so this stage never makes a model worse there. It stops by itself when it diverges or, with
``patience``, when the validation windows gain no more: they are neither trained on nor part of the evaluation.
"""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from models.checkpoint import load_model, save_model
from models.errors import GateError, UserError
from models.families import linear_layers
from models.provenance import library_versions, settings_record, write_json
from pipeline import gradual
from pipeline.course import Course
from pipeline.distil import Models, Progress, distil, validation_kl
from pipeline.hidden_states import shared_layers
from pipeline.settings import RecoverSettings
from pipeline.team import Team, processes

NOTHING_LOST_KL = 1e-6  # nats per token: fp32 rounding between two equal models
# Damage (validation KL, nats per token) and a peak learning rate that heals it, at hidden size 256. In the middle the best of
# 3e-4, 1e-3 and 3e-3 for FFN and layer pruning; at the top for 90 % sparsity. Lightly pruned models get worse at 1e-3.
DAMAGE_TO_LEARNING_RATE = ((0.01, 1e-4), (0.12, 3e-4), (2.4, 4e-3))
TUNED_HIDDEN_SIZE = 256


def run(settings: RecoverSettings, out: Path, checkpoint: Path, prune: Path, text: Path) -> None:
    """Distil from ``checkpoint`` into the model of ``prune``; write the kept model and recover.json into ``out``."""
    teacher, student = load_model(checkpoint), load_model(prune)
    layers = shared_layers(teacher, student, prune) if settings.hidden_weight and settings.steps else ()
    validation = torch.from_numpy(np.load(text / "validation.npy").astype(np.int64))
    damage = validation_kl(teacher, student, validation)
    if not math.isfinite(damage):
        raise GateError(f"the pruned model's validation KL is {damage}, so there is nothing to recover from; set prune.* lower")
    zeros = zero_masks(student)
    rate, progress, why_not = None, None, None
    if settings.steps == 0:
        why_not = "recover.steps is 0"
    elif damage <= NOTHING_LOST_KL and not settings.sparsity:
        why_not = "the pruned model is the dense model"
    else:
        rate = settings.learning_rate or peak_rate(settings, damage, student.config.hidden_size)
        course = replace(course_of(settings, student, rate, validation, text), layers=layers)
        progress = distil(Models(teacher, student, checkpoint, prune), course, out / ".resume" / "distillation.safetensors")
        check_zeros(student, zeros)
        check_left(student)
    save_model(student, out, tokenizer_from=prune)
    record = {
        "validation_kl": {"before": damage, **kl_after(progress, damage)},
        "kept": f"step {progress.best_step}" if progress and progress.best_step else "before",
        "not_trained_because": why_not,
        "diverged": bool(progress and progress.diverged),
        "stopped_early": bool(progress and progress.stopped_early),
        "learning_rate": rate,
        "precision": str(Team().precision(settings.precision)).removeprefix("torch."),
        "processes": processes(),
        "tokens_seen": (progress.step if progress else 0) * settings.batch_windows * settings.window_tokens,
        "sparsity": sparsity_of(student),
        "curve": progress.curve if progress else [],
        "settings": settings_record(settings),
        "versions": library_versions("torch", "transformers", "safetensors", "numpy"),
    }
    write_json(out / "recover.json", record)
    spent = progress.cpu_seconds if progress else []  # a file of its own: no two runs take the same time
    write_json(out / "times.json", {"curve_cpu_seconds": spent, "threads": torch.get_num_threads()})
    shutil.rmtree(out / ".resume", ignore_errors=True)


def course_of(settings: RecoverSettings, student: PreTrainedModel, rate: float, validation: torch.Tensor, text: Path) -> Course:
    """What decides the run; UserError when a window fits neither the context nor the text."""
    stream = np.load(text / "recovery.npy")
    context = student.config.max_position_embeddings
    if settings.window_tokens > context:
        raise UserError(
            f"recover.window_tokens is {settings.window_tokens} but the context is {context} tokens; set it to {context} or less"
        )
    if settings.window_tokens > len(stream):
        raise UserError(f"recover.window_tokens is {settings.window_tokens} but there are {len(stream)} tokens; give more text")
    return Course(
        steps=settings.steps,
        batch_windows=settings.batch_windows,
        window_tokens=settings.window_tokens,
        learning_rate=rate,
        seed=settings.seed,
        stream=stream,
        validation=validation,
        hidden_weight=settings.hidden_weight,
        patience=settings.patience,
        precision=settings.precision,
        sparsity=settings.sparsity,
        bos=json.loads((text / "text.json").read_text(encoding="utf-8"))["bos_token_id"],
    )


def peak_rate(settings: RecoverSettings, damage: float, hidden_size: int) -> float:
    """The learning rate where none is given: by the damage that is there, or for what training itself will remove."""
    if settings.sparsity:
        return gradual.LEARNING_RATE * min(1.0, TUNED_HIDDEN_SIZE / hidden_size)
    return learning_rate_for(damage, hidden_size)


def learning_rate_for(damage: float, hidden_size: int) -> float:
    """Peak learning rate for a damage in nats per token: on straight lines between the measured points, both axes logarithmic.

    Beyond the last points it stays constant. Above the hidden size that it was measured at it falls as 1 / hidden size, the rule
    under which Adam's steps keep their effect as layers get wider (Yang et al. 2022, arXiv:2203.03466).
    """
    damages, rates = zip(*DAMAGE_TO_LEARNING_RATE, strict=True)
    rate = math.exp(np.interp(math.log(max(damage, NOTHING_LOST_KL)), np.log(damages), np.log(rates)))
    return rate * min(1.0, TUNED_HIDDEN_SIZE / hidden_size)


def zero_masks(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    """For every linear layer where its weight is exactly zero, bool in the weight's shape."""
    return {name: module.weight == 0 for name, module in linear_layers(model).items()}


def check_zeros(model: PreTrainedModel, zeros: dict[str, torch.Tensor]) -> None:
    """GateError unless every weight that was zero still is."""
    for name, module in linear_layers(model).items():
        grown = int((module.weight[zeros[name]] != 0).sum())
        if grown:
            raise GateError(f"recovery let {grown} pruned weights of {name} grow back (limit 0); report this as a bug")


def check_left(model: PreTrainedModel) -> None:
    """UserError where nothing is left of a layer."""
    for name, module in linear_layers(model).items():
        if not module.weight.any():
            raise UserError(f"recover.sparsity leaves nothing of {name}; set it lower, or recover.learning_rate")


def sparsity_of(model: PreTrainedModel) -> float:
    """Share of zeros in the linear layers."""
    masks = zero_masks(model).values()
    return sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)


def kl_after(progress: Progress | None, damage: float) -> dict[str, float]:
    """Validation KL of the last step and of the model that was kept."""
    if progress is None:
        return {"after": damage, "kept": damage}
    return {"after": progress.curve[-1]["validation_kl"], "kept": progress.best_kl}
