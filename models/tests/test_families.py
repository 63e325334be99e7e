"""The description of the parts against what the modules do, and the JSON helpers against what they promise."""

import json
from pathlib import Path

import pytest
import torch

from conftest import tiny_model
from models.families import SUPPORTED_FAMILIES, layer_parts, linear_layers
from models.provenance import settings_record, write_json
from models.settings import TextSettings

TOKENS = torch.arange(20)[None] * 11 % 384


def recorded(model, module) -> tuple[torch.Tensor, torch.Tensor]:
    """What a module was given and what it answered in one forward of the model."""
    seen = []
    handle = module.register_forward_hook(lambda module, inputs, output: seen.append((inputs[0], output)))
    with torch.no_grad():
        model(TOKENS)
    handle.remove()
    return seen[0]


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_projections_are_the_maps_that_the_modules_compute(family):
    model = tiny_model(family).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.add_(torch.randn_like(parameter))
    parts = layer_parts(model)[1]
    for projection in (parts.q, parts.k, parts.v, parts.o, *parts.ffn_inputs, parts.down):
        given, answered = recorded(model, projection.module)
        expected = given @ projection.weight.T + (0 if projection.bias is None else projection.bias)
        rows = slice(projection.first_row, projection.first_row + projection.weight.shape[0])
        assert torch.allclose(answered[..., rows], expected, atol=1e-4)
    normed, _ = recorded(model, parts.q.module)
    assert torch.equal(normed, recorded(model, parts.attention_norm)[1])
    assert torch.equal(recorded(model, parts.ffn_inputs[0].module)[0], recorded(model, parts.ffn_norm)[1])


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_views_write_through_to_the_model(family):
    model = tiny_model(family).requires_grad_(False)
    for projection in (layer_parts(model)[0].v, layer_parts(model)[0].down):
        projection.weight.fill_(0.125)
        weight = projection.module.weight if family != "gpt2" else projection.module.weight.t()
        assert int((weight == 0.125).sum()) == projection.weight.numel()


@pytest.mark.parametrize("family", SUPPORTED_FAMILIES)
def test_linear_layers_are_the_decoders_and_not_the_head(family):
    model = tiny_model(family, tied=False)
    found = linear_layers(model)
    assert len(found) == (8 if family == "gpt2" else 14) and "lm_head" not in found
    assert all(model.get_submodule(name) is module for name, module in found.items())


def test_unknown_family_is_refused_by_name():
    model = tiny_model("llama")
    model.config.model_type = "falcon"
    with pytest.raises(ValueError, match="falcon"):
        layer_parts(model)


def test_settings_keep_file_names_only(tmp_path):
    record = settings_record(TextSettings(calibration=tmp_path / "some text.txt"))
    assert record["calibration"] == "some text.txt" and record["evaluation"] is None
    assert record["window_tokens"] == TextSettings().window_tokens
    write_json(tmp_path / "record.json", record)
    assert json.loads(Path(tmp_path / "record.json").read_text()) == record


def test_json_refuses_numbers_that_are_none(tmp_path):
    with pytest.raises(ValueError):
        write_json(tmp_path / "record.json", {"perplexity": float("nan")})
