"""Knowledge distillation (Hinton et al. 2015): the loop that makes a student's next-token distribution like its teacher's.

Every step is a function of its number and the seed alone (data, learning rate), so a run that resumes from a saved step ends
with the same bytes as one that was never interrupted.
"""

import json
import math
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from models.families import linear_layers
from models.progress import track

WARMUP_SHARE = 0.1
FINAL_RATE_SHARE = 0.02  # of the peak, at the end of the cosine
CLIP_NORM = 1.0
EVALUATIONS = 8  # validation measurements spread over the run
SAVE_SECONDS = 30.0
LOGITS_AT_ONCE = 2**25  # elements of one logits tensor in memory: 128 MiB
DIVERGED_FACTOR, DIVERGED_FLOOR = 2.0, 0.05  # validation KL above factor * max(KL before, floor) stops the run


@dataclass(frozen=True)
class Course:
    """What decides a run. ``stream`` int32 ``[n]``; ``validation`` int64 ``[k, window]``; ``bos`` begins each training window."""

    steps: int
    batch_windows: int
    window_tokens: int
    learning_rate: float
    seed: int
    stream: np.ndarray
    validation: torch.Tensor
    bos: int | None


@dataclass
class Progress:
    """How far a run has come: ``curve`` holds step, mean training KL since the last entry and validation KL."""

    step: int = 0
    best_step: int = 0
    best_kl: float = math.inf
    diverged: bool = False
    curve: list[dict] = field(default_factory=list)
    pending: list[float] = field(default_factory=list)  # training KL of the steps since the last entry


class Distillation:
    """A teacher, a student in training, the student's best state so far, and the optimiser, saved and restored together."""

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, course: Course):
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.teacher = teacher.to(self.device)
        self.student = student.to(self.device).requires_grad_(True)
        self.course = course
        self.parameters = dict(self.student.named_parameters())
        linears = linear_layers(self.student)
        self.masks = {f"{name}.weight": module.weight != 0 for name, module in linears.items() if (module.weight == 0).any()}
        self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=course.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.progress = Progress()

    def train_step(self) -> float:
        """One optimiser step; returns its training KL in nats per token."""
        course, number = self.course, self.progress.step
        windows = training_windows(course, number).to(self.device)
        loss_sum = 0.0
        for part in windows.split(windows_at_once(windows.shape[1], self.student.config.vocab_size)):
            loss = kl_per_token(self.teacher, self.student, part) * (len(part) / len(windows))
            loss.backward()
            loss_sum += loss.item()
        for name, mask in self.masks.items():  # Adam leaves a weight alone whose gradient was never anything but zero
            self.parameters[name].grad.mul_(mask)
        nn.utils.clip_grad_norm_(self.parameters.values(), CLIP_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(course, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        return loss_sum

    def evaluate(self) -> float:
        """Measure validation KL, note it, and take the student's state when it is the best so far."""
        progress = self.progress
        measured = validation_kl(self.teacher, self.student, self.course.validation)
        train_kl = sum(progress.pending) / len(progress.pending) if progress.pending else math.nan
        entry = {"train_kl": train_kl, "validation_kl": measured}
        numbers = {name: value if math.isfinite(value) else None for name, value in entry.items()}  # JSON knows no NaN
        progress.curve.append({"step": progress.step, **numbers})
        progress.pending.clear()
        if measured < progress.best_kl:
            progress.best_kl, progress.best_step = measured, progress.step
            for name, parameter in self.parameters.items():
                self.best[name].copy_(parameter.detach())
        return measured

    def save(self, file: Path) -> None:
        """Write everything that `restore` needs; the file is replaced whole or not at all."""
        tensors = {}
        for name, parameter in self.parameters.items():
            tensors[f"student.{name}"], tensors[f"best.{name}"] = parameter.detach(), self.best[name]
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{key}.{name}"] = value
        file.parent.mkdir(exist_ok=True)
        draft = file.with_suffix(".draft")
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        save_file(contiguous, draft, {"progress": json.dumps(asdict(self.progress))})
        os.replace(draft, file)

    @torch.no_grad()
    def restore(self, file: Path) -> None:
        """Go back to what `save` wrote."""
        with safe_open(file, framework="pt", device=str(self.device)) as saved:
            self.progress = Progress(**json.loads(saved.metadata()["progress"]))
            for name, parameter in self.parameters.items():
                parameter.copy_(saved.get_tensor(f"student.{name}"))
                self.best[name].copy_(saved.get_tensor(f"best.{name}"))
                keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in saved.keys()]  # noqa: SIM118
                self.optimizer.state[parameter] = {key: saved.get_tensor(f"{key}.{name}") for key in keys}


def distil(teacher: PreTrainedModel, student: PreTrainedModel, course: Course, resume_file: Path) -> Progress:
    """Train ``student`` in place and leave its best state in it. Resumes from ``resume_file`` and keeps it up to date."""
    distillation = Distillation(teacher, student, course)
    if resume_file.is_file():
        distillation.restore(resume_file)
    else:
        distillation.evaluate()
    progress = distillation.progress
    limit = DIVERGED_FACTOR * max(progress.curve[0]["validation_kl"], DIVERGED_FLOOR)
    evaluated_at = {round(course.steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
    saved = time.monotonic()
    for _ in track(range(progress.step, course.steps), "recovering"):
        train_kl = distillation.train_step()
        progress.pending.append(train_kl)
        measured = distillation.evaluate() if progress.step in evaluated_at else 0.0
        if not (math.isfinite(train_kl) and measured <= limit):
            progress.diverged = True
            break
        if time.monotonic() - saved > SAVE_SECONDS:
            distillation.save(resume_file)
            saved = time.monotonic()
    with torch.no_grad():
        for name, parameter in distillation.parameters.items():
            parameter.copy_(distillation.best[name])
    student.requires_grad_(False).cpu()
    return progress


def kl_per_token(teacher: PreTrainedModel, student: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || student) over all positions of ``windows`` int64 ``[batch, seq]``, nats per token."""
    with torch.no_grad():
        wanted = functional.log_softmax(teacher(windows, use_cache=False).logits, dim=-1)  # [batch, seq, vocab]
    given = functional.log_softmax(student(windows, use_cache=False).logits, dim=-1)
    return functional.kl_div(given, wanted, reduction="sum", log_target=True) / windows.numel()


@torch.no_grad()
def validation_kl(teacher: PreTrainedModel, student: PreTrainedModel, windows: torch.Tensor) -> float:
    """Mean KL(teacher || student) over validation windows int64 ``[k, seq]``, nats per token."""
    at_once = windows_at_once(windows.shape[1], student.config.vocab_size)
    parts = windows.to(student.device).split(at_once)
    return sum(kl_per_token(teacher, student, part).item() * len(part) for part in parts) / len(windows)


def windows_at_once(window_tokens: int, vocab_size: int) -> int:
    """How many windows fit the limit on logits in memory, at least one."""
    return max(1, LOGITS_AT_ONCE // (window_tokens * vocab_size))


def training_windows(course: Course, step: int) -> torch.Tensor:
    """The windows int64 ``[batch_windows, window_tokens]`` of a step: random offsets in the stream, drawn from seed and step."""
    body = course.window_tokens - (course.bos is not None)
    offsets = np.random.default_rng((course.seed, step)).integers(0, len(course.stream) - body + 1, course.batch_windows)
    windows = course.stream[offsets[:, None] + np.arange(body)].astype(np.int64)
    if course.bos is not None:
        windows = np.concatenate([np.full((len(windows), 1), course.bos), windows], axis=1)
    return torch.from_numpy(windows)


def learning_rate_at(course: Course, step: int) -> float:
    """Linear warm-up, then a cosine down to a small share of the peak."""
    warmup = max(1, round(WARMUP_SHARE * course.steps))
    if step < warmup:
        return course.learning_rate * (step + 1) / warmup
    passed = (step - warmup) / max(1, course.steps - warmup)
    return course.learning_rate * (FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * 0.5 * (1 + math.cos(math.pi * passed)))
