"""SparseGPT against optimal brain surgery written column by column with the inverse worked out anew each time."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from conftest import tiny_model
from models.errors import GateError
from models.families import decoder_layers, linear_layers, weight_view
from pipeline.layerwise import InputGroup
from pipeline.masks import Removal, lowest
from pipeline.recipe import ROOT
from pipeline.settings import PruneSettings
from pipeline.sparsegpt import BLOCK_COLUMNS, inverse_factor, prune_group, pruned_weight
from pipeline.sparsify import sparsify

WINDOWS = torch.from_numpy(np.random.default_rng(0).integers(0, 384, (6, 24)))


def layer_and_inputs(outputs: int, inputs: int, tokens: int) -> tuple[torch.nn.Linear, torch.Tensor]:
    """A random layer and inputs ``[tokens, inputs]`` that are correlated, as activations are."""
    rng = np.random.default_rng(1)
    mixed = rng.normal(size=(tokens, inputs)) @ (np.eye(inputs) + rng.normal(size=(inputs, inputs)) / inputs**0.5)
    layer = torch.nn.Linear(inputs, outputs, bias=False).requires_grad_(False)
    layer.weight.copy_(torch.from_numpy(rng.normal(size=(outputs, inputs))))
    return layer, torch.from_numpy(mixed).float()


def group_of(layer: torch.nn.Module, inputs: torch.Tensor) -> InputGroup:
    return InputGroup(("layer",), (layer,), lambda see: [see(part) for part in inputs.split(50)])


def brain_surgery(weight: np.ndarray, hessian: np.ndarray, removal: Removal) -> np.ndarray:
    """Float64. As in the paper masks are chosen per block of columns, or per group of a pattern, from the weights as they are by then."""
    weight, (rows, columns) = weight.copy(), weight.shape
    width = removal.group or BLOCK_COLUMNS
    gone = np.zeros(weight.shape, dtype=bool)
    for column in range(columns):
        if column % width == 0:
            some = slice(column, min(column + width, columns))
            price = np.stack(
                [weight[:, each] ** 2 / np.linalg.inv(hessian[each:, each:])[0, 0] for each in range(some.start, some.stop)], 1
            )
            if removal.group:
                order = np.argsort(price, axis=1, kind="stable")[:, : removal.zeros]
                gone[np.arange(rows)[:, None], column + order] = True
            else:
                count = round(removal.sparsity * rows * some.stop) - round(removal.sparsity * rows * some.start)
                chosen = np.argsort(price.reshape(-1), kind="stable")[:count]
                gone[chosen // price.shape[1], column + chosen % price.shape[1]] = True
        inverse = np.linalg.inv(hessian[column:, column:])
        for row in np.flatnonzero(gone[:, column]):
            weight[row, column:] -= weight[row, column] / inverse[0, 0] * inverse[0]
            weight[row, column] = 0.0
    return weight


@pytest.mark.parametrize("removal", [Removal(0.5), Removal(0.83), Removal(0.5, 2, 4), Removal(0.5, 4, 8)])
def test_weights_are_those_of_brain_surgery_with_exact_inverses(removal):
    layer, inputs = layer_and_inputs(outputs=24, inputs=160, tokens=400)  # more columns than one block
    x = inputs.double().numpy()
    hessian = x.T @ x
    hessian += 0.01 * hessian.diagonal().mean() * np.eye(160)
    expected = brain_surgery(layer.weight.double().numpy(), hessian, removal)
    prune_group(group_of(layer, inputs), removal, damping=0.01)
    found = layer.weight.double().numpy()
    assert np.array_equal(found == 0, expected == 0) and (found == 0).sum() == round(removal.sparsity * found.size)
    assert np.abs(found - expected).max() < 1e-4 * np.abs(expected).max()


@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_the_layers_output_suffers_less_than_from_magnitude(sparsity):
    layer, inputs = layer_and_inputs(outputs=48, inputs=200, tokens=600)
    dense = layer.weight.clone()
    by_size = dense.masked_fill(lowest(dense.abs(), round(sparsity * dense.numel())), 0.0)
    prune_group(group_of(layer, inputs), Removal(sparsity), damping=0.01)
    errors = [float((inputs @ (weight - dense).T).square().sum()) for weight in (layer.weight, by_size)]
    assert errors[0] < 0.85 * errors[1], errors


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
@pytest.mark.parametrize("sparsity", [0.5, 0.7])
def test_the_first_layers_outputs_suffer_less_in_a_model_too(sparsity, family):
    """The first decoder layer's query, key and value inputs are the same in every variant."""
    dense, errors = tiny_model(family).requires_grad_(False), {}
    name, module = next(iter(linear_layers(dense).items()))
    seen = []
    handle = module.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].flatten(0, -2)))
    dense(WINDOWS)
    handle.remove()
    for method in ("magnitude", "sparsegpt"):
        model = tiny_model(family).requires_grad_(False)
        sparsify(model, WINDOWS, PruneSettings(method=method, sparsity=sparsity))
        change = weight_view(model.get_submodule(name)) - weight_view(module)
        errors[method] = float((seen[0] @ change.T).square().sum())
    assert errors["sparsegpt"] < errors["magnitude"], errors


def test_the_factor_is_that_of_the_damped_inverse():
    _, inputs = layer_and_inputs(1, 40, 100)
    moments = inputs.T @ inputs
    factor = inverse_factor(moments, 0.1)
    damped = moments.double() + 0.1 * moments.diagonal().double().mean() * torch.eye(40)
    upper = factor.upper.double()
    assert torch.allclose(upper.T @ upper, torch.linalg.inv(damped), rtol=1e-3, atol=1e-7)
    assert torch.equal(upper, upper.triu()) and factor.damping == 0.1 and factor.dead_inputs == 0


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_too_little_damping_is_raised_and_told(family):
    """24 tokens span no 64 inputs, and 1e-12 of the diagonal is below float32."""
    model = tiny_model(family).requires_grad_(False)
    facts = sparsify(model, WINDOWS[:1], PruneSettings(method="sparsegpt", sparsity=0.5, damping=1e-12))
    first = next(iter(linear_layers(model)))
    assert facts["damping"] == 1e-12 and 1e-12 < facts["damped_more"][first] < 1e-2
    assert all(torch.isfinite(module.weight).all() for module in linear_layers(model).values())
    plenty = tiny_model(family).requires_grad_(False)
    assert sparsify(plenty, WINDOWS[:1], PruneSettings(method="sparsegpt", sparsity=0.5))["damped_more"] == {}


def test_equal_inputs_are_pruned_like_any_other():
    layer, _ = layer_and_inputs(8, 16, 1)
    factor = prune_group(group_of(layer, torch.ones(30, 16)), Removal(0.5), damping=0.01)
    assert int((layer.weight == 0).sum()) == 64 and torch.isfinite(layer.weight).all() and factor.damping == 0.01


def test_weights_of_dead_inputs_go_first_and_disturb_nobody():
    layer, inputs = layer_and_inputs(8, 32, 100)
    inputs[:, ::2] = 0.0
    dense = layer.weight.clone()
    factor = prune_group(group_of(layer, inputs), Removal(0.5), damping=0.01)
    assert factor.dead_inputs == 16
    assert not layer.weight[:, ::2].any() and torch.equal(layer.weight[:, 1::2], dense[:, 1::2])


def test_inputs_that_are_all_dead_leave_magnitude():
    layer, _ = layer_and_inputs(8, 32, 1)
    expected = layer.weight.masked_fill(lowest(layer.weight.abs(), 128), 0.0)
    prune_group(group_of(layer, torch.zeros(10, 32)), Removal(0.5), damping=0.01)
    assert torch.equal(layer.weight, expected)


def test_dead_inputs_are_told_by_layer():
    model = tiny_model("llama").requires_grad_(False)
    decoder_layers(model)[1].post_attention_layernorm.weight[:5] = 0.0
    facts = sparsify(model, WINDOWS, PruneSettings(method="sparsegpt", sparsity=0.5))
    assert facts["dead_inputs"] == {"model.layers.1.mlp.gate_proj": 5, "model.layers.1.mlp.up_proj": 5}


def test_moments_that_no_damping_mends_fail():
    with pytest.raises(GateError, match="set prune.method=wanda"):
        inverse_factor(torch.tensor([[1.0, 1e9], [1e9, 1.0]]), 0.01)


def test_the_weight_given_is_left_alone():
    layer, inputs = layer_and_inputs(4, 8, 50)
    before = layer.weight.clone()
    pruned_weight(layer.weight, inverse_factor(inputs.T @ inputs, 0.01).upper, Removal(0.5))
    assert torch.equal(layer.weight, before)


PEAK_OF_FACTOR = """
import torch
from pipeline.sparsegpt import inverse_factor

def status(name):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(name))

rows = torch.randn(400, 256)
inverse_factor(rows.T @ rows, 0.01)  # what the first call loads is not counted
torch.manual_seed(0)
moments = torch.eye({inputs})
for part in torch.randn({inputs} // 2, {inputs}).split(256):
    moments.addmm_(part.T, part)
held = [moments]
del moments, part
open("/proc/self/clear_refs", "w").write("5")  # the peak begins here
before = status("VmRSS")
inverse_factor(held.pop(), 0.01)
print(status("VmHWM") - before)
"""


def test_a_wide_layer_takes_two_matrices_of_its_inputs_at_most():
    """A layer of 11,008 inputs has 485 MB of second moments; with one copy that is below 1 GB above the model."""
    inputs, widest = 2048, 11_008
    one = 4 * inputs**2
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-c", PEAK_OF_FACTOR.format(inputs=inputs)]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    copies = 1 + int(asked.stdout) / one
    assert copies * 4 * widest**2 < 1e9, f"{copies:.2f} matrices at once"
