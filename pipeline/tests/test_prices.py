"""Prices: every way of shrinking has its rows, measured by formulas written out here, and the page is made from the numbers."""

import json
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import VOCABULARY, tiny_model, write_checkpoint
from models.checkpoint import load_model
from models.corpus import Source, split_of
from pipeline.prices import Prices, key_of_artifact, key_of_model, priced_artifacts, priced_model
from pipeline.prices_kept import Earlier, kept, row_key
from pipeline.prices_long import long_recipe, recovery_text
from pipeline.prices_measure import Dense, as_int8, weight_bytes
from pipeline.prices_plan import artifact_rows, long_rows, model_rows
from pipeline.prices_report import measured_where, pareto_front, prices_page
from pipeline.prices_report_long import below, long_section
from pipeline.recipe import ROOT, load_recipe
from pipeline.settings import PruneSettings
from pipeline.stages import ARTIFACT_OF_STAGE

ARTIFACTS = tuple(ARTIFACT_OF_STAGE.values())
WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, (5, 24), dtype=np.int32)


@pytest.mark.parametrize("quick", [False, True])
def test_every_row_is_a_recipe_and_names_are_told_apart(quick):
    rows = model_rows(quick)
    assert len({(row.name, row.recovered) for row in rows}) == len(rows)
    methods = {load_recipe(None, list(row.overrides)).prune.method for row in rows}
    assert methods == set(PruneSettings.model_fields["method"].annotation.__args__)
    names = [row.name for row in artifact_rows(quick, ARTIFACTS)]
    assert len(set(names)) == len(names) and set(ARTIFACTS) <= set(names)
    for row in artifact_rows(quick, ARTIFACTS):
        load_recipe(None, [*row.overrides, f'artifacts=["{row.artifact}"]'])


def test_full_prices_have_every_method_at_every_share_before_and_after_recovery():
    rows = {(row.name, row.recovered) for row in model_rows(False)}
    for share in ("25%", "50%", "75%", "90%"):
        for method in ("magnitude", "magnitude over the model", "wanda", "sparsegpt", "taylor", "taylor over the model"):
            assert {(f"{method} {share}", False), (f"{method} {share}", True)} <= rows


def test_a_models_price_is_what_the_formulas_say(tmp_path):
    dense, other = (write_checkpoint(tmp_path / str(seed), "llama", seed=seed) for seed in (0, 1))
    price = Dense(dense, WINDOWS, 8).price(other)
    tokens = torch.from_numpy(WINDOWS).long()
    with torch.no_grad():
        expected, got = (load_model(folder)(tokens).logits[:, 7:-1].double().log_softmax(-1) for folder in (dense, other))
    losses = [-logs.gather(-1, tokens[:, 8:, None]).mean() for logs in (expected, got)]
    assert price.ratio == pytest.approx(float((losses[1] - losses[0]).exp()), rel=1e-4)
    assert price.kl == pytest.approx(float((expected.exp() * (expected - got)).sum(-1).mean()), rel=1e-4)
    assert price.top1 == pytest.approx(float((expected.argmax(-1) == got.argmax(-1)).double().mean()))
    same = Dense(dense, WINDOWS, 8).price(dense)
    assert same.ratio == 1 and same.kl == pytest.approx(0, abs=1e-9) and same.top1 == 1


def test_bytes_are_those_of_the_numbers_and_zeros_shrink_the_download_only():
    model = tiny_model("llama").requires_grad_(False)
    before = weight_bytes(model)
    assert before["bytes_fp32"] == 4 * sum(parameter.numel() for parameter in model.parameters())
    raw = b"".join(array.tobytes() for parameter in model.parameters() for array in as_int8(parameter.numpy()))
    assert before["bytes_int8"] == len(raw) and before["download_int8"] == len(zlib.compress(raw, 9))
    model.model.layers[0].mlp.down_proj.weight[:, ::2] = 0
    after = weight_bytes(model)
    assert after["bytes_int8"] == before["bytes_int8"] and after["download_int8"] < before["download_int8"]


@given(st.integers(0, 50))
def test_int8_errs_by_half_a_step_at_most_and_keeps_zeros(seed):
    weight = np.random.default_rng(seed).normal(size=(5, 7)).astype(np.float32)
    weight[0], weight[1, 3] = 0, 0
    codes, scale = as_int8(weight)
    assert codes.dtype == np.int8 and (codes[0] == 0).all() and codes[1, 3] == 0
    assert (np.abs(codes * scale - weight) <= scale / 2 * 1.0001).all()


@given(st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_the_front_is_what_nothing_beats(pairs):
    points = [(float(x), float(y), "") for x, y in pairs]
    front = pareto_front(points)
    assert front == sorted(front) and front
    for x, y, _ in points:
        on_front = any((x, y) == (other[0], other[1]) for other in front)
        beaten = any((other[0] <= x and other[1] <= y) and (other[0], other[1]) != (x, y) for other in points)
        assert on_front != beaten


def test_a_row_is_measured_once(tmp_path):
    calls = []
    for _ in range(2):
        assert kept(tmp_path, "model", ["a"], lambda: calls.append(1) or {"value": 1}) == {"value": 1}
    kept(tmp_path, "model", ["b"], lambda: calls.append(1) or {})
    assert len(calls) == 2


def test_the_committed_page_is_made_from_the_committed_numbers():
    found = json.loads((ROOT / "docs" / "prices.json").read_text(encoding="utf-8"))
    assert (ROOT / "docs" / "prices.md").read_text(encoding="utf-8") == prices_page(found)


def test_a_models_row_is_taken_over_by_its_key_and_by_nothing_else(tmp_path, monkeypatch):
    row = model_rows(True)[1]
    known = {"name": row.name, "key": key_of_model(row, tmp_path), "ratio": 1.5}
    assert not any(tmp_path.iterdir())  # a key costs no run
    prices = Prices(tmp_path, quick=True, earlier=Earlier({"models": [known]}))
    monkeypatch.setattr("pipeline.prices.run_stages", lambda *_: pytest.fail("a stage was run"))
    assert priced_model(row, prices, None, lambda *_: None) == known
    changed = Prices(tmp_path, quick=True, earlier=Earlier({"models": [{**known, "key": "0" * 16}]}))
    with pytest.raises(pytest.fail.Exception, match="a stage was run"):
        priced_model(row, changed, None, lambda *_: None)


def test_keys_tell_recipes_kinds_and_measuring_code_apart(tmp_path, monkeypatch):
    rows = model_rows(False)
    assert len({key_of_model(row, tmp_path) for row in rows}) == len(rows)
    before = row_key("model", ["a"])
    assert before != row_key("artifact", ["a"])
    monkeypatch.setattr("pipeline.prices_kept.measuring_code", lambda kind: {"pipeline.prices_measure": "changed"})
    assert row_key("model", ["a"]) != before


def test_artifacts_are_taken_over_together_or_not_at_all(tmp_path, monkeypatch):
    monkeypatch.setattr("pipeline.prices.artifact_rows", lambda *_: [row for row in artifact_rows(True, ARTIFACTS) if not row.outliers][:2])
    wanted = [row for row in artifact_rows(True, ARTIFACTS) if not row.outliers][:2]
    by = {"version": "of old"}
    known = [{"name": row.name, "key": key_of_artifact(row, tmp_path), "measured_by": by} for row in wanted]
    monkeypatch.setattr("pipeline.prices.priced_artifact", lambda row, *_: [{"name": row.name, "new": True}])

    def found(artifacts: list[dict], **options) -> tuple:
        return priced_artifacts(Prices(tmp_path, quick=True, earlier=Earlier({"artifacts": artifacts}), **options), lambda *_: None)

    assert found(known) == (known, [])
    one_changed = [known[0], {**known[1], "key": "0" * 16}]
    again, missing = found(one_changed)
    assert [entry["new"] for entry in again] == [True, True] and again[0]["measured_by"]["cores"] and not missing
    assert found(one_changed, keep_artifacts=True) == (one_changed, [])
    assert found(one_changed, only_kept=True)[1] == wanted  # nothing was made in this folder
    filled, missing = found(known[1:], keep_artifacts=True)
    assert [entry.get("new") for entry in filled] == [True, None] and filled[1] == known[1] and not missing


def test_rows_of_different_machines_are_told_apart():
    by = {"version": "abc", "cpu": None, "cores": 2, "isa": "x86_64"}
    rows = [{"name": "one", "measured_by": by}, {"name": "two", "measured_by": {**by, "version": "def", "cpu": "A"}}]
    assert measured_where({"artifacts": rows[:1]}) == (
        "All of them were measured by version abc on 2 cores of a processor whose name was not recorded (x86_64)."
    )
    assert "but two by version def on 2 cores of A (x86_64): times of different runs" in measured_where({"artifacts": rows})


def test_every_committed_row_has_a_key_or_says_who_measured_it():
    found = json.loads((ROOT / "docs" / "prices.json").read_text(encoding="utf-8"))
    assert all(row["key"] for row in found["models"]) and all(row["measured_by"]["version"] for row in found["artifacts"])
    keys = [row["key"] for row in found["models"]]
    assert len(set(keys)) == len(keys)


def test_long_rows_are_recipes_that_draw_nothing_twice(tmp_path, monkeypatch):
    text = tmp_path / "text.txt"
    text.write_text("word " * 100)
    for row in long_rows():
        recipe = long_recipe(row, text)
        assert recipe.recover.steps == row.steps and recipe.recover.precision == "bfloat16" and recipe.text.calibration == text
        assert recipe.text.evaluation == load_recipe(None, []).text.evaluation
    made = []
    sources = [Source("p", "1", "MIT", f"file{number}.py", f"text {number}") for number in range(2000)]
    monkeypatch.setattr("pipeline.prices_long.collect", lambda: made.append(1) or sources)
    texts = recovery_text(tmp_path).read_text().splitlines()
    assert recovery_text(tmp_path) and len(made) == 1
    assert set(texts) == {source.text for source in sources if split_of(source.path) == "train"} != {source.text for source in sources}


def test_below_is_where_the_target_is_held_for_good():
    ratios = [1.0, 1.05, 1.3, 1.12, 1.06, 1.04]
    curve = [{"step": number, "validation_perplexity_ratio": ratio, "cpu_seconds": 10.0 * number} for number, ratio in enumerate(ratios)]
    row = {"curve": curve, "pruned_until_step": 0}
    assert below({**row, "target": 1.08}) == "40"
    assert below({**row, "target": 1.01}) == "-"
    assert below({**row, "target": 1.5}) == "10"
    assert below({**row, "target": 1.5, "pruned_until_step": 3}) == "40"  # what is still being pruned does not count
    assert long_section({"long": {}}) == ""
