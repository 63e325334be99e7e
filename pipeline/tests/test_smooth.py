"""SmoothQuant: the function stays, the outliers go, and the scales are the paper's formula written out channel by channel."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from conftest import tiny_model
from models.checkpoint import load_model
from models.errors import GateError, UserError
from models.families import SUPPORTED_FAMILIES, layer_parts, linear_layers
from models.settings import TextSettings
from pipeline import smooth, smooth_search
from pipeline.settings import SmoothSettings

ROTARY_FAMILIES = ("llama", "qwen2", "qwen3")
WINDOWS = torch.from_numpy(np.random.default_rng(1).integers(0, 384, (6, 24)))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text_stage")
    np.save(folder / "calibration.npy", WINDOWS.numpy().astype(np.int32))
    return folder


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(WINDOWS).logits


def with_outliers(family: str, seed: int, strength: float) -> torch.nn.Module:
    """A random model whose norms and v rows blow some channels up, and whose biases are not zero."""
    model = tiny_model(family, seed=seed).requires_grad_(False)
    torch.manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter) * 0.2)
    for parts in layer_parts(model):
        for norm in (parts.attention_norm, parts.ffn_norm):
            norm.weight[torch.randperm(64)[:4]] *= strength
        parts.v.weight[torch.randperm(len(parts.v.weight))[:3]] *= strength
        if parts.up is not None:
            parts.up.weight[torch.randperm(len(parts.up.weight))[:3]] *= strength
    return model


@settings(max_examples=24, deadline=None)
@given(family=st.sampled_from(SUPPORTED_FAMILIES), seed=st.integers(0, 4), strength=st.floats(1, 200), alpha=st.floats(0, 1))
def test_function_does_not_change_whatever_the_outliers(family, seed, strength, alpha):
    # In float64: this is about the function, and outliers of a hundred times leave fp32 too few digits to tell.
    model = with_outliers(family, seed, strength).double()
    before, weights = logits(model), {name: module.weight.clone() for name, module in linear_layers(model).items()}
    smooth.smooth(model, WINDOWS, alpha)
    assert float((logits(model) - before).abs().max()) <= 1e-7 * float(before.abs().max())
    changed = [name for name, module in linear_layers(model).items() if not torch.equal(module.weight, weights[name])]
    assert len(changed) == len(weights) - (2 if family == "gpt2" else 0)  # GPT-2's two c_proj after the gelu stay


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_norm_scale_is_the_papers_formula(family):
    """Both sides written out: what q, k and v see afterwards is X / s and their weights are W * s, s = |X|^a / |W|^(1-a)."""
    alpha = 0.6
    model, original = with_outliers(family, 0, 40.0), with_outliers(family, 0, 40.0)
    seen = {}

    def inputs_of(which, name):
        module = layer_parts(which)[0].q.module
        handle = module.register_forward_pre_hook(lambda module, inputs: seen.__setitem__(name, inputs[0]))
        logits(which)
        handle.remove()

    inputs_of(original, "before")
    smooth.smooth(model, WINDOWS, alpha)
    inputs_of(model, "after")
    parts = layer_parts(original)[0]
    for channel in range(0, 64, 7):
        largest_x = seen["before"][..., channel].abs().max().item()
        largest_w = max(projection.weight[:, channel].abs().max().item() for projection in (parts.q, parts.k, parts.v))
        scale = largest_x**alpha / largest_w ** (1 - alpha)
        assert np.allclose(seen["after"][..., channel], seen["before"][..., channel] / scale, rtol=1e-3, atol=1e-5)
        assert np.allclose(layer_parts(model)[0].k.weight[:, channel], parts.k.weight[:, channel] * scale, rtol=1e-4)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_v_scale_is_shared_inside_a_kv_group(family):
    model, original = with_outliers(family, 2, 30.0), with_outliers(family, 2, 30.0)
    smooth.smooth(model, WINDOWS, 0.5)
    after, before = layer_parts(model)[1], layer_parts(original)[1]
    grown = (after.o.weight / before.o.weight)[0].reshape(2, 2, 16)  # [kv_heads, query heads of it, head_dim]
    assert torch.allclose(grown[:, 0], grown[:, 1], rtol=1e-5) and grown.std() > 0.01
    # v was scaled through its inputs too, so look at it where they cancel: v's output row against its old one
    ratio = (after.v.weight / before.v.weight) * grown[:, 0].reshape(-1, 1)  # [v rows, inputs]: the input scale alone remains
    assert torch.allclose(ratio, ratio[:1].expand_as(ratio), rtol=1e-4)
    if before.v.bias is not None:
        assert torch.allclose(after.v.bias * grown[:, 0].reshape(-1), before.v.bias, rtol=1e-5)
        assert torch.equal(after.q.bias, before.q.bias) and torch.equal(after.k.bias, before.k.bias)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_outliers_shrink(family):
    for fold in smooth.smooth(with_outliers(family, 3, 60.0), WINDOWS, 0.8):
        if "norm" in fold["fold"]:
            assert fold["outliers_after"] < 0.5 * fold["outliers_before"]


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_dead_channels_are_left_alone(family):
    model = with_outliers(family, 0, 10.0)
    for parts in layer_parts(model):
        parts.attention_norm.weight[5] = 0.0  # nothing comes
        for projection in parts.ffn_inputs:
            projection.weight[:, 6] = 0.0  # nobody listens
        parts.up.weight[7] = 0.0
        parts.v.weight[:16] = 0.0
        if parts.v.bias is not None:
            parts.v.bias[:16] = 0.0
    before, queries = logits(model), [parts.q.weight[:, 5].clone() for parts in layer_parts(model)]
    smooth.smooth(model, WINDOWS, 0.5)
    assert all(torch.isfinite(parameter).all() for parameter in model.parameters())
    assert float((logits(model) - before).abs().max()) <= smooth.TOLERANCE * float(before.abs().max())
    assert all(torch.equal(parts.q.weight[:, 5], query) for parts, query in zip(layer_parts(model), queries, strict=True))


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_stage_writes_a_plain_folder_and_what_it_measured(family, checkpoints, text, tmp_path):
    smooth.run(SmoothSettings(windows=6), tmp_path, recover=checkpoints[family], text=text)
    record = json.loads((tmp_path / "smooth.json").read_text())
    difference = logits(AutoModelForCausalLM.from_pretrained(tmp_path).eval()) - logits(load_model(checkpoints[family]))
    assert 0 < record["max_abs_difference"] <= float(difference.abs().max()) <= record["tolerance"]
    assert len(record["folds"]) == (6 if family == "gpt2" else 8)
    assert [entry["input"] for entry in record["not_folded"]] == (["layers.0.down", "layers.1.down"] if family == "gpt2" else [])


def test_disabled_changes_no_weight(checkpoints, text, tmp_path):
    smooth.run(SmoothSettings(enabled=False, windows=6), tmp_path, recover=checkpoints["llama"], text=text)
    record = json.loads((tmp_path / "smooth.json").read_text())
    assert record["folds"] == [] and record["max_abs_difference"] == 0
    assert torch.equal(logits(load_model(tmp_path)), logits(load_model(checkpoints["llama"])))


def test_pruned_weights_stay_zero(checkpoints):
    model = load_model(checkpoints["llama"])
    for module in linear_layers(model).values():
        module.weight[module.weight.abs() < 0.1] = 0.0
    zeros = {name: module.weight == 0 for name, module in linear_layers(model).items()}
    smooth.smooth(model, WINDOWS, 0.5)
    assert all(torch.equal(module.weight == 0, zeros[name]) for name, module in linear_layers(model).items())


def test_a_fold_that_changes_the_function_fails_the_gate(checkpoints, text, tmp_path, monkeypatch):
    def forgets_the_producer(fold, scale):
        for consumer in fold.consumers:
            consumer.weight.mul_(scale)

    monkeypatch.setattr(smooth, "apply", forgets_the_producer)
    with pytest.raises(GateError, match="smoothing changed a logit"):
        smooth.run(SmoothSettings(windows=6), tmp_path, recover=checkpoints["llama"], text=text)
    assert not list(tmp_path.iterdir())


def test_too_few_windows(checkpoints, text, tmp_path):
    with pytest.raises(UserError, match="set smooth.windows=6"):
        smooth.run(SmoothSettings(windows=7), tmp_path, recover=checkpoints["llama"], text=text)
    assert SmoothSettings().windows <= TextSettings().calibration_windows


def naive_int8_error(x: np.ndarray, weight: np.ndarray, lowest: float, highest: float) -> float:
    """Relative squared error of ``x @ weight.T`` with whole numbers of eight bits, written out; float64."""
    lowest, highest = min(lowest, 0.0), max(highest, 0.0)
    step = (highest - lowest) / 255
    zero = np.round(-lowest / step)
    bytes_x = np.clip(np.round(x / step) + zero, 0, 255)
    row_steps = np.abs(weight).max(1) / 127
    bytes_w = np.round(weight / row_steps[:, None])
    found = ((bytes_x - zero) @ bytes_w.T) * step * row_steps
    exact = x @ weight.T
    return float(((found - exact) ** 2).sum() / (exact**2).sum())


def inputs_of_consumers(model) -> list[np.ndarray]:
    """Per fold of the model what its consumers read on all windows, float64 ``[tokens, channels]``."""
    folds, seen = smooth.folds_of(model), {}
    handles = [
        fold.consumers[0].module.register_forward_pre_hook(lambda module, inputs, name=fold.name: seen.__setitem__(name, inputs[0]))
        for fold in folds
    ]
    logits(model)
    for handle in handles:
        handle.remove()
    return [seen[fold.name].flatten(0, 1).double().numpy() for fold in folds]


def mean_errors(model) -> list[float]:
    """Per fold of a finished model the mean int8 error of its consumers, on every token."""
    return [
        float(np.mean([naive_int8_error(x, consumer.weight.double().numpy(), x.min(), x.max()) for consumer in fold.consumers]))
        for fold, x in zip(smooth.folds_of(model), inputs_of_consumers(model), strict=True)
    ]


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_searched_alpha_is_the_best_of_a_naive_loop(family):
    """The naive loop tries every alpha on a copy of the whole model, fold after fold, and measures the copy from outside."""
    assert WINDOWS.numel() <= smooth_search.SAMPLED_ROWS  # all tokens are in the sample
    model = with_outliers(family, 1, 25.0)
    searched = smooth.smooth(with_outliers(family, 1, 25.0), WINDOWS, "search")
    maxima = smooth.channel_maxima(model, smooth.folds_of(model), WINDOWS)
    for index, entry in enumerate(searched):
        naive, tried = {}, {}
        for alpha in smooth_search.GRID:
            tried[alpha] = copy.deepcopy(model)
            fold = smooth.folds_of(tried[alpha])[index]
            smooth.apply(fold, smooth.scales(fold, maxima[index], alpha))
            naive[alpha] = mean_errors(tried[alpha])[index]
        assert entry["int8_errors"] == pytest.approx(naive, rel=0.02), entry["fold"]
        assert naive[entry["alpha"]] <= min(naive.values()) * 1.01
        model = tried[entry["alpha"]]
    assert len({entry["alpha"] for entry in searched}) > 1  # one alpha does not suit all


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_search_is_no_worse_than_the_fixed_alpha_with_outliers_injected(family, monkeypatch):
    """Channels x40 whose weights are divided by 40: the function is the old one. Less than half of the tokens are in the sample."""
    monkeypatch.setattr(smooth_search, "SAMPLED_ROWS", 64)

    def injected():
        model = tiny_model(family).requires_grad_(False)
        for parts in layer_parts(model):
            for norm, consumers in ((parts.attention_norm, (parts.q, parts.k, parts.v)), (parts.ffn_norm, parts.ffn_inputs)):
                norm.weight[3:7] *= 40
                if getattr(norm, "bias", None) is not None:
                    norm.bias[3:7] *= 40
                for consumer in consumers:
                    consumer.weight[:, 3:7] /= 40
        return model

    plain, fixed, searched = injected(), injected(), injected()
    before = logits(plain)
    assert float((before - logits(tiny_model(family))).abs().max()) <= 1e-4 * float(before.abs().max())
    smooth.smooth(fixed, WINDOWS, 0.5)
    smooth.smooth(searched, WINDOWS, "search")
    errors = {name: mean_errors(model) for name, model in (("plain", plain), ("fixed", fixed), ("searched", searched))}
    assert sum(errors["searched"]) <= sum(errors["fixed"]) < sum(errors["plain"])
    assert float((logits(searched) - before).abs().max()) <= smooth.TOLERANCE * float(before.abs().max())


def test_sample_is_of_the_asked_size_and_its_ranges_are_of_all_tokens(monkeypatch):
    monkeypatch.setattr(smooth_search, "SAMPLED_ROWS", 10)
    model = with_outliers("llama", 0, 10.0)
    folds, everything = smooth.folds_of(model), inputs_of_consumers(model)
    sampled = smooth_search.sample_activations(model, [fold.consumers[0].module for fold in folds], WINDOWS)
    for sample, whole in zip(sampled, everything, strict=True):
        assert sample.rows.shape == (10, whole.shape[1])
        assert all(np.isclose(whole, row, rtol=1e-3, atol=1e-4).all(1).any() for row in sample.rows.numpy())
        assert np.allclose(sample.low, whole.min(0), atol=1e-4) and np.allclose(sample.high, whole.max(0), atol=1e-4)
        assert len(np.unique(sample.rows.numpy(), axis=0)) == 10
    channels = sum(whole.shape[1] for whole in everything)
    monkeypatch.setattr(smooth_search, "SAMPLE_BYTES", 4 * channels * 7)  # a large model: seven rows fit
    sampled = smooth_search.sample_activations(model, [fold.consumers[0].module for fold in folds], WINDOWS)
    assert {len(sample.rows) for sample in sampled} == {7}


def test_stage_tells_the_alpha_of_each_fold(checkpoints, text, tmp_path):
    for name, alpha in (("fixed", 0.6), ("searched", "search")):
        (tmp_path / name).mkdir()
        smooth.run(SmoothSettings(windows=6, alpha=alpha), tmp_path / name, recover=checkpoints["llama"], text=text)
    fixed, searched = (json.loads((tmp_path / name / "smooth.json").read_text())["folds"] for name in ("fixed", "searched"))
    assert {entry["alpha"] for entry in fixed} == {0.6} and "int8_errors" not in fixed[0]
    for entry in searched:
        assert entry["alpha"] == float(min(entry["int8_errors"], key=entry["int8_errors"].get))
    assert SmoothSettings().alpha == 0.5
