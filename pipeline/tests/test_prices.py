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
from pipeline.prices import kept
from pipeline.prices_measure import Dense, as_int8, weight_bytes
from pipeline.prices_plan import artifact_rows, model_rows
from pipeline.prices_report import pareto_front, prices_page
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
