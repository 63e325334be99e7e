"""Knowledge distillation (Hinton et al. 2015): the loop that makes a student's next-token distribution like its teacher's.

Every step is a function of its number and the seed alone (data, learning rate), so a run that resumes from a saved step ends
with the same bytes as one that was never interrupted. Optionally the hidden states after each layer are made alike too.
"""

import math
import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from models.checkpoint import load_model
from models.errors import GateError
from models.families import linear_layers
from models.progress import track
from pipeline.course import Course, Progress, learning_rate_at, training_windows
from pipeline.distil_saved import restore, save
from pipeline.gradual import GradualPruning
from pipeline.hidden_states import layer_outputs, relative_error
from pipeline.team import Team, team

CLIP_NORM = 1.0
EVALUATIONS = 8  # validation measurements spread over the run
SAVE_SECONDS = 30.0
LOGITS_AT_ONCE = 2**25  # elements of one logits tensor in memory: 128 MiB
LARGEST_LOSS = 700.0  # nats: of more the exponential is no number
DIVERGED_FACTOR, DIVERGED_FLOOR = 2.0, 0.05  # validation KL above factor * max(KL before, floor) stops the run


@dataclass(frozen=True)
class Models:
    """Teacher and student, and the folders that other processes load them from."""

    teacher: PreTrainedModel
    student: PreTrainedModel
    teacher_folder: Path
    student_folder: Path


class Distillation:
    """A teacher, a student in training, the student's best state so far, and the optimiser, saved and restored together."""

    def __init__(self, teacher: PreTrainedModel, student: PreTrainedModel, course: Course, crew: Team):
        self.crew = crew
        self.teacher = teacher.to(crew.device)
        self.student = student.to(crew.device).requires_grad_(True)
        self.course = course
        self.parameters = dict(self.student.named_parameters())
        linears = linear_layers(self.student)
        self.masks = {f"{name}.weight": module.weight != 0 for name, module in linears.items() if (module.weight == 0).any()}
        weights = {f"{name}.weight": module.weight for name, module in linears.items()}
        self.gradual = GradualPruning(weights, course.sparsity, course.steps) if course.sparsity else None
        self.best = {name: parameter.detach().clone() for name, parameter in self.parameters.items()}
        self.optimizer = torch.optim.AdamW(self.parameters.values(), lr=course.learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
        self.progress = Progress()
        self.started = time.process_time()
        self.teacher_loss = loss_per_token(self.teacher, course.validation)

    def train_step(self) -> float:
        """One optimiser step; notes its KL and hidden error and returns what was minimised. Not finite: no use going on."""
        course, number = self.course, self.progress.step
        windows = training_windows(course, number)
        mine = self.crew.share(windows)
        sums = [0.0, 0.0]  # KL, hidden error
        at_once = windows_at_once(windows.shape[1], self.student.config.vocab_size)
        for part in mine.split(at_once) if len(mine) else ():
            kl, hidden = self.losses(part)
            share = len(part) / len(windows)
            loss = kl * share
            sums[0] += loss.item()
            if hidden is not None:
                loss = loss + hidden * (course.hidden_weight * share)
                sums[1] += hidden.item() * share
            loss.backward()
        self.crew.add_up_gradients(list(self.parameters.values()))
        if self.gradual:
            self.prune_on(number)
        for name, mask in self.masks.items():  # Adam leaves a weight alone whose gradient was never anything but zero
            self.parameters[name].grad.mul_(mask)
        nn.utils.clip_grad_norm_(self.parameters.values(), CLIP_NORM)
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate_at(course, number)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.progress.step += 1
        kl, hidden = (self.crew.add_up(number) for number in sums)
        self.progress.pending.append((kl, hidden))
        return kl + course.hidden_weight * hidden

    def prune_on(self, number: int) -> None:
        """Let the weights go that are due at a step, and with them the speed that Adam would go on moving them at."""
        self.gradual.look()
        if not self.gradual.due(number):
            return
        self.masks = self.gradual.masks_at(number)
        with torch.no_grad():
            for name, mask in self.masks.items():
                self.parameters[name].mul_(mask)
                if self.parameters[name] in self.optimizer.state:
                    self.optimizer.state[self.parameters[name]]["exp_avg"].mul_(mask)

    def complete(self, step: int) -> bool:
        """Whether a model after ``step`` steps has as many zeros as it is to have."""
        return self.gradual is None or step > self.gradual.last

    def limit(self) -> float:
        """The validation KL that means divergence: by the first measurement of a model that is complete."""
        first = next((entry["validation_kl"] for entry in self.progress.curve if self.complete(entry["step"])), math.inf)
        return DIVERGED_FACTOR * max(first, DIVERGED_FLOOR)

    def losses(self, windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """KL in nats per token and, where it counts, the hidden states' relative squared error, mean over layers."""
        pairs = self.course.layers if self.course.hidden_weight else ()
        teachers, students = [pair[0] for pair in pairs], [pair[1] for pair in pairs]
        with (
            self.crew.autocast(self.course.precision),
            layer_outputs(self.teacher, teachers) as wanted,
            layer_outputs(self.student, students) as given,
        ):
            kl = kl_per_token(self.teacher, self.student, windows)
            if not pairs:
                return kl, None
            return kl, torch.stack([relative_error(wanted[first], given[second]) for first, second in pairs]).mean()

    def evaluate(self) -> float:
        """Measure validation KL, note it, and take the student's state when it is the best so far."""
        progress, validation = self.progress, self.course.validation
        measured = self.crew.add_up(kl_sum(self.teacher, self.student, self.crew.share(validation))) / len(validation)
        steps = len(progress.pending)
        train_kl, hidden = (sum(column) / steps for column in zip(*progress.pending, strict=True)) if steps else (math.nan, math.nan)
        lost = loss_per_token(self.student, validation) - self.teacher_loss
        entry = {"train_kl": train_kl, "validation_kl": measured, "validation_perplexity_ratio": math.exp(min(lost, LARGEST_LOSS))}
        if self.course.hidden_weight:
            entry["train_hidden_error"] = hidden
        numbers = {name: value if math.isfinite(value) else None for name, value in entry.items()}  # JSON knows no NaN
        progress.curve.append({"step": progress.step, **numbers})
        progress.pending.clear()
        progress.cpu_seconds.append(round(self.cpu_spent(), 1))
        if measured < progress.best_kl and self.complete(progress.step):
            progress.best_kl, progress.best_step = measured, progress.step
            for name, parameter in self.parameters.items():
                self.best[name].copy_(parameter.detach())
        return measured

    def cpu_spent(self) -> float:
        """CPU seconds since the run began, those before a kill included."""
        return self.progress.cpu_spent + time.process_time() - self.started

    def out_of_patience(self) -> bool:
        """Whether the last measurements, as many as patience allows, were all no better than the best before them."""
        since = [entry for entry in self.progress.curve if entry["step"] > self.progress.best_step and self.complete(entry["step"])]
        return 0 < self.course.patience <= len(since)


def distil(models: Models, course: Course, resume_file: Path) -> Progress:
    """Train ``models.student`` in place and leave its best state in it. Resumes from ``resume_file`` and keeps it up to date."""
    with team(train_beside, (models.teacher_folder, models.student_folder, course, resume_file)) as crew:
        distillation = train(models.teacher, models.student, course, resume_file, crew)
    if distillation.progress.best_kl == math.inf:
        raise GateError("recovery diverged before it had removed what recover.sparsity asks for; set recover.learning_rate lower")
    with torch.no_grad():
        for name, parameter in distillation.parameters.items():
            parameter.copy_(distillation.best[name])
    models.student.requires_grad_(False).cpu()
    return distillation.progress


def train_beside(teacher_folder: Path, student_folder: Path, course: Course, resume_file: Path, crew: Team) -> None:
    """What every process but the first does: the same steps on models of its own."""
    train(load_model(teacher_folder), load_model(student_folder), course, resume_file, crew)


def train(teacher: PreTrainedModel, student: PreTrainedModel, course: Course, resume_file: Path, crew: Team) -> Distillation:
    """The steps of one process of the team, to the end, to divergence or out of patience; the first one saves and draws."""
    distillation = Distillation(teacher, student, course, crew)
    if resume_file.is_file():
        restore(distillation, resume_file)
    else:
        distillation.evaluate()
    progress = distillation.progress
    evaluated_at = {round(course.steps * part / EVALUATIONS) for part in range(1, EVALUATIONS + 1)}
    saved = time.monotonic()
    steps = range(progress.step, course.steps)
    for _ in track(steps, "recovering") if crew.rank == 0 else steps:
        loss = distillation.train_step()
        measured = distillation.evaluate() if progress.step in evaluated_at else 0.0
        if not (math.isfinite(loss) and measured <= distillation.limit()):
            progress.diverged = True
            break
        if progress.step in evaluated_at and progress.step < course.steps and distillation.out_of_patience():
            progress.stopped_early = True
            break
        if crew.rank == 0 and time.monotonic() - saved > SAVE_SECONDS:
            save(distillation, resume_file)
            saved = time.monotonic()
    return distillation


def kl_per_token(teacher: PreTrainedModel, student: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """Mean KL(teacher || student) over all positions of ``windows`` int64 ``[batch, seq]``, nats per token."""
    with torch.no_grad():
        wanted = functional.log_softmax(teacher(windows, use_cache=False).logits, dim=-1)  # [batch, seq, vocab]
    given = functional.log_softmax(student(windows, use_cache=False).logits, dim=-1)
    return functional.kl_div(given, wanted, reduction="sum", log_target=True) / windows.numel()


def validation_kl(teacher: PreTrainedModel, student: PreTrainedModel, windows: torch.Tensor) -> float:
    """Mean KL(teacher || student) over validation windows int64 ``[k, seq]``, nats per token."""
    return kl_sum(teacher, student, windows) / len(windows)


@torch.no_grad()
def kl_sum(teacher: PreTrainedModel, student: PreTrainedModel, windows: torch.Tensor) -> float:
    """Sum over windows int64 ``[k, seq]`` of each one's mean KL(teacher || student), in full precision."""
    at_once = windows_at_once(windows.shape[1], student.config.vocab_size)
    parts = windows.to(student.device).split(at_once) if len(windows) else ()
    return sum(kl_per_token(teacher, student, part).item() * len(part) for part in parts)


@torch.no_grad()
def loss_per_token(model: PreTrainedModel, windows: torch.Tensor) -> float:
    """Mean loss of the next token over windows int64 ``[k, seq]``, nats per token, in full precision."""
    total = 0.0
    for part in windows.to(model.device).split(windows_at_once(windows.shape[1], model.config.vocab_size)):
        logits = model(part, use_cache=False).logits[:, :-1]  # [batch, seq - 1, vocab]
        total += functional.cross_entropy(logits.flatten(0, 1).float(), part[:, 1:].flatten(), reduction="sum").item()
    return total / windows[:, 1:].numel()


def windows_at_once(window_tokens: int, vocab_size: int) -> int:
    """How many windows fit the limit on logits in memory, at least one."""
    return max(1, LOGITS_AT_ONCE // (window_tokens * vocab_size))
