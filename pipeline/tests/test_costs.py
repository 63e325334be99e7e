"""What the road costs: sizes that validate, limits that are held against what was measured, a page that has every stage."""

import json

import pytest

from models.errors import UserError
from pipeline import bench_sizes, costs
from pipeline.bench_rows import Attempt
from pipeline.costs import CostSize, measure_costs, over_limits, recipe_of, size_named, sizes
from pipeline.costs_report import COLUMNS, PAGE, PLOT, RECORD, rows, write_costs
from pipeline.fit_shape import config_of, parameters, shape_of_config
from pipeline.runner import StageRun
from pipeline.stages import stages_of

CONFIG = {
    "model_type": "llama", "vocab_size": 2000, "max_position_embeddings": 512, "hidden_size": 64, "intermediate_size": 128,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


@pytest.mark.parametrize("name", sizes())
def test_every_size_has_a_recipe_that_prunes_in_one_shot_and_does_not_recover(name, monkeypatch, tmp_path):
    monkeypatch.setattr(bench_sizes, "random_checkpoint", lambda preset, place: tmp_path)
    recipe = recipe_of(size_named(name), tmp_path, ["smooth.windows=3"])
    assert recipe.recover.steps == 0 and recipe.prune.ffn > 0 and recipe.smooth.windows == 3


def test_shapes_are_what_their_names_say():
    named = {"139m": 134.5e6, "0.5b": 494.0e6, "1.1b": 1100.0e6}
    for name, expected in named.items():
        preset = size_named(name).config
        assert parameters(shape_of_config(config_of(preset), preset)).total == pytest.approx(expected, rel=0.002), name


def test_an_unknown_size_is_told():
    with pytest.raises(UserError, match="no such size; give one of demo, 139m"):
        size_named("7b")


def made(recipe, work, stage, tell):
    """A road on which tflite_int8 dies."""
    if stage == "tflite_int8":
        return Attempt({}, [], "tflite_int8: the system killed it")
    found = [StageRun(name, 60.0 * place, 500.0 * place, 10.0, False) for place, name in enumerate(("checkpoint", stage), start=1)]
    return Attempt({"checkpoint": work}, found)


def test_every_stage_is_told_once_limits_are_judged_and_what_failed_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(costs, "attempt", made)
    monkeypatch.setattr(bench_sizes, "random_checkpoint", lambda preset, place: tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    size = measure_costs(CostSize("tiny", (), "tiny", limit_minutes=5, limit_mb=1000), tmp_path, [], lambda *_: None)
    stages = [row["stage"] for row in size["stages"]]
    recipe = recipe_of(CostSize("tiny", (), "tiny"), tmp_path, [])
    assert sorted(stages) == sorted({"checkpoint", "tokenizer", "golden", *stages_of(recipe.artifacts)} - {"tflite_int8"})
    assert size["minutes"] == 1 + 2 * (len(stages) - 1) and size["peak_rss_mb"] == 1000 and size["disk_mb"] == 10 * len(stages)
    lines = over_limits(size)
    assert [line.split(":")[1].split()[0] for line in lines] == ["tflite_int8", f"{size['minutes']:.0f}"]
    assert "the system killed it" in lines[0] and "limit 5" in lines[1]
    assert over_limits({**size, "failures": {}, "limits": {"minutes": None, "peak_rss_mb": 1000}}) == []


def test_sizes_are_kept_beside_each_other_and_told_smallest_first(tmp_path):
    def size(name, count, seconds):
        stages = [{"stage": "onnx", "seconds": seconds, "peak_rss_mb": 700.0, "disk_mb": 3.0, "cached": False}]
        return {
            "name": name, "parameters": count, "measured_at": "now", "environment": {"cpu": "a", "isa": "b", "cores": 2}, "settings": [],
            "stages": stages, "failures": {}, "minutes": seconds / 60, "peak_rss_mb": 700.0, "disk_mb": 3.0,
            "limits": {"minutes": 1.0, "peak_rss_mb": None},
        }  # fmt: skip

    write_costs([size("large", 2_000_000, 90.0)], tmp_path)
    record = write_costs([size("small", 1_000_000, 30.0)], tmp_path)
    assert [line[0] for line in rows(record)] == ["small", "large"] and {len(line) for line in rows(record)} == {len(COLUMNS)}
    text = (tmp_path / PAGE).read_text()
    assert "| small | 1.0 | 0.5 | 1 | 700 |" in text and "- large: 2 minutes, limit 1; most of it in onnx" in text
    assert f"({PLOT})" in text and (tmp_path / PLOT).stat().st_size > 1000
    assert json.loads((tmp_path / RECORD).read_text()) == record
