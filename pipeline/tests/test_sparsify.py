"""Which weights go: against loops, sorts and autograd written here, on the tiny models of three families."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from conftest import tiny_model
from models.checkpoint import load_model
from models.errors import GateError, UserError
from models.families import SUPPORTED_FAMILIES, decoder_layers, layer_parts, linear_layers, weight_view
from pipeline import layerwise, prune
from pipeline.layerwise import input_groups, walk
from pipeline.masks import Removal, lowest_of_many, pattern_mask, row_mask
from pipeline.settings import PruneSettings
from pipeline.sparsify import sparsify
from pipeline.taylor import taylor_scores

METHODS = ("magnitude", "wanda", "sparsegpt", "taylor")
FAMILIES = ("llama", "qwen3", "gpt2")
WINDOWS = torch.from_numpy(np.random.default_rng(0).integers(0, 384, (6, 24)))  # a full and a smaller batch
MATRICES = arrays(np.float32, (5, 16), elements=st.sampled_from([0.0, 0.5, 1.0, 2.0**-100, 3.0]) | st.floats(0, 100, width=32))


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("text_stage")
    np.save(folder / "calibration.npy", WINDOWS.numpy().astype(np.int32))
    return folder


@pytest.fixture
def pruned(text, tmp_path, checkpoints) -> Callable:
    """Run the stage; the model as plain transformers load it, and prune.json."""

    def do(family: str, **choices) -> tuple[torch.nn.Module, dict]:
        prune.run(PruneSettings(windows=6, **choices), tmp_path, checkpoint=checkpoints[family], text=text)
        return AutoModelForCausalLM.from_pretrained(tmp_path), json.loads((tmp_path / "prune.json").read_text())

    return do


def choose(method: str, sparsity: float, **more) -> PruneSettings:
    return PruneSettings(method=method, sparsity=sparsity, windows=6, **more)


def weights_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """[outputs, inputs] of every linear layer."""
    return {name: weight_view(module).detach().numpy().copy() for name, module in linear_layers(model).items()}


def inputs_of(model: torch.nn.Module) -> dict[str, np.ndarray]:
    """Inputs [tokens, channels] of every linear layer in one plain forward of the whole model."""
    seen, handles = {}, []
    for name, module in linear_layers(model).items():
        see = lambda module, args, name=name: seen.__setitem__(name, args[0].flatten(0, -2).numpy())  # noqa: E731
        handles.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        model(WINDOWS)
    for handle in handles:
        handle.remove()
    return seen


# --- masks ------------------------------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(first=MATRICES, second=MATRICES, count=st.integers(0, 160))
def test_the_lowest_of_several_tensors_are_those_of_a_stable_sort(first, second, count):
    tensors = [torch.from_numpy(first), torch.from_numpy(second)]
    found = torch.cat([mask.reshape(-1) for mask in lowest_of_many(lambda: iter(tensors), count)]).numpy()
    expected = np.zeros(160, dtype=bool)
    expected[np.argsort(np.concatenate([first, second]).reshape(-1), kind="stable")[:count]] = True
    assert np.array_equal(found, expected)


@settings(max_examples=40, deadline=None)
@given(scores=MATRICES, sparsity=st.floats(0, 0.99))
def test_rows_lose_their_lowest_and_the_count_is_exact(scores, sparsity):
    mask = row_mask(torch.from_numpy(scores), Removal(sparsity)).numpy()
    assert mask.sum() == round(sparsity * scores.size)
    counts = mask.sum(1)
    assert counts.max() - counts.min() <= 1
    for row, gone in zip(scores, mask, strict=True):
        expected = np.zeros(16, dtype=bool)
        expected[np.argsort(row, kind="stable")[: gone.sum()]] = True
        assert np.array_equal(gone, expected)


@settings(max_examples=40, deadline=None)
@given(scores=MATRICES, group=st.sampled_from([4, 8]))
def test_of_every_group_the_lowest_half_goes(scores, group):
    mask = pattern_mask(torch.from_numpy(scores), Removal(0.5, group // 2, group)).numpy()
    for row, gone in zip(scores.reshape(-1, group), mask.reshape(-1, group), strict=True):
        assert gone.sum() == group // 2 and row[gone].max() <= row[~gone].min()


# --- one layer at a time ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
@pytest.mark.parametrize("in_file", [False, True])
def test_streamed_inputs_are_those_of_the_whole_model_pruned_so_far(family, in_file, monkeypatch, tmp_path):
    """Weights are halved as the walk goes, so that each layer's inputs must come from the halved ones before it."""
    monkeypatch.setattr(layerwise, "STREAM_BYTES", 1000 if in_file else 2**28)
    model, seen = load_free(family), {}
    for group in walk(model, WINDOWS, "walking", tmp_path):
        batches = []
        group.run(batches.append)
        for name, module in zip(group.names, group.modules, strict=True):
            seen[name] = torch.cat(batches).numpy()
            module.weight.mul_(0.5)
    expected = inputs_of(model)
    assert list(seen) == list(expected) == list(linear_layers(model))
    for name, inputs in expected.items():
        assert np.allclose(seen[name], inputs, rtol=1e-4, atol=1e-5), name
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_every_linear_layer_is_in_one_group(family):
    model = tiny_model(family)
    grouped = [module for parts in layer_parts(model) for group in input_groups(parts) for module in group]
    assert [id(module) for module in grouped] == [id(module) for module in linear_layers(model).values()]


def load_free(family: str) -> torch.nn.Module:
    return tiny_model(family).requires_grad_(False)


PEAK_SCRIPT = """
import sys, torch
from conftest import tiny_model
from pipeline import layerwise
from pipeline.settings import PruneSettings
from pipeline.sparsify import sparsify
torch.set_num_threads(1)
layerwise.STREAM_BYTES = 2**20
model = tiny_model("llama", layers=1).requires_grad_(False)
for count in (8, 1000):
    windows = torch.zeros(count, 128, dtype=torch.int64).random_(384, generator=torch.Generator().manual_seed(0))
    sparsify(model, windows, PruneSettings(method=sys.argv[1], sparsity=0.5))
    print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="VmHWM is read from /proc")
@pytest.mark.parametrize("method", ["wanda", "sparsegpt"])
def test_memory_does_not_grow_with_the_windows(method):
    """The residual stream of 1000 windows would be 33 MB; the peak may differ by what windows themselves take and some noise."""
    command = [sys.executable, "-c", PEAK_SCRIPT, method]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[2])
    few, many = (int(line) / 1024 for line in done.stdout.split())
    assert many - few < 16, (few, many)


# --- scores -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_wanda_zeroes_what_loops_over_weight_times_input_norm_zero(family):
    model, dense = load_free(family), weights_of(tiny_model(family))
    inputs = inputs_of(model)
    sparsify(model, WINDOWS, choose("wanda", 0.3))
    found = weights_of(model)
    for name, weight in dense.items():
        norms = [math.sqrt(sum(float(value) ** 2 for value in column)) for column in inputs[name].T]
        gone = found[name] == 0
        assert gone.sum() == round(0.3 * gone.size) and np.array_equal(found[name][~gone], weight[~gone])
        for row in range(len(weight)):
            scores = np.array([abs(float(value)) * norm for value, norm in zip(weight[row], norms, strict=True)])
            assert scores[gone[row]].max() <= scores[~gone[row]].min() * (1 + 1e-4), (name, row)


@pytest.mark.parametrize("family", FAMILIES)
def test_taylor_scores_are_those_of_autograd_window_by_window(family):
    model, reference = load_free(family), tiny_model(family)
    found = taylor_scores(model, WINDOWS)
    parameters = {name: module.weight for name, module in linear_layers(reference).items()}
    squares = dict.fromkeys(parameters, 0.0)
    for window in WINDOWS:
        logits = reference(window[None]).logits[0].double().log_softmax(-1)
        loss = -logits[torch.arange(23), window[1:]].mean()
        for name, gradient in zip(parameters, torch.autograd.grad(loss, list(parameters.values())), strict=True):
            squares[name] = squares[name] + (gradient.double() * parameters[name].detach().double()) ** 2
    for name, expected in squares.items():
        assert torch.allclose(found[name].double(), expected.sqrt(), rtol=1e-3, atol=1e-7), name
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in model.parameters())


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", ["magnitude", "taylor"])
def test_over_the_model_the_lowest_scores_go_wherever_they_are(method, family):
    model, dense = load_free(family), load_free(family)
    scores = {name: module.weight.abs() for name, module in linear_layers(dense).items()}
    if method == "taylor":
        scores = taylor_scores(dense, WINDOWS)
    sparsify(model, WINDOWS, choose(method, 0.4, scope="model"))
    zeroed = torch.cat([(module.weight == 0).reshape(-1) for module in linear_layers(model).values()])
    flat = torch.cat([score.reshape(-1) for score in scores.values()])
    assert int(zeroed.sum()) == round(0.4 * len(flat))
    assert flat[zeroed].max() <= flat[~zeroed].min()
    shares = {name: float((module.weight == 0).float().mean()) for name, module in linear_layers(model).items()}
    assert method == "magnitude" or max(shares.values()) - min(shares.values()) > 0.05  # layers do compete


@settings(max_examples=25, deadline=None)
@given(sparsity=st.floats(0, 0.99), seed=st.integers(0, 5), family=st.sampled_from(["llama", "gpt2"]))
def test_magnitude_zeroes_the_smallest_and_nothing_else(sparsity, seed, family):
    model, dense = tiny_model(family, seed=seed), tiny_model(family, seed=seed)
    sparsify(model, WINDOWS, choose("magnitude", sparsity))
    for name, module in linear_layers(model).items():
        before, after = dense.get_submodule(name).weight, module.weight
        zeroed = after == 0
        assert int(zeroed.sum()) == round(sparsity * after.numel())
        assert torch.equal(after[~zeroed], before[~zeroed])
        if zeroed.any() and not zeroed.all():
            assert before[zeroed].abs().max() <= before[~zeroed].abs().min()
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)


@pytest.mark.parametrize("method", METHODS)
def test_counts_are_exact_where_all_weights_are_equal(method):
    model = load_free("llama")
    for module in linear_layers(model).values():
        module.weight.fill_(0.05)
    sparsify(model, WINDOWS, choose(method, 0.3))
    for name, module in linear_layers(model).items():
        assert int((module.weight == 0).sum()) == round(0.3 * module.weight.numel()), name


# --- the whole stage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
def test_the_sparsity_got_is_the_one_asked_for(method, family, pruned, checkpoints):
    model, record = pruned(family, method=method, sparsity=0.617)
    dense = load_model(checkpoints[family])
    for name, module in linear_layers(model).items():
        assert abs(int((module.weight == 0).sum()) - 0.617 * module.weight.numel()) <= 1, name
    assert abs(record["sparsity"] - 0.617) < 1e-3 and all(abs(share - 0.617) < 1e-3 for share in record["sparsity_by_layer"].values())
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    assert torch.equal(model.get_output_embeddings().weight, dense.get_output_embeddings().weight)
    assert ("calibration_tokens" in record["method"]) == (method != "magnitude")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("pattern", ["2:4", "4:8"])
def test_patterns_hold_in_every_group_of_inputs(pattern, method, family, pruned):
    model, record = pruned(family, method=method, pattern=pattern)
    zeros, group = (int(part) for part in pattern.split(":"))
    for name, module in linear_layers(model).items():
        stored = module.weight.detach().numpy()
        by_input = stored.T if isinstance(module, Conv1D) else stored
        assert ((by_input.reshape(-1, group) == 0).sum(1) == zeros).all(), name
    assert record["sparsity"] == 0.5


@pytest.mark.parametrize("method", METHODS)
def test_same_inputs_same_bytes(method, checkpoints, text, tmp_path):
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        prune.run(choose(method, 0.5, ffn=0.25), tmp_path / name, checkpoint=checkpoints["llama"], text=text)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("choices", "said"),
    [
        ({"sparsity": 0.5}, "set prune.method=magnitude"),
        ({"pattern": "2:4"}, "pattern is 2:4 but prune.method is none"),
        ({"method": "wanda", "sparsity": 0.5, "scope": "model"}, "set prune.scope=layer or prune.method to magnitude or taylor"),
        ({"method": "sparsegpt", "sparsity": 0.5, "scope": "model"}, "scores of prune.method sparsegpt compare within a layer"),
        ({"method": "taylor", "pattern": "4:8", "scope": "model"}, "fixes every layer's share; set prune.scope=layer"),
        ({"method": "wanda", "pattern": "2:4", "sparsity": 0.6}, "prune.sparsity is 0.6 but prune.pattern 2:4 is 0.5"),
        ({"method": "wanda", "sparsity": 0.99999}, "leaves nothing of model.layers.0.self_attn.q_proj"),
    ],
)
def test_choices_that_contradict_each_other_are_refused(choices, said, pruned, tmp_path):
    with pytest.raises(UserError, match=said) as caught:
        pruned("llama", **choices)
    assert "\n" not in str(caught.value) and not list(tmp_path.iterdir())


def test_a_pattern_that_does_not_divide_is_refused_before_any_work():
    config = type(tiny_model("llama").config)(
        hidden_size=64, intermediate_size=100, num_hidden_layers=1, num_attention_heads=4, num_key_value_heads=2, vocab_size=384
    )
    model = AutoModelForCausalLM.from_config(config).requires_grad_(False)
    before = weights_of(model)
    with pytest.raises(UserError, match="4:8 does not divide the 100 inputs of model.layers.0.mlp.down_proj"):
        sparsify(model, WINDOWS, choose("wanda", 0.0, pattern="4:8"))
    assert all(np.array_equal(before[name], weight) for name, weight in weights_of(model).items())


def test_a_layer_that_competition_empties_is_named():
    model = load_free("qwen3")
    decoder_layers(model)[1].mlp.up_proj.weight.mul_(1e-6)
    with pytest.raises(UserError, match="leaves nothing of model.layers.1.mlp.up_proj; set it lower or prune.scope=layer"):
        sparsify(model, WINDOWS, choose("magnitude", 0.5, scope="model"))


@pytest.mark.parametrize("method", ["wanda", "sparsegpt", "taylor"])
def test_weights_that_are_not_numbers_fail(method):
    model = load_free("llama")
    decoder_layers(model)[0].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(GateError, match="finite"):
        sparsify(model, WINDOWS, choose(method, 0.5))
