"""Pruning while recovering: the share that was asked for, by the cubic that the paper gives, and what went stays away."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from models.checkpoint import load_model
from models.errors import GateError, UserError
from models.families import SUPPORTED_FAMILIES, linear_layers
from pipeline import distil, recover
from pipeline.gradual import GradualPruning
from pipeline.settings import RecoverSettings

SETTINGS = RecoverSettings(steps=40, batch_windows=4, window_tokens=32, learning_rate=2e-3, sparsity=0.6)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text_stage")
    stream = np.random.default_rng(0).zipf(1.4, 3000).clip(max=383).astype(np.int32)
    np.save(folder / "recovery.npy", stream[:2700])
    np.save(folder / "validation.npy", stream[2700:2988].reshape(9, 32))
    (folder / "text.json").write_text(json.dumps({"bos_token_id": None}))
    return folder


@pytest.fixture(scope="module")
def dense(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """What the stage prune gives where it removes nothing."""
    root = tmp_path_factory.mktemp("dense")
    for family in SUPPORTED_FAMILIES:
        shutil.copytree(checkpoints[family], root / family)
        (root / family / "prune.json").write_text('{"removed_layers": []}')
    return {family: root / family for family in SUPPORTED_FAMILIES}


def make(out: Path, settings: RecoverSettings, checkpoint: Path, student: Path, text: Path) -> dict:
    out.mkdir(exist_ok=True)
    recover.run(settings, out, checkpoint=checkpoint, prune=student, text=text)
    return json.loads((out / "recover.json").read_text())


def zeros_of(folder: Path) -> tuple[int, int]:
    layers = linear_layers(load_model(folder)).values()
    return sum(int((layer.weight == 0).sum()) for layer in layers), sum(layer.weight.numel() for layer in layers)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_the_model_that_is_kept_has_the_share_that_was_asked_for(family, checkpoints, dense, text, tmp_path):
    record = make(tmp_path / "out", SETTINGS, checkpoints[family], dense[family], text)
    zeros, weights = zeros_of(tmp_path / "out")
    assert zeros == round(0.6 * weights) and record["sparsity"] == pytest.approx(zeros / weights)
    complete = [entry for entry in record["curve"] if entry["step"] > 20]  # three fifths of 40 in tens: the last goes at step 20
    assert record["validation_kl"]["kept"] == min(entry["validation_kl"] for entry in complete)
    assert record["kept"] in {f"step {entry['step']}" for entry in complete}


def test_what_is_zero_before_stays_and_counts(checkpoints, dense, text, tmp_path):
    model = load_model(dense["llama"])
    first = next(iter(linear_layers(model).values()))
    with torch.no_grad():
        first.weight[:, ::2] = 0
    recover.save_model(model, tmp_path / "half", tokenizer_from=dense["llama"])
    (tmp_path / "half" / "prune.json").write_text('{"removed_layers": []}')
    make(tmp_path / "out", SETTINGS, checkpoints["llama"], tmp_path / "half", text)
    after = next(iter(linear_layers(load_model(tmp_path / "out")).values()))
    assert (after.weight[:, ::2] == 0).all()
    zeros, weights = zeros_of(tmp_path / "out")
    assert zeros == round(0.6 * weights)


@pytest.mark.parametrize("killed_at", [3, 14, 35])
def test_a_killed_run_ends_with_the_same_bytes(killed_at, checkpoints, dense, text, tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "SAVE_SECONDS", 0.0)
    train_step = distil.Distillation.train_step

    def killed(self):
        if self.progress.step == killed_at:
            raise KeyboardInterrupt
        return train_step(self)

    make(tmp_path / "whole", SETTINGS, checkpoints["llama"], dense["llama"], text)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distil.Distillation, "train_step", killed)
        make(tmp_path / "killed", SETTINGS, checkpoints["llama"], dense["llama"], text)
    make(tmp_path / "killed", SETTINGS, checkpoints["llama"], dense["llama"], text)
    for name in ("model.safetensors", "recover.json"):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes()


@given(st.integers(40, 3000), st.floats(0.2, 0.95))
def test_the_share_follows_the_cubic_and_never_falls(steps, target):
    weight = nn.Parameter(torch.arange(1.0, 101).reshape(10, 10))
    with torch.no_grad():
        weight[0] = 0  # a tenth is gone before
    pruning = GradualPruning({"w": weight}, target, steps)
    shares = [pruning.share_at(step) for step in range(steps)]
    assert shares[0] == pytest.approx(0.1) and shares[-1] == target
    assert all(later >= earlier for earlier, later in zip(shares, shares[1:], strict=False))
    middle = pruning.last / 2
    assert pruning.share_at(middle) == pytest.approx(target + (0.1 - target) / 8)  # half the way: an eighth is left
    assert pruning.last <= 0.6 * steps and pruning.due(pruning.last) and not any(map(pruning.due, range(pruning.last + 1, steps)))


def test_what_the_loss_would_miss_least_goes_first():
    weights = {"a": nn.Parameter(torch.tensor([[1.0, -2.0], [3.0, 4.0]])), "b": nn.Parameter(torch.tensor([[5.0, 6.0]]))}
    pruning = GradualPruning(weights, 0.5, 100)
    gradients = {"a": torch.tensor([[9.0, 1.0], [0.1, 1.0]]), "b": torch.tensor([[-0.01, 1.0]])}
    for name, weight in weights.items():
        weight.grad = gradients[name]
    pruning.look()
    masks = pruning.masks_at(pruning.last)  # |g w|: 9, 2, 0.3, 4 and 0.05, 6
    assert masks["a"].tolist() == [[True, False], [False, True]] and masks["b"].tolist() == [[False, True]]


def test_sparsity_that_cannot_be_reached_is_refused(checkpoints, dense, text, tmp_path):
    with pytest.raises(UserError, match=r"steps is 12, too few .* set it to 34 or more"):
        make(tmp_path / "few", SETTINGS.model_copy(update={"steps": 12}), checkpoints["llama"], dense["llama"], text)
    make(tmp_path / "sparse", SETTINGS, checkpoints["llama"], dense["llama"], text)
    (tmp_path / "sparse" / "prune.json").write_text('{"removed_layers": []}')
    with pytest.raises(UserError, match=r"recover.sparsity is 0.5 but 0.60 of the weights are zero before it; set it higher"):
        make(tmp_path / "less", SETTINGS.model_copy(update={"sparsity": 0.5}), checkpoints["llama"], tmp_path / "sparse", text)
    with pytest.raises(ValueError, match="steps is 0, so it would do nothing"):
        RecoverSettings(sparsity=0.5)


def test_divergence_before_the_share_is_reached_is_told(checkpoints, dense, text, tmp_path, monkeypatch):
    train_step = distil.Distillation.train_step
    monkeypatch.setattr(
        distil.Distillation, "train_step", lambda self: (train_step(self), math.nan)[1] if self.progress.step == 8 else train_step(self)
    )
    with pytest.raises(GateError, match="before it had removed what recover.sparsity asks for; set recover.learning_rate lower"):
        make(tmp_path / "out", SETTINGS, checkpoints["llama"], dense["llama"], text)


def test_a_layer_that_is_left_empty_is_named(checkpoints):
    model = load_model(checkpoints["llama"])
    name, module = list(linear_layers(model).items())[3]
    recover.check_left(model)
    with torch.no_grad():
        module.weight.zero_()
    with pytest.raises(UserError, match=f"leaves nothing of {name}; set it lower"):
        recover.check_left(model)
