"""Recovery: it gets better, never worse, pruned weights stay gone, and a killed run ends as if nobody had killed it."""

import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from conftest import tiny_model
from models.checkpoint import load_model, save_model
from models.errors import GateError, UserError
from models.families import SUPPORTED_FAMILIES, linear_layers
from pipeline import distil, recover
from pipeline.prune import zero_smallest
from pipeline.settings import RecoverSettings

SETTINGS = RecoverSettings(steps=24, batch_windows=4, window_tokens=32, learning_rate=2e-3)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text stage's result: a stream with structure in it (repeats), and validation windows of the same kind."""
    folder = tmp_path_factory.mktemp("text_stage")
    stream = np.random.default_rng(0).zipf(1.4, 3000).clip(max=383).astype(np.int32)
    np.save(folder / "recovery.npy", stream[:2700])
    np.save(folder / "validation.npy", stream[2700:2988].reshape(9, 32))
    (folder / "text.json").write_text(json.dumps({"bos_token_id": None}))
    return folder


@pytest.fixture(scope="module")
def pruned(checkpoints, tmp_path_factory) -> dict[str, Path]:
    """Half of the weights of every family's checkpoint gone."""
    root = tmp_path_factory.mktemp("pruned")
    for family in SUPPORTED_FAMILIES:
        model = load_model(checkpoints[family])
        zero_smallest(model, 0.5)
        save_model(model, root / family, tokenizer_from=checkpoints[family])
    return {family: root / family for family in SUPPORTED_FAMILIES}


def make(out: Path, settings: RecoverSettings, checkpoint: Path, student: Path, text: Path) -> dict:
    out.mkdir(exist_ok=True)
    recover.run(settings, out, checkpoint=checkpoint, prune=student, text=text)
    assert not (out / ".resume").exists()
    return json.loads((out / "recover.json").read_text())


def naive_kl(teacher: Path, student: Path, text: Path) -> float:
    """Mean over tokens of sum_v p log(p / q), in float64, from probabilities."""
    windows = torch.from_numpy(np.load(text / "validation.npy").astype(np.int64))
    with torch.no_grad():
        p, q = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(windows).logits.double().softmax(-1) for folder in (teacher, student)
        )  # each [windows, seq, vocab]
    return float((p * (p / q).log()).sum(-1).mean())


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_recovery_heals_and_zeros_stay_zero(family, checkpoints, pruned, text, tmp_path):
    record = make(tmp_path / "out", SETTINGS, checkpoints[family], pruned[family], text)
    kl = record["validation_kl"]
    assert kl["kept"] < 0.8 * kl["before"]
    assert kl["before"] == pytest.approx(naive_kl(checkpoints[family], pruned[family], text), rel=1e-4)
    assert kl["kept"] == pytest.approx(naive_kl(checkpoints[family], tmp_path / "out", text), rel=1e-4)
    before, after = load_model(pruned[family]), load_model(tmp_path / "out")
    for name, module in linear_layers(after).items():
        assert torch.equal(module.weight == 0, before.get_submodule(name).weight == 0)
        assert not torch.equal(module.weight, before.get_submodule(name).weight)
    assert record["sparsity"] == pytest.approx(0.5, abs=1e-3)


def test_smaller_student_of_another_shape(text, checkpoints, tmp_path):
    dense = tiny_model("qwen3", layers=3)
    for folder, layers in (("dense", 3), ("small", 2)):
        dense.model.layers = dense.model.layers[:layers]
        dense.config.num_hidden_layers, dense.config.layer_types = layers, ["full_attention"] * layers
        save_model(dense, tmp_path / folder, tokenizer_from=checkpoints["qwen3"])
    kl = make(tmp_path / "out", SETTINGS, tmp_path / "dense", tmp_path / "small", text)["validation_kl"]
    assert kl["kept"] < 0.8 * kl["before"]


def test_rate_that_is_far_too_high_diverges_and_the_pruned_model_is_kept(checkpoints, pruned, text, tmp_path):
    reckless = SETTINGS.model_copy(update={"learning_rate": 30.0})
    record = make(tmp_path / "out", reckless, checkpoints["llama"], pruned["llama"], text)
    assert record["diverged"] and record["kept"] == "before"
    assert record["validation_kl"]["kept"] == record["validation_kl"]["before"]
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (pruned["llama"] / "model.safetensors").read_bytes()


def test_no_steps_is_a_copy(checkpoints, pruned, text, tmp_path):
    record = make(tmp_path / "out", RecoverSettings(), checkpoints["llama"], pruned["llama"], text)
    assert record["not_trained_because"] == "recover.steps is 0" and record["validation_kl"]["before"] > 0
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (pruned["llama"] / "model.safetensors").read_bytes()


def test_nothing_lost_needs_no_training(checkpoints, text, tmp_path):
    record = make(tmp_path / "out", SETTINGS, checkpoints["llama"], checkpoints["llama"], text)
    assert record["not_trained_because"] == "the pruned model is the dense model" and record["curve"] == []


def test_killed_run_resumes_to_the_same_bytes(checkpoints, pruned, text, tmp_path, monkeypatch):
    make(tmp_path / "whole", SETTINGS, checkpoints["llama"], pruned["llama"], text)
    monkeypatch.setattr(distil, "SAVE_SECONDS", 0.0)  # save after every step
    train_step, taken = distil.Distillation.train_step, []

    def killed_at_the_tenth(self):
        taken.append(self.progress.step)
        if len(taken) == 10:
            raise KeyboardInterrupt
        return train_step(self)

    monkeypatch.setattr(distil.Distillation, "train_step", killed_at_the_tenth)
    (tmp_path / "killed").mkdir()
    with pytest.raises(KeyboardInterrupt):
        recover.run(SETTINGS, tmp_path / "killed", checkpoint=checkpoints["llama"], prune=pruned["llama"], text=text)
    assert [path.name for path in (tmp_path / "killed").iterdir()] == [".resume"]
    make(tmp_path / "killed", SETTINGS, checkpoints["llama"], pruned["llama"], text)
    assert taken == [*range(10), *range(9, 24)]
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


def test_logits_in_parts_give_the_same_step(checkpoints, pruned, text, tmp_path, monkeypatch):
    """Large vocabularies go through in several parts; gradients must add up to the same step."""
    settings = SETTINGS.model_copy(update={"steps": 2})
    make(tmp_path / "one", settings, checkpoints["llama"], pruned["llama"], text)
    monkeypatch.setattr(distil, "LOGITS_AT_ONCE", 32 * 384)
    make(tmp_path / "many", settings, checkpoints["llama"], pruned["llama"], text)
    one, many = (load_model(tmp_path / name).get_parameter("model.layers.0.mlp.up_proj.weight") for name in ("one", "many"))
    start = load_model(pruned["llama"]).get_parameter("model.layers.0.mlp.up_proj.weight")
    assert float((one - many).abs().max()) < 0.05 * float((one - start).abs().max())


def test_training_windows_come_from_the_stream():
    course = distil.Course(10, 5, 12, 1e-3, 3, np.arange(100, 140, dtype=np.int32), torch.zeros(1, 4), bos=7)
    windows = torch.cat([distil.training_windows(course, step) for step in range(300)])
    assert windows.shape == (1500, 12) and (windows[:, 0] == 7).all()
    assert (windows[:, 1:].diff(dim=1) == 1).all()
    assert windows[:, 1].min() == 100 and windows[:, -1].max() == 139  # both ends are reached
    assert torch.equal(distil.training_windows(course, 4), distil.training_windows(course, 4))
    assert not torch.equal(distil.training_windows(course, 4), distil.training_windows(replace(course, seed=4), 4))


def test_rate_warms_up_and_falls():
    course = distil.Course(200, 1, 16, 1e-3, 0, np.arange(9), torch.zeros(1, 4), None)
    rates = [distil.learning_rate_at(course, step) for step in range(200)]
    assert max(rates) == pytest.approx(1e-3) and np.argmax(rates) in (19, 20)  # a tenth of the steps warms up
    assert (np.diff(rates[:20]) > 0).all() and (np.diff(rates[20:]) < 0).all()
    assert rates[0] == pytest.approx(5e-5) and rates[-1] < 3e-5


@given(st.floats(1e-9, 50), st.floats(1, 1000), st.sampled_from([64, 256, 1024, 4096]))
def test_rate_grows_with_damage_and_falls_with_width(damage, factor, hidden_size):
    low, high = recover.learning_rate_for(damage, hidden_size), recover.learning_rate_for(damage * factor, hidden_size)
    rates = [rate for _, rate in recover.DAMAGE_TO_LEARNING_RATE]
    scale = min(1, recover.TUNED_HIDDEN_SIZE / hidden_size)
    assert rates[0] * scale * 0.999 <= low <= high * 1.000001 <= rates[-1] * scale * 1.001
    for point, rate in recover.DAMAGE_TO_LEARNING_RATE:
        assert math.isclose(recover.learning_rate_for(point, 256), rate, rel_tol=1e-9)


def test_pruned_weights_that_grew_back_fail_the_gate(pruned):
    model = load_model(pruned["llama"])
    zeros = recover.zero_masks(model)
    recover.check_zeros(model, zeros)
    weight = model.model.layers[1].mlp.up_proj.weight
    weight[tuple(torch.nonzero(weight == 0)[0])] = 1e-8
    with pytest.raises(GateError, match="1 pruned weights of model.layers.1.mlp.up_proj grow back"):
        recover.check_zeros(model, zeros)


@pytest.mark.parametrize(("window_tokens", "said"), [(129, "set it to 128 or less"), (64, "there are 40 tokens")])
def test_windows_that_fit_nothing(window_tokens, said, checkpoints, pruned, tmp_path):
    np.save(tmp_path / "recovery.npy", np.arange(40, dtype=np.int32))
    np.save(tmp_path / "validation.npy", np.zeros((1, 16), dtype=np.int32))
    (tmp_path / "text.json").write_text('{"bos_token_id": null}')
    with pytest.raises(UserError, match=said):
        make(tmp_path, RecoverSettings(steps=1, window_tokens=window_tokens), checkpoints["llama"], pruned["llama"], tmp_path)
