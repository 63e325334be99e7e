"""What decides a recovery run: how long, on what text, for every step its windows and its learning rate; and how far it has come."""

import math
from dataclasses import dataclass, field

import numpy as np
import torch

WARMUP_SHARE = 0.1
FINAL_RATE_SHARE = 0.02  # of the peak, at the end of the cosine


@dataclass(frozen=True)
class Course:
    """What decides a run. ``stream`` int32 ``[n]``; ``validation`` int64 ``[k, window]``; ``bos`` begins each training window.

    ``layers`` are pairs of teacher's and student's layers whose outputs count with ``hidden_weight``; ``patience`` is the number
    of validation measurements without a gain that end the run, 0 for none; ``precision`` as in the recipe;
    ``sparsity`` the share of zeros that training itself has to reach, 0 for none.
    """

    steps: int
    batch_windows: int
    window_tokens: int
    learning_rate: float
    seed: int
    stream: np.ndarray
    validation: torch.Tensor
    bos: int | None
    hidden_weight: float = 0.0
    layers: tuple[tuple[int, int], ...] = ()
    patience: int = 0
    precision: str = "auto"
    sparsity: float = 0.0


@dataclass
class Progress:
    """How far a run has come: ``curve`` holds step, mean training KL and hidden error since the last entry, and validation KL.

    ``cpu_seconds`` of this process, of all its threads, one for each entry of the curve; ``cpu_spent`` until it was saved.
    """

    step: int = 0
    best_step: int = 0
    best_kl: float = math.inf
    diverged: bool = False
    stopped_early: bool = False
    curve: list[dict] = field(default_factory=list)
    pending: list[tuple[float, float]] = field(default_factory=list)  # KL and hidden error of the steps since the last entry
    cpu_seconds: list[float] = field(default_factory=list)
    cpu_spent: float = 0.0


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
