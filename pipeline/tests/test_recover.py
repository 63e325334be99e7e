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
from pipeline import distil, hidden_states, recover, team
from pipeline.settings import PruneSettings, RecoverSettings
from pipeline.sparsify import sparsify
from pipeline.structure import keep_layers

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
        sparsify(model, torch.zeros(1, 1, dtype=torch.int64), PruneSettings(method="magnitude", sparsity=0.5))
        save_model(model, root / family, tokenizer_from=checkpoints[family])
        (root / family / "prune.json").write_text('{"removed_layers": []}')
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
        assert path.name == "times.json" or path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


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


def hidden_error(teacher: Path, student: Path, pairs: list[tuple[int, int]], text: Path) -> float:
    """Mean over layers and tokens of the hidden states' relative squared error, by transformers' own list of hidden states.

    In that list entry ``n + 1`` is what layer ``n`` gave, but the last one has gone through the final norm: it is not asked for.
    """
    windows = torch.from_numpy(np.load(text / "validation.npy").astype(np.int64))
    with torch.no_grad():
        t, s = (
            AutoModelForCausalLM.from_pretrained(folder).eval()(windows, output_hidden_states=True).hidden_states
            for folder in (teacher, student)
        )
    return float(np.mean([((s[b + 1] - t[a + 1]).norm(dim=-1) / t[a + 1].norm(dim=-1)).square().mean().item() for a, b in pairs]))


@pytest.mark.parametrize("family", ("llama", "qwen3", "gpt2"))
def test_hidden_states_come_nearer_where_they_count(family, text, checkpoints, tmp_path):
    """The second of four layers is gone; student's layer 1 belongs to the teacher's layer 2."""
    model = tiny_model(family, layers=4)
    save_model(model, tmp_path / "dense", tokenizer_from=checkpoints[family])
    keep_layers(model, [0, 2, 3])
    save_model(model, tmp_path / "small", tokenizer_from=checkpoints[family])
    (tmp_path / "small" / "prune.json").write_text('{"removed_layers": [{"layer": 1, "influence": 0.1}]}')
    records, errors = {}, {}
    for weight in (0.0, 3.0):
        settings = SETTINGS.model_copy(update={"hidden_weight": weight})
        records[weight] = make(tmp_path / str(weight), settings, tmp_path / "dense", tmp_path / "small", text)
        errors[weight] = hidden_error(tmp_path / "dense", tmp_path / str(weight), [(0, 0), (2, 1)], text)
    assert errors[3.0] < 0.9 * errors[0.0]
    assert records[3.0]["validation_kl"]["kept"] < records[3.0]["validation_kl"]["before"]
    told = [entry["train_hidden_error"] for entry in records[3.0]["curve"]]
    assert told[0] is None and told[-1] < told[1] and "train_hidden_error" not in records[0.0]["curve"][1]


def test_hidden_loss_is_the_written_formula(checkpoints, pruned, text):
    teacher, student = load_model(checkpoints["llama"]), load_model(pruned["llama"])
    course = distil.Course(8, 2, 32, 1e-3, 0, np.load(text / "recovery.npy"), torch.zeros(1, 4, dtype=torch.long), None, 2.0, ((0, 0),))
    windows = torch.from_numpy(np.load(text / "validation.npy").astype(np.int64))
    kl, hidden = distil.Distillation(teacher, student, course, team.Team()).losses(windows)
    assert hidden.item() == pytest.approx(hidden_error(checkpoints["llama"], pruned["llama"], [(0, 0)], text), rel=1e-4)
    assert kl.item() == pytest.approx(naive_kl(checkpoints["llama"], pruned["llama"], text), rel=1e-4)


def test_hidden_sizes_that_differ_are_refused(checkpoints, text, tmp_path):
    model = tiny_model("llama")
    model.config.hidden_size = 32
    with pytest.raises(UserError, match="sizes are 64 and 32; set it to 0"):
        hidden_states.shared_layers(load_model(checkpoints["llama"]), model, tmp_path)


def rising(monkeypatch, at_step: int, rate: float) -> None:
    """From a step on the learning rate is far too high: nothing is gained any more."""
    usual = distil.learning_rate_at
    monkeypatch.setattr(distil, "learning_rate_at", lambda course, step: rate if step >= at_step else usual(course, step))


def test_patience_ends_a_run_that_gains_nothing(checkpoints, pruned, text, tmp_path, monkeypatch):
    monkeypatch.setattr(distil, "DIVERGED_FACTOR", 1e9)  # no divergence here: it just gets worse
    rising(monkeypatch, 9, 0.05)
    patient = SETTINGS.model_copy(update={"patience": 2})
    record = make(tmp_path / "out", patient, checkpoints["llama"], pruned["llama"], text)
    curve = record["curve"]
    best = min(curve, key=lambda entry: entry["validation_kl"])
    assert record["stopped_early"] and not record["diverged"] and record["kept"] == f"step {best['step']}"
    assert best is curve[-3] and curve[-1]["step"] < 24  # measured every third step, two without a gain
    assert record["validation_kl"]["kept"] == best["validation_kl"]
    assert naive_kl(checkpoints["llama"], tmp_path / "out", text) == pytest.approx(best["validation_kl"], rel=1e-4)
    assert record["tokens_seen"] == curve[-1]["step"] * 4 * 32
    whole = make(tmp_path / "whole", SETTINGS, checkpoints["llama"], pruned["llama"], text)
    assert not whole["stopped_early"] and whole["curve"][-1]["step"] == 24 and whole["kept"] == record["kept"]


def test_run_that_diverges_late_keeps_its_best_step(checkpoints, pruned, text, tmp_path, monkeypatch):
    rising(monkeypatch, 13, 30.0)
    record = make(tmp_path / "out", SETTINGS, checkpoints["llama"], pruned["llama"], text)
    assert record["diverged"] and record["kept"] == "step 12" and not record["stopped_early"]
    assert record["curve"][-1]["step"] < 24
    assert naive_kl(checkpoints["llama"], tmp_path / "out", text) == pytest.approx(record["validation_kl"]["kept"], rel=1e-4)
    assert record["validation_kl"]["kept"] < record["validation_kl"]["before"]


def test_killed_run_remembers_hidden_errors_and_patience(checkpoints, pruned, text, tmp_path, monkeypatch):
    """Killed between a measurement without a gain and the one that ends the run: patience does not begin anew."""
    monkeypatch.setattr(distil, "DIVERGED_FACTOR", 1e9)
    monkeypatch.setattr(distil, "SAVE_SECONDS", 0.0)
    rising(monkeypatch, 6, 0.05)
    settings = SETTINGS.model_copy(update={"patience": 2, "hidden_weight": 0.5})
    arguments = {"checkpoint": checkpoints["llama"], "prune": pruned["llama"], "text": text}
    whole = make(tmp_path / "whole", settings, checkpoints["llama"], pruned["llama"], text)
    assert whole["stopped_early"] and whole["curve"][-1]["step"] == 12
    train_step = distil.Distillation.train_step

    def killed_after_ten(self):
        if self.progress.step == 10:
            raise KeyboardInterrupt
        return train_step(self)

    (tmp_path / "killed").mkdir()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(distil.Distillation, "train_step", killed_after_ten)
        recover.run(settings, tmp_path / "killed", **arguments)
    make(tmp_path / "killed", settings, checkpoints["llama"], pruned["llama"], text)
    for path in (tmp_path / "whole").iterdir():
        assert path.name == "times.json" or path.read_bytes() == (tmp_path / "killed" / path.name).read_bytes()


def test_mixed_precision_unasked_is_for_gpus():
    alone = team.Team()
    if alone.device.type == "cpu":
        assert alone.precision() == alone.precision("float32") == torch.float32
    assert alone.precision("bfloat16") == torch.bfloat16


def test_mixed_precision_keeps_weights_in_fp32_and_measures_in_full(checkpoints, pruned, text, tmp_path, monkeypatch):
    alone = team.Team()
    seen = []
    kl_per_token = distil.kl_per_token
    monkeypatch.setattr(
        distil, "kl_per_token", lambda *given: seen.append(torch.is_autocast_enabled(alone.device.type)) or kl_per_token(*given)
    )
    settings = SETTINGS.model_copy(update={"precision": "bfloat16"})
    record = make(tmp_path / "out", settings, checkpoints["llama"], pruned["llama"], text)
    assert record["precision"] == "bfloat16" and record["validation_kl"]["kept"] < 0.8 * record["validation_kl"]["before"]
    assert sum(seen) == 24 and len(seen) == 24 + 1 + 9  # every step in mixed precision; damage and nine measurements in full
    assert record["validation_kl"]["kept"] == pytest.approx(naive_kl(checkpoints["llama"], tmp_path / "out", text), rel=1e-4)
    assert {parameter.dtype for parameter in load_model(tmp_path / "out").parameters()} == {torch.float32}


def test_two_processes_take_the_steps_of_one(checkpoints, pruned, text, tmp_path, monkeypatch):
    """Two processes on the CPU stand for two GPUs: the same exchange, through accelerate."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings = SETTINGS.model_copy(update={"steps": 4, "batch_windows": 3})  # three windows: one process has two of them
    one = make(tmp_path / "one", settings, checkpoints["llama"], pruned["llama"], text)
    for module in (team, recover):
        monkeypatch.setattr(module, "processes", lambda: 2)
    two = make(tmp_path / "two", settings, checkpoints["llama"], pruned["llama"], text)
    assert (one["processes"], two["processes"]) == (1, 2)
    assert [entry["validation_kl"] for entry in two["curve"]] == pytest.approx([entry["validation_kl"] for entry in one["curve"]], rel=1e-4)
    assert two["curve"][-1]["train_kl"] == pytest.approx(one["curve"][-1]["train_kl"], rel=1e-4)
    start, first, second = (load_model(folder) for folder in (pruned["llama"], tmp_path / "one", tmp_path / "two"))
    for name, parameter in start.named_parameters():
        moved = float((first.get_parameter(name) - parameter).norm())
        assert float((first.get_parameter(name) - second.get_parameter(name)).norm()) < 0.02 * moved
        assert torch.equal(second.get_parameter(name) == 0, parameter == 0)


def test_other_process_that_breaks_is_told(monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(team, "processes", lambda: 2)
    with pytest.raises(RuntimeError, match="training process 1 of 2 ended with code 1"), team.team(exit, (1,)):
        pass
