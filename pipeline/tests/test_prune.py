"""Pruning against other ways to say the same: zeroed units, zeroed heads, skipped layers, a sort of the magnitudes."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from conftest import tiny_model, write_checkpoint
from models.checkpoint import load_model, shape_of
from models.errors import GateError, UserError
from models.families import SUPPORTED_FAMILIES, layer_parts, linear_layers
from models.settings import TextSettings
from pipeline import importance, prune, structure
from pipeline.settings import PruneSettings

ROTARY_FAMILIES = ("llama", "qwen2", "qwen3")
WINDOWS = torch.from_numpy(np.random.default_rng(0).integers(0, 384, (4, 24)))


@dataclass(frozen=True)
class Pruned:
    model: torch.nn.Module
    record: dict
    folder: Path


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A text stage's result with four calibration windows."""
    folder = tmp_path_factory.mktemp("text_stage")
    np.save(folder / "calibration.npy", WINDOWS.numpy().astype(np.int32))
    return folder


@pytest.fixture
def pruned(text, tmp_path):
    """Run the stage on a checkpoint and load what it wrote with nothing of ours."""

    def do(checkpoint: Path, **choices) -> Pruned:
        out = tmp_path / "pruned"
        out.mkdir()
        prune.run(PruneSettings(windows=4, **choices), out, checkpoint=checkpoint, text=text)
        plain = AutoModelForCausalLM.from_pretrained(out).eval()
        return Pruned(plain, json.loads((out / "prune.json").read_text()), out)

    return do


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(WINDOWS).logits


def close(found: torch.Tensor, expected: torch.Tensor) -> bool:
    return float((found - expected).abs().max()) <= 2e-5 * float(expected.abs().max())


def lively(family: str, layers: int = 2) -> torch.nn.Module:
    """A random model whose biases and norms are random too: with zeros and ones a forgotten bias would not show."""
    model = tiny_model(family, layers=layers)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return model.requires_grad_(False)


# --- what is removed is what would have been zeroed -------------------------------------------------------------------


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_removing_ffn_units_is_zeroing_their_columns(family):
    model, reference = lively(family), lively(family)
    width = shape_of(model).ffn_size
    kept = [torch.sort(torch.randperm(width)[: width // 2]).values for _ in range(2)]
    for parts, units in zip(layer_parts(reference), kept, strict=True):
        gone = torch.ones(width, dtype=torch.bool)
        gone[units] = False
        parts.down.weight[:, gone] = 0.0
    structure.keep_ffn_units(model, kept)
    assert close(logits(model), logits(reference)) and shape_of(model).ffn_size == width // 2


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_removing_a_kv_head_is_zeroing_its_query_heads_outputs(family):
    model, reference = lively(family), lively(family)
    for parts, kv_head in zip(layer_parts(reference), (0, 1), strict=True):  # of 2 KV heads with 2 query heads of size 16
        parts.o.weight[:, (1 - kv_head) * 32 : (2 - kv_head) * 32] = 0.0
    structure.keep_kv_heads(model, [torch.tensor([0]), torch.tensor([1])])
    assert close(logits(model), logits(reference))
    shape = shape_of(model)
    assert (shape.heads, shape.kv_heads, shape.head_dim) == (2, 1, 16)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_removing_layers_is_skipping_them(family):
    model, reference = lively(family, layers=4), lively(family, layers=4)
    for layer in (1, 2):
        parts = layer_parts(reference)[layer]
        for projection in (parts.o, parts.down):  # a layer that adds nothing to the residual stream
            projection.weight.zero_()
            if projection.bias is not None:
                projection.bias.zero_()
    structure.keep_layers(model, [0, 3])
    assert close(logits(model), logits(reference))
    with torch.no_grad():  # with a cache the layers' numbers matter
        cache = model(WINDOWS[:, :10], use_cache=True).past_key_values
        stepped = model(WINDOWS[:, 10:], past_key_values=cache, use_cache=True).logits
    assert close(stepped, logits(reference)[:, 10:])


# --- the whole stage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_everything_at_once_gives_a_folder_that_loads_plainly(family, pruned, tmp_path):
    lively(family, layers=3).save_pretrained(tmp_path / "dense")
    write_checkpoint(tmp_path / "tokenizer", family)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / "tokenizer" / name).rename(tmp_path / "dense" / name)
    groups = 0.0 if family == "gpt2" else 0.5
    made = pruned(tmp_path / "dense", method="magnitude", sparsity=0.4, ffn=0.25, kv_groups=groups, layers=1)
    shape, record = shape_of(made.model), made.record
    width = 192 if family == "gpt2" else 96
    assert (shape.layers, shape.ffn_size, shape.head_dim) == (2, width, 16)
    assert (shape.kv_heads, shape.heads) == ((4, 4) if family == "gpt2" else (1, 2))
    assert record["parameters"]["after"] == shape.parameters < record["parameters"]["before"]
    zeros = sum(int((module.weight == 0).sum()) for module in linear_layers(made.model).values())
    weights = sum(module.weight.numel() for module in linear_layers(made.model).values())
    assert record["sparsity"] == zeros / weights and abs(record["sparsity"] - 0.4) < 1e-3
    assert record["parameters"]["nonzero"] == shape.parameters - zeros
    assert (made.folder / "tokenizer.json").is_file()
    assert np.isfinite(logits(made.model).numpy()).all()


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_heads_that_no_longer_divide_the_hidden_size(family, pruned, tmp_path):
    """Five KV heads to three leaves 6 heads of size 8 at hidden size 80: a Qwen config can say that, a Llama config cannot."""
    common = {"hidden_size": 80, "num_attention_heads": 10, "num_key_value_heads": 5, "intermediate_size": 64}
    config = type(tiny_model(family).config)(**common, vocab_size=384, num_hidden_layers=1, head_dim=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    if family == "llama":
        with pytest.raises(UserError, match="possible shares here: 0.200, 0.600, 0.800"):
            pruned(tmp_path / "dense", kv_groups=0.4)
    else:
        shape = shape_of(pruned(tmp_path / "dense", kv_groups=0.4).model)
        assert (shape.heads, shape.kv_heads, shape.head_dim, shape.hidden_size) == (6, 3, 8, 80)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_neutral_settings_change_nothing(family, checkpoints, pruned):
    made = pruned(checkpoints[family])
    assert torch.equal(logits(made.model), logits(load_model(checkpoints[family])))
    assert made.record["sparsity"] == 0 and made.record["removed_share"] == 0 and made.record["removed_layers"] == []


def test_same_inputs_same_bytes(checkpoints, text, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        choices = PruneSettings(method="magnitude", sparsity=0.3, ffn=0.5, windows=4)
        prune.run(choices, tmp_path / name, checkpoint=checkpoints["llama"], text=text)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_ffn_score_is_the_size_of_what_the_unit_adds(family):
    model = lively(family)
    scores = importance.ffn_unit_scores(model, WINDOWS)
    down, seen = layer_parts(model)[1].down, []
    handle = down.module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    logits(model)
    handle.remove()
    for unit in (0, 17):
        added = torch.cat(seen)[..., unit, None].double() * down.weight[:, unit].double()  # [batch, seq, hidden]
        assert np.isclose(scores[1][unit], added.square().sum(-1).mean().sqrt(), rtol=1e-5)


@pytest.mark.parametrize("family", ROTARY_FAMILIES)
def test_kv_head_score_is_what_zeroing_it_takes_away(family):
    model = lively(family)
    scores = importance.kv_head_scores(model, WINDOWS)
    parts, outputs = layer_parts(model)[0], []
    handle = parts.o.module.register_forward_hook(lambda module, inputs, output: outputs.append(output))
    logits(model)
    parts.o.weight[:, 32:64] = 0.0  # the second KV head's two query heads
    logits(model)
    handle.remove()
    taken = (outputs[0] - outputs[1]).double().square().sum(-1).mean().sqrt()
    assert np.isclose(scores[0][1], taken, rtol=1e-4)


def test_block_influence_is_one_minus_the_cosine_of_hidden_states():
    model = lively("qwen3", layers=3)
    found = importance.block_influence(model, WINDOWS)
    with torch.no_grad():
        states = model(WINDOWS, output_hidden_states=True).hidden_states  # the last one has the final norm in it
    for layer in range(2):
        cosine = torch.cosine_similarity(states[layer], states[layer + 1], dim=-1).mean()
        assert np.isclose(found[layer], 1 - cosine, atol=1e-5)


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_the_layer_that_does_nothing_goes_first(family, pruned, tmp_path):
    model = lively(family, layers=4)
    for projection in (layer_parts(model)[2].o, layer_parts(model)[2].down):
        projection.weight.mul_(1e-4)
        if projection.bias is not None:
            projection.bias.zero_()
    model.save_pretrained(tmp_path / "dense")
    made = pruned(tmp_path / "dense", layers=1)
    assert [entry["layer"] for entry in made.record["removed_layers"]] == [2]
    assert float((logits(made.model) - logits(model)).abs().max()) < 0.02 * float(logits(model).abs().max())


def test_ffn_units_that_add_nothing_go_first(pruned, tmp_path):
    model = lively("llama")
    for parts in layer_parts(model):
        parts.down.weight[:, ::2] = 0.0
    model.save_pretrained(tmp_path / "dense")
    assert close(logits(pruned(tmp_path / "dense", ffn=0.5).model), logits(model))


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "choices", "said"),
    [
        ("llama", {"sparsity": 0.5}, "set prune.method=magnitude"),
        ("llama", {"layers": 2}, "leaves none of 2 layers"),
        ("llama", {"layers": 7}, "leaves none of 2 layers"),
        ("llama", {"ffn": 0.98}, "leaves nothing of a width of 128"),
        ("llama", {"ffn": 0.01}, "removes nothing"),
        ("llama", {"kv_groups": 0.9}, "possible shares here: 0.500"),
        ("llama", {"kv_groups": 0.1}, "possible shares here: 0.500"),
        ("gpt2", {"kv_groups": 0.5}, "GPT-2"),
        ("llama", {"method": "magnitude", "sparsity": 0.99999}, "leaves nothing of model.layers.0"),
    ],
)
def test_what_leaves_nothing_is_refused(family, choices, said, checkpoints, text, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        prune.run(PruneSettings(windows=4, **choices), tmp_path, checkpoint=checkpoints[family], text=text)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_too_few_calibration_windows(checkpoints, text, tmp_path):
    with pytest.raises(UserError, match="set prune.windows=4"):
        prune.run(PruneSettings(windows=5, ffn=0.5), tmp_path, checkpoint=checkpoints["llama"], text=text)


def test_default_windows_are_fewer_than_the_text_stage_makes():
    assert PruneSettings().windows <= TextSettings().calibration_windows


def test_attention_scaled_by_layer_number_keeps_its_layers():
    model = tiny_model("gpt2")
    model.config.scale_attn_by_inverse_layer_idx = True
    with pytest.raises(UserError, match="prune.layers=0"):
        prune.planned_sizes(PruneSettings(layers=1), model)


def test_a_saved_model_that_answers_otherwise_fails_the_gate(checkpoints):
    model = load_model(checkpoints["llama"])
    model.model.norm.weight.mul_(1.01)
    with pytest.raises(GateError, match="logits off by"):
        prune.check_reload(model, checkpoints["llama"], WINDOWS[:1])
