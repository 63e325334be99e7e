"""A distillation on disk: all that a run needs to go on where it was, to the same last bit."""

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from pipeline.course import Progress

if TYPE_CHECKING:
    from pipeline.distil import Distillation


def save(run: "Distillation", file: Path) -> None:
    """Write everything that `restore` needs; the file is replaced whole or not at all."""
    tensors = {}
    for name, parameter in run.parameters.items():
        tensors[f"student.{name}"], tensors[f"best.{name}"] = parameter.detach(), run.best[name]
        for key, value in run.optimizer.state[parameter].items():
            tensors[f"{key}.{name}"] = value
    if run.gradual:
        tensors |= {f"score.{name}": score for name, score in run.gradual.scores.items()}
    file.parent.mkdir(exist_ok=True)
    draft = file.with_suffix(".draft")
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    progress = replace(run.progress, cpu_spent=run.cpu_spent())
    save_file(contiguous, draft, {"progress": json.dumps(asdict(progress))})
    os.replace(draft, file)


@torch.no_grad()
def restore(run: "Distillation", file: Path) -> None:
    """Go back to what `save` wrote."""
    with safe_open(file, framework="pt", device=str(run.crew.device)) as saved:
        run.progress = Progress(**json.loads(saved.metadata()["progress"]))
        for name, parameter in run.parameters.items():
            parameter.copy_(saved.get_tensor(f"student.{name}"))
            run.best[name].copy_(saved.get_tensor(f"best.{name}"))
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}.{name}" in saved.keys()]  # noqa: SIM118
            run.optimizer.state[parameter] = {key: saved.get_tensor(f"{key}.{name}") for key in keys}
        if run.gradual:
            run.gradual.scores = {name: saved.get_tensor(f"score.{name}") for name in run.gradual.scores}
            run.masks = {name: run.parameters[name] != 0 for name in run.gradual.weights}
