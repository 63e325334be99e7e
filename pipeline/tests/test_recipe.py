"""Recipes: every fault told at once, overrides win, and the recipe that travels can be read again."""

import tomllib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import UserError
from pipeline.recipe import DEMO, DEMO_TEXTS, bundle_name, load_recipe, recipe_toml
from pipeline.stages import STAGES, needed


def test_default_recipe_is_the_demo_model_with_its_own_texts():
    recipe = load_recipe(None, [])
    assert recipe.name == "demo" and recipe.checkpoint.source == str(DEMO)
    assert recipe.text.calibration == DEMO_TEXTS["calibration"]
    assert recipe.gates.onnx_static_int8.perplexity_change == 0.003


def test_another_checkpoint_does_not_borrow_the_demo_texts():
    recipe = load_recipe(None, ["checkpoint.source=some/Folder-1.5B"])
    assert recipe.text.calibration is None and recipe.name == "folder-1.5b"


def test_mixed_precision_aims_at_the_gate_unless_the_recipe_says_otherwise():
    assert load_recipe(None, ["gates.onnx_static_int8.top1=0.97"]).onnx_int8.least_top1 == 0.97
    assert load_recipe(None, ["onnx_int8.least_top1=0.9"]).onnx_int8.least_top1 == 0.9


def test_only_stages_on_the_way_to_a_wanted_artifact_run():
    names = [stage.name for stage in needed(STAGES, ["onnx_weight_only_int4"])]
    assert "onnx" in names and "onnx_weight_only_int4" in names and "tokenizer" in names
    assert not {"onnx_int8", "tflite", "tflite_full_int8"} & set(names)
    assert [stage.name for stage in STAGES if stage.name in names] == names


@pytest.mark.parametrize("given", ['["onnx_fp16"]', '["onnx_fp32", "onnx_fp32"]', "[]"])
def test_artifacts_are_known_and_named_once(given):
    with pytest.raises(UserError, match="artifacts"):
        load_recipe(None, [f"artifacts={given}"])


def test_a_scope_without_a_method_is_not_ignored():
    with pytest.raises(UserError, match="prune.*method is none"):
        load_recipe(None, ["prune.scope=model"])


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["prune.method=wanda"], "method is wanda but nothing says how much goes"),
        (["prune.method=wanda", "prune.sparsity=0.5", "prune.damping=0.1"], "damping is 0.1 but method is wanda"),
    ],
)
def test_choices_of_pruning_that_would_do_nothing_are_refused(overrides, words):
    with pytest.raises(UserError, match=words):
        load_recipe(None, overrides)
    assert load_recipe(None, ["prune.method=wanda", "prune.sparsity=0"]).prune.sparsity == 0  # said, so it is meant: the dense model


@pytest.mark.parametrize("override", ["prune.sparsity=1.5", "cluster.centroids=1", "smooth.alpha=2", "gates.onnx_fp32.top1=3", "prune.x=1"])
def test_one_fault_is_one_line_that_names_the_key_once(override):
    with pytest.raises(UserError) as caught:
        load_recipe(None, [override])
    key = override.partition("=")[0]
    assert "\n" not in str(caught.value) and str(caught.value).startswith(f"the recipe: {key}") and str(caught.value).count(key) == 1
    assert str(caught.value).endswith("; mend it and run again")


def test_all_faults_at_once(tmp_path):
    path = tmp_path / "bad.toml"
    path.write_text('[prune]\nsparsity = 1.5\nffn = "half"\ntypo = 1\n[nowhere]\nx = 1\n')
    with pytest.raises(UserError) as caught:
        load_recipe(path, ["text.window_tokens=3"])
    lines = str(caught.value).splitlines()
    assert lines[0].startswith("bad.toml: 5 faults")
    told = "\n".join(lines[1:])
    for key in ("prune.sparsity = 1.5", "prune.ffn = 'half'", "prune.typo", "nowhere", "text.window_tokens = 3"):
        assert key in told


@pytest.mark.parametrize("override", ["sparsity", "=3", "prune.sparsity.more=1"])
def test_an_override_that_cannot_be_placed_is_refused(override):
    with pytest.raises(UserError):
        load_recipe(None, ["prune.sparsity=0.1", override])


def test_missing_and_broken_files(tmp_path):
    with pytest.raises(UserError, match="no such recipe"):
        load_recipe(tmp_path / "none.toml", [])
    (tmp_path / "broken.toml").write_text("[prune\n")
    with pytest.raises(UserError, match="not readable as TOML"):
        load_recipe(tmp_path / "broken.toml", [])


def test_the_travelling_recipe_names_no_path_and_says_everything(tmp_path):
    text = recipe_toml(load_recipe(None, ["prune.ffn=0.5"]))
    values = tomllib.loads(text)
    assert str(DEMO.parent) not in text
    assert values["prune"]["ffn"] == 0.5 and values["text"]["evaluation"] == "heldout.txt"
    (tmp_path / "again.toml").write_text(text)
    assert load_recipe(tmp_path / "again.toml", []).prune.ffn == 0.5


@given(st.text())
def test_any_source_gives_a_name_that_the_recipe_accepts(source):
    name = bundle_name(source)
    assert load_recipe(None, [f'name="{name}"']).name == name
