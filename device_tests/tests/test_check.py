"""Replay, quality, timing and verdict over a model in plain numpy, so that every number can be computed a second way."""

import json
import math

import numpy as np
import pytest
import scipy.special

from device_tests.artifact import Artifact
from device_tests.check import CheckOptions, check_artifact
from device_tests.errors import DeviceTestError
from device_tests.gates import Gates, read_gates
from device_tests.replay import greedy_prefixes, replay
from device_tests.result import timing_fields
from device_tests.tests.toy import INTERFACE, NumpySession, ToyModel, write_vectors
from device_tests.timing import measure, peak_rss_mb
from device_tests.vectors import open_golden

REFERENCE, OTHER = ToyModel(0), ToyModel(1)


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Vectors whose reference is toy 0 and whose dense model is toy 1."""
    return write_vectors(tmp_path_factory.mktemp("golden"), REFERENCE, OTHER)


def run(golden, tmp_path, session, **options) -> dict:
    artifact = Artifact("toy", "onnx", tmp_path / "toy.onnx", "0" * 64, 1, INTERFACE)
    chosen = CheckOptions(runtime="onnxruntime", decode_tokens=64, **options)
    return check_artifact(artifact, open_golden(golden, INTERFACE), chosen, "1.0", lambda: session)


def test_the_reference_itself_passes_the_strictest_gates(golden, tmp_path):
    gates = Gates(perplexity_change=1e-6, top1=1.0, kl=1e-6, max_abs_diff=1e-5)
    result = run(golden, tmp_path, NumpySession(REFERENCE), quality=True, gates=gates)
    device, quality = result["device"], result["quality"]
    assert device["passed"] and device["failures"] == []
    assert (device["top1"], device["greedy_prefix"], device["greedy_tokens"], device["golden_tokens"]) == (1.0, 10, 10, 18)
    assert device["max_abs_diff"] == 0.0 and device["kl"] == pytest.approx(0, abs=1e-12)
    assert quality["tokens"] == 39 and quality["top1"] == 1.0
    assert quality["perplexity_change"] == pytest.approx(0, abs=1e-6)
    json.dumps(result, allow_nan=False)


def test_another_model_gets_the_numbers_that_the_formulas_give(golden, tmp_path):
    result = run(golden, tmp_path, NumpySession(OTHER), quality=True)
    windows = np.load(golden / "evaluation.npz")["windows"]
    losses, divergences, equal = [], [], []
    for window in windows:
        p, q = (scipy.special.log_softmax(model.logits(window)[10:-1].astype(float), axis=-1) for model in (REFERENCE, OTHER))
        losses.append([-row[token] for row, token in zip(q, window[11:], strict=True)])
        equal.append(p.argmax(axis=1) == q.argmax(axis=1))
        for row, other in zip(p, q, strict=True):
            top = np.argsort(-row)[:6]
            buckets = [np.append(np.exp(x[top]), np.delete(np.exp(x), top).sum()) for x in (row, other)]
            divergences.append(scipy.special.rel_entr(*buckets).sum())
    quality = result["quality"]
    assert quality["perplexity"] == pytest.approx(np.exp(np.mean(losses)), rel=1e-5)
    assert quality["perplexity_change_dense"] == pytest.approx(0, abs=1e-5)  # the dense model of these vectors is this one
    assert quality["kl"] == pytest.approx(np.mean(divergences), rel=1e-4)
    assert quality["top1"] == pytest.approx(np.mean(equal))
    place = quality["worst_token"]
    assert (place["window"], place["position"]) == (np.argmax(divergences) // 13, 10 + np.argmax(divergences) % 13)


@pytest.mark.parametrize(
    ("value", "reason"),
    [(0.0, "all-zero logits"), (np.nan, "NaN or infinite logits"), (np.inf, "NaN or inf"), (2.5, "constant logits")],
)
@pytest.mark.parametrize("timing", [True, False])
def test_broken_logits_fail_by_name_without_any_gate(golden, tmp_path, value, reason, timing):
    session = NumpySession(REFERENCE, spoil=lambda row, position: np.full_like(row, value))
    device = run(golden, tmp_path, session, timing=timing)["device"]
    assert not device["passed"]
    assert len(device["failures"]) == 1 and reason in device["failures"][0] and "toy in onnxruntime" in device["failures"][0]


def test_one_broken_token_is_found_and_placed(golden, tmp_path):
    session = NumpySession(REFERENCE, spoil=lambda row, position: row * np.nan if position == 13 else row)
    assert "NaN or infinite logits at window 0 token 13" in run(golden, tmp_path, session, timing=False)["device"]["failures"][0]


def test_the_same_answer_to_everything_is_found(golden, tmp_path):
    answer = REFERENCE.logits(np.array([1]))[0]
    session = NumpySession(REFERENCE, spoil=lambda row, position: answer)
    assert "the same logits for every token of window 0" in run(golden, tmp_path, session)["device"]["failures"][0]


def test_each_gate_names_number_limit_and_place(golden, tmp_path):
    gates = Gates(perplexity_change=-0.9, top1=0.99, kl=0.01, max_abs_diff=1e-3)  # random text: another model may do better
    failures = run(golden, tmp_path, NumpySession(OTHER), quality=True, gates=gates)["device"]["failures"]
    assert [failure.split(": ")[1].split()[0] for failure in failures] == ["max_abs_diff", "perplexity_change", "top1", "kl"]
    assert all("worst" in failure and "window" in failure for failure in failures)
    assert "exceeds 0.001 " in failures[0] and "exceeds -90.000%" in failures[1] and "below 0.9900" in failures[2]


def test_golden_tokens_are_judged_with_their_error_but_a_limit_of_one_allows_none(golden, tmp_path):
    def spoil(row, position):
        row = row.copy()
        if position == 12:  # one token in six gets another first choice: top-1 5/6
            row[row.argmin()] = row.max() + 1e-3
        return row

    assert run(golden, tmp_path, NumpySession(REFERENCE, spoil), gates=Gates(top1=0.95))["device"]["passed"]
    assert not run(golden, tmp_path, NumpySession(REFERENCE, spoil), gates=Gates(top1=0.99))["device"]["passed"]
    assert not run(golden, tmp_path, NumpySession(REFERENCE, spoil), gates=Gates(top1=1.0))["device"]["passed"]
    # over all evaluation windows the limit is taken to the letter: 12/13 agree
    assert not run(golden, tmp_path, NumpySession(REFERENCE, spoil), gates=Gates(top1=0.95), quality=True)["device"]["passed"]


def test_max_abs_diff_is_placed(golden):
    def spoil(row, position):
        return row + np.float32(0.25) * (np.arange(len(row)) == 4) * (position == 14)

    found = replay(NumpySession(REFERENCE, spoil), open_golden(golden, INTERFACE))
    assert found.max_abs_diff == pytest.approx(0.25, rel=1e-4) and found.worst.position == 14


def test_greedy_prefix_ends_where_the_text_first_differs(golden):
    def spoil(row, position):
        row = row.copy()
        if position == 4 + 3:  # greedy prompts have 5 tokens: the choice after three equal ones
            row[(row.argmax() + 1) % len(row)] = row.max() + 1
        return row

    assert greedy_prefixes(NumpySession(REFERENCE, spoil), open_golden(golden, INTERFACE)) == ([3, 3], 10)


def test_timing_has_every_sample_and_its_own_peak():
    session, timing = measure(lambda: NumpySession(REFERENCE), np.arange(20), 70)  # 20 rooms per round: several rounds
    assert len(timing.decode_ms) == 70 and min(timing.decode_ms) > 0
    assert len(timing.first.samples_ms) == 5 and timing.first.tokens == 20
    assert timing.decode_tokens_per_s == pytest.approx(70 / sum(timing.decode_ms) * 1000)
    assert 0 < timing.baseline_rss_mb <= timing.load_rss_mb <= timing.peak_rss_mb
    assert session.position == 0


def test_a_prompt_that_takes_long_is_fed_fewer_times(monkeypatch):
    monkeypatch.setattr("device_tests.timing.ENOUGH_MS", 0.0)
    _, timing = measure(lambda: NumpySession(REFERENCE), np.arange(20), 3)
    assert len(timing.first.samples_ms) == 2


def test_peak_memory_follows_an_allocation():
    before = peak_rss_mb()
    block = np.ones(60_000_000, dtype=np.uint8)
    assert peak_rss_mb() >= before and peak_rss_mb() > 60 and block[0] == 1


def test_other_prompt_lengths_are_timed_where_the_context_holds_them():
    _, timing = measure(lambda: NumpySession(REFERENCE), np.arange(20), 3, (16, 20, 39, 40, 256))
    assert [prompt.tokens for prompt in timing.prompts] == [16, 20, 39], "39 leaves room for one token, 40 does not"
    assert timing.first in timing.prompts and all(len(prompt.samples_ms) == 5 for prompt in timing.prompts)
    assert set(timing.conditions) == {"before", "during", "after"}


def test_a_throttled_run_says_so(monkeypatch):
    states = iter([{"throttled": False}, {"throttled": True}, {"throttled": None}])
    monkeypatch.setattr("device_tests.timing.condition", lambda: next(states))
    _, timing = measure(lambda: NumpySession(REFERENCE), np.arange(20), 3)
    assert timing_fields(timing)["notes"] == ["the processor was throttled during the measurement: times are not its best"]


def test_a_prompt_that_fills_the_context_is_cut_for_timing():
    _, timing = measure(lambda: NumpySession(REFERENCE), np.zeros(500, dtype=int), 3)
    assert timing.first.tokens == INTERFACE.context_tokens - 1 and len(timing.decode_ms) == 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('{"top2": 1}', "unknown gate top2"),
        ('{"kl": "low"}', "'low'"),
        ('{"kl": true}', "True"),
        ("[1]", "no JSON object"),
        ("{", "not JSON"),
    ],
)
def test_gates_that_make_no_sense_are_told(tmp_path, text, words):
    path = tmp_path / "gates.json"
    path.write_text(text)
    with pytest.raises(DeviceTestError, match=words):
        read_gates(path)


def test_infinite_perplexity_fails_without_a_gate(golden, tmp_path):
    def spoil(row, position):  # all mass on one token: finite logits, infinite perplexity
        return np.where(np.arange(len(row)) == position % 7, 1e6, 0).astype(np.float32)

    result = run(golden, tmp_path, NumpySession(REFERENCE, spoil), quality=True)
    assert not result["device"]["passed"] and "perplexity_change is inf" in result["device"]["failures"][0]
    assert math.isinf(result["quality"]["perplexity"])
