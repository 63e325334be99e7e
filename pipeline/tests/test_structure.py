"""The residual stream made narrower, and a target split by sensitivity, against other ways to say the same."""

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM

from conftest import tiny_model
from models.checkpoint import load_model, shape_of
from models.errors import UserError
from models.families import SUPPORTED_FAMILIES, layer_parts
from pipeline import importance, prune, structure, structure_target
from pipeline.settings import PruneSettings
from pipeline.structure_sizes import ParameterCount, Sizes, planned_sizes, sizes_of

ROTARY_FAMILIES = ("llama", "qwen2", "qwen3")
WINDOWS = torch.from_numpy(np.random.default_rng(0).integers(0, 384, (4, 24)))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text stage's result with four calibration windows."""
    folder = tmp_path_factory.mktemp("text_stage")
    np.save(folder / "calibration.npy", WINDOWS.numpy().astype(np.int32))
    return folder


def lively(family: str, **changes) -> nn.Module:
    """A random model whose biases and norms are random too: with zeros and ones a forgotten bias would not show."""
    model = tiny_model(family, **changes)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.requires_grad_(False)


@torch.no_grad()
def logits(model: nn.Module, windows: torch.Tensor = WINDOWS) -> torch.Tensor:
    return model(windows).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


class NaiveNorm(nn.Module):
    """RMSNorm over some of the channels of a full stream; the others come out as zeros."""

    def __init__(self, norm: nn.Module, kept: torch.Tensor, correction: float):
        super().__init__()
        self.norm, self.kept, self.correction = norm, kept, correction

    def forward(self, stream: torch.Tensor) -> torch.Tensor:
        seen = stream[..., self.kept]
        scale = torch.sqrt(seen.pow(2).sum(-1, keepdim=True) / len(self.kept) + self.norm.variance_epsilon)
        normed = torch.zeros_like(stream)
        normed[..., self.kept] = self.norm.weight[self.kept] * self.correction * seen / scale
        return normed


def put_naive_norms(model: nn.Module, kept: torch.Tensor, corrections: list[float]) -> None:
    """Make a dense model read only the channels at ``kept``."""
    corrections = iter(corrections)
    for layer in model.model.layers:
        layer.input_layernorm = NaiveNorm(layer.input_layernorm, kept, next(corrections))
        layer.post_attention_layernorm = NaiveNorm(layer.post_attention_layernorm, kept, next(corrections))
    model.model.norm = NaiveNorm(model.model.norm, kept, next(corrections))


def run(model: nn.Module, folder: Path, text: Path, **choices) -> tuple[nn.Module, dict]:
    """The stage on ``model``; what it wrote, loaded with nothing of ours, and prune.json."""
    (folder / "pruned").mkdir(parents=True)
    model.save_pretrained(folder / "dense")
    prune.run(PruneSettings(windows=4, **choices), folder / "pruned", checkpoint=folder / "dense", text=text)
    return AutoModelForCausalLM.from_pretrained(folder / "pruned").eval(), json.loads((folder / "pruned/prune.json").read_text())


# --- hidden size ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_removing_hidden_channels_is_norms_that_do_not_see_them(family, tied):
    model, reference = lively(family, tied=tied), lively(family, tied=tied)
    kept = torch.sort(torch.randperm(64)[:40]).values
    corrections = importance.norm_corrections(model, WINDOWS, kept)
    importance.keep_hidden(model, WINDOWS, kept)
    put_naive_norms(reference, kept, corrections)
    assert close(logits(model), logits(reference))
    shape = shape_of(model)
    assert (shape.hidden_size, shape.heads, shape.kv_heads, shape.head_dim, shape.tied) == (40, 4, 2, 16, tied)


def test_biases_on_the_residual_stream_are_cut_too():
    config = type(tiny_model("llama").config)(
        **{**tiny_model("llama").config.to_dict(), "attention_bias": True, "mlp_bias": True, "initializer_range": 0.15}
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.normal_()
    reference, kept = copy.deepcopy(model), torch.arange(0, 64, 2)
    structure.keep_hidden_channels(model, kept)
    put_naive_norms(reference, kept, [1.0] * 5)
    assert close(logits(model), logits(reference))


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_a_channel_that_carries_nothing_costs_nothing(family, tmp_path, text):
    """Channels that nobody writes hold zero: the norms' means over fewer channels are then made up for exactly."""
    model = lively(family)
    model.get_input_embeddings().weight[:, ::4] = 0.0
    for parts in layer_parts(model):
        for projection in (parts.o, parts.down):
            projection.weight[::4] = 0.0
    for place in structure.residual_norms(model):
        place.norm.variance_epsilon = 1e-12
    pruned, record = run(model, tmp_path, text, hidden=0.25)
    assert record["hidden_size"] == {"before": 64, "after": 48}
    difference = (logits(pruned) - logits(model)).abs().max()
    assert float(difference) < 1e-3 * float(logits(model).abs().max())


@pytest.mark.parametrize("tied", [True, False])
def test_hidden_score_is_the_energy_of_what_is_read(tied):
    """Per channel the energy that it alone brings into the linear layers, as they see it, in shares of each norm's total."""
    model, seen = lively("qwen3", tied=tied), {}
    readers = [[layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj] for layer in model.model.layers]
    readers += [[layer.mlp.gate_proj, layer.mlp.up_proj] for layer in model.model.layers] + [[model.lm_head]]
    for module in sum(readers, []):
        module.register_forward_pre_hook(lambda module, inputs: seen.update({module: inputs[0].double()}))
    found = importance.hidden_channel_scores(copy.deepcopy(model), WINDOWS)
    logits(model)
    for channel in (0, 17):
        expected = 0.0
        for modules in readers:
            alone = sum((seen[m][..., channel, None] * m.weight[:, channel].double()).square().sum() for m in modules)
            together = sum((seen[m][..., None, :] * m.weight.double()).square().sum() for m in modules)
            expected += float(alone / together)
        assert math.isclose(float(found[channel]), expected, rel_tol=1e-5)


def test_hidden_and_heads_together_stay_what_the_config_can_say(tmp_path, text):
    """Six heads of ten remain: Llama's config wants them to divide the hidden size, which therefore goes in 24s."""
    common = {"hidden_size": 80, "num_attention_heads": 10, "num_key_value_heads": 5, "intermediate_size": 64}
    config = type(tiny_model("llama").config)(**common, vocab_size=384, num_hidden_layers=1, head_dim=8)
    pruned, _ = run(AutoModelForCausalLM.from_config(config), tmp_path, text, kv_groups=0.4, hidden=0.4)
    shape = shape_of(pruned)
    assert (shape.heads, shape.kv_heads, shape.head_dim, shape.hidden_size) == (6, 3, 8, 48)


def test_everything_together_loads_plainly_and_is_counted(tmp_path, text):
    for family in ROTARY_FAMILIES:
        pruned, record = run(lively(family, layers=3), tmp_path / family, text, hidden=0.25, ffn=0.5, kv_groups=0.5, layers=1)
        assert sizes_of(pruned) == Sizes(2, 64, 1, 48)
        assert record["parameters"]["after"] == sum(parameter.numel() for parameter in pruned.parameters())
        assert torch.isfinite(logits(pruned)).all()


# --- counting ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_parameters_are_counted_as_the_cut_model_has_them(family, tied):
    model = lively(family, layers=3, tied=tied)
    count, dense = ParameterCount.of(model), sizes_of(model)
    cuts = [dense, replace(dense, layers=1), replace(dense, ffn_size=40), replace(dense, layers=2, ffn_size=8)]
    if family != "gpt2":
        cuts += [replace(dense, kv_heads=1), replace(dense, hidden_size=24), Sizes(2, 16, 1, 40)]
    for sizes in cuts:
        smaller = copy.deepcopy(model)
        importance.shrink(smaller, WINDOWS, sizes)
        assert sizes_of(smaller) == sizes
        assert count(sizes) == sum(parameter.numel() for parameter in smaller.parameters())


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_the_widest_ffn_is_the_widest(family):
    model = lively(family)
    count, dense = ParameterCount.of(model), sizes_of(model)
    for budget in range(count(dense) // 4, count(dense) + 1, count(dense) // 50):
        width = count.widest_ffn(dense, budget)
        fitting = [size for size in range(8, dense.ffn_size + 1, 8) if count(replace(dense, ffn_size=size)) <= budget]
        assert width == max(fitting, default=0)


# --- target -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_the_target_is_reached(family, tmp_path, text):
    pruned, record = run(lively(family, layers=3), tmp_path, text, target=0.5)
    target, found = record["target"], sum(parameter.numel() for parameter in pruned.parameters())
    assert found == record["parameters"]["after"] and target["got"] == 1 - found / record["parameters"]["before"]
    assert target["asked"] == 0.5 <= target["got"]
    assert target["sizes"] == {**vars(sizes_of(pruned))}
    assert sorted(target["left_out"]) == (["hidden_size", "kv_heads"] if family == "gpt2" else [])
    chosen = min(target["tried"], key=lambda candidate: candidate["kl"])
    assert chosen["sizes"] == target["sizes"] and chosen["parameters"] == found
    dense = load_model(tmp_path / "dense")
    wanted, given = (logits(model).double().log_softmax(-1) for model in (dense, pruned))
    assert math.isclose(float((wanted.exp() * (wanted - given)).sum(-1).mean()), chosen["kl"], rel_tol=1e-3)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_what_is_free_goes_first(family, tmp_path, text):
    """Three quarters of the FFN's units add nothing: a target within them takes nothing else and changes nothing."""
    model = lively(family)
    for parts in layer_parts(model):
        parts.down.weight[:, ::4] *= 2
        for start in (1, 2, 3):
            parts.down.weight[:, start::4] = 0.0
    pruned, record = run(model, tmp_path, text, target=0.2)
    dense = sizes_of(model)
    assert sizes_of(pruned) == replace(dense, ffn_size=sizes_of(pruned).ffn_size)
    assert record["target"]["got"] >= 0.2 and close(logits(pruned), logits(model))
    one_step = ParameterCount.of(model)(dense) - ParameterCount.of(model)(replace(dense, ffn_size=dense.ffn_size - 8))
    assert (record["target"]["got"] - 0.2) * ParameterCount.of(model)(dense) < one_step


def test_a_layer_that_does_nothing_goes_before_the_rest(tmp_path, text):
    model = lively("qwen3", layers=4)
    for projection in (layer_parts(model)[1].o, layer_parts(model)[1].down):
        projection.weight.zero_()
    pruned, record = run(model, tmp_path, text, target=0.1)
    assert [entry["layer"] for entry in record["removed_layers"]] == [1] and close(logits(pruned), logits(model))


def test_sums_of_costs_are_corrected_by_trying(monkeypatch):
    """Where the sums prefer to keep the layers and the measurement to remove them, the measurement decides."""
    costs = [structure_target.Cost(kind, 1, 1, kl) for kind, kl in (("layers", 9.0), ("ffn_size", 1.0), ("hidden_size", 2.0))]
    monkeypatch.setattr(structure_target, "measure_costs", lambda judge, choices: costs)
    monkeypatch.setattr(structure_target.Judge, "kl_of", lambda judge, sizes: float(sizes.layers))
    target = structure_target.reach_target(lively("llama", layers=3), WINDOWS, 0.5)
    layers = [candidate.sizes.layers for candidate in target.tried]
    assert layers == sorted(layers, reverse=True) and layers[0] == 3  # the order of the sums
    assert target.sizes.layers == layers[-1] < 3


def test_roots_of_costs_lie_on_straight_lines_between_steps_and_never_fall():
    dense = Sizes(4, 128, 2, 64)
    costs = [structure_target.Cost("ffn_size", kept, 1, kl) for kept, kl in ((96, 0.16), (64, 0.04), (8, 1.0))]
    for kept, expected in ((128, 0.0), (112, 0.04), (96, 0.16), (64, 0.16), (36, 0.49), (8, 1.0)):
        assert math.isclose(structure_target.predicted_kl(replace(dense, ffn_size=kept), dense, costs), expected, abs_tol=1e-12)
    both = [*costs, structure_target.Cost("layers", 2, 1, 0.5)]
    assert math.isclose(structure_target.predicted_kl(replace(dense, ffn_size=36, layers=2), dense, both), 0.99)


def test_kl_is_that_of_the_logits():
    model, other = lively("gpt2"), lively("gpt2", seed=1)
    wanted, given = (logits(which).double().log_softmax(-1) for which in (model, other))
    expected = float((wanted.exp() * (wanted - given)).sum(-1).mean())
    assert math.isclose(structure_target.Judge(model, WINDOWS).kl(other), expected, rel_tol=1e-4)


def test_measuring_leaves_the_model_as_it_was():
    model = lively("llama")
    before = logits(model)
    structure_target.reach_target(model, WINDOWS, 0.3)
    assert torch.equal(logits(model), before) and sizes_of(model) == Sizes(2, 128, 2, 64)


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "choices", "said"),
    [
        ("llama", {"hidden": 0.99}, "leaves nothing of a width of 64; set it to 0.875 or less"),
        ("llama", {"hidden": 0.01}, "removes nothing of a width of 64"),
        ("gpt2", {"hidden": 0.5}, "GPT-2.*prune.hidden=0"),
        ("llama", {"target": 0.99}, "prune.target 0.99 is out of reach: the smallest sizes remove 0.9"),
        ("gpt2", {"target": 0.9}, "out of reach"),
        ("llama", {"target": 0.5, "ffn": 0.5}, "prune.target splits .* prune.ffn"),
        ("llama", {"target": 0.5, "layers": 1}, "prune.target splits .* prune.layers"),
        ("llama", {"target": 0.5, "hidden": 0.25}, "prune.target splits .* prune.hidden"),
        ("llama", {"target": 0.5, "kv_groups": 0.5}, "prune.target splits .* prune.kv_groups"),
        ("llama", {"kv_groups": 0.99, "hidden": 0.25}, "would leave 0 of 2 KV heads"),
    ],
)
def test_what_leaves_nothing_is_refused(family, choices, said, checkpoints, text, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        prune.run(PruneSettings(windows=4, **choices), tmp_path, checkpoint=checkpoints[family], text=text)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_hidden_size_below_one_step_stays(checkpoints):
    model = load_model(checkpoints["llama"])
    model.config.num_attention_heads, model.config.num_key_value_heads = 96, 2  # a step of 96 at a hidden size of 64
    with pytest.raises(UserError, match="goes in steps of 96; set it to 0"):
        planned_sizes(PruneSettings(hidden=0.5), model)
