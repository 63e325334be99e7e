"""The sizes that are measured: recipes that validate, random checkpoints that load, made once."""

import pytest
import torch

from models.checkpoint import load_model, load_tokenizer
from models.errors import StageDied, UserError
from pipeline import bench_sizes
from pipeline.bench_sizes import SHARED, random_checkpoint, recipe_of, size_named, table
from pipeline.fit_shape import shape_of_config
from pipeline.recipe import DEMO
from pipeline.stages import ARTIFACT_OF_STAGE
from pipeline.tests.test_cli import refused

TINY = {
    "model_type": "qwen2", "vocab_size": 5000, "max_position_embeddings": 32768, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("name", [name for name in table() if name not in SHARED])
def test_every_size_has_a_recipe_of_every_artifact(name, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_sizes, "random_checkpoint", lambda preset, place: tmp_path)
    recipe = recipe_of(size_named(name), tmp_path, ["smooth.windows=3"])
    assert recipe.artifacts == tuple(ARTIFACT_OF_STAGE.values()) and recipe.smooth.windows == 3
    assert recipe.tflite.context_tokens == recipe.tflite_full_int8.context_tokens >= 512 + 64 + 8
    assert (recipe.recover.steps > 0) is (name == "demo")
    if name != "demo":
        windows = (recipe.prune.windows, recipe.onnx_int8.windows, recipe.tflite_int8.windows, recipe.tflite_full_int8.windows)
        assert max(windows) <= recipe.text.calibration_windows


def test_shapes_are_what_their_names_say():
    parameters = {name: bench_sizes.random_config(table()[name]["config"]) for name in ("139m", "0.5b")}
    assert [shape_of_config(config, name).context_tokens for name, config in parameters.items()] == [1024, 1024]
    assert [config["num_hidden_layers"] for config in parameters.values()] == [30, 24]


def test_an_unknown_size_is_told():
    with pytest.raises(UserError, match="no such size; give one of demo, 139m"):
        size_named("7b")
    with pytest.raises(UserError, match="no such size"):
        size_named("random")


def test_random_weights_are_drawn_as_for_training_and_made_once(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_sizes, "config_of", lambda preset: TINY)
    folder = random_checkpoint("tiny", tmp_path)
    model = load_model(folder)
    assert model.config.model_type == "qwen2" and model.config.max_position_embeddings == 1024 and model.config.eos_token_id == 0
    weight = model.model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.float32 and float(weight.std()) == pytest.approx(0.02, rel=0.05)
    assert float(model.model.norm.weight.min()) == 1.0
    assert len(load_tokenizer(folder)) <= 5000 and not list(tmp_path.glob("*.draft"))
    monkeypatch.setattr(bench_sizes.subprocess, "run", None)  # a second call starts no process
    assert random_checkpoint("tiny", tmp_path) == folder


def test_weights_that_cannot_be_made_leave_nothing(monkeypatch, tmp_path):
    monkeypatch.setattr(bench_sizes, "config_of", lambda preset: {**TINY, "model_type": "nothing"})
    with pytest.raises(StageDied, match="random weights for tiny"):
        random_checkpoint("tiny", tmp_path)
    assert [path.name for path in tmp_path.iterdir() if not path.name.endswith(".draft")] == []


@pytest.mark.parametrize(
    ("given", "words"),
    [
        (("--size", "7b"), "no such size; give one of demo"),
        (("--size", "demo", "--model", str(DEMO)), "--size names the model already"),
    ],
)
def test_sizes_that_make_no_sense_are_refused_before_anything_runs(tmp_path, given, words):
    assert words in refused(tmp_path, "bench", *given)
