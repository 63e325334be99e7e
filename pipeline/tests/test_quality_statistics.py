"""Statistics of tokens against one-liners in numpy and scipy; properties of the buckets and of the worst windows."""

import json

import numpy as np
import pytest
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st

from device_tests.quality import TokenScores
from pipeline.quality_statistics import by_position, record_of, statistics, worst_windows

PROMPT = 7


def random_scores(windows: int, scored: int, seed: int = 0) -> TokenScores:
    """Two models that differ by some noise; KL and agreement drawn by themselves."""
    generator = np.random.default_rng(seed)
    reference = generator.gamma(2.0, size=(windows, scored))
    return TokenScores(
        prompt_tokens=PROMPT,
        nll=np.abs(reference + generator.normal(scale=0.2, size=reference.shape)),
        reference=reference,
        dense=np.abs(reference - 0.1),
        kl=generator.gamma(0.5, size=reference.shape) / 100,
        top1=(generator.random(reference.shape) < 0.9).astype(float),
        top5=(generator.random(reference.shape) < 0.97).astype(float),
    )


SHAPES = st.builds(random_scores, st.integers(1, 9), st.integers(1, 40), st.integers(0, 10**6))


@given(SHAPES)
def test_values_are_numpys(scores):
    found = statistics(scores)
    change = np.exp(-scores.nll) - np.exp(-scores.reference)
    assert found.tokens == scores.nll.size
    assert found.perplexity.value == pytest.approx(np.exp(scores.nll.mean()))
    assert found.perplexity_change.value == pytest.approx(np.exp(scores.nll.mean()) / np.exp(scores.reference.mean()) - 1)
    assert found.perplexity_change_dense.value == pytest.approx(np.exp(scores.nll.mean()) / np.exp(scores.dense.mean()) - 1)
    assert found.kl.value == pytest.approx(scores.kl.mean())
    assert found.kl_tail == pytest.approx(np.percentile(scores.kl, 99.9))
    assert found.kl_max == scores.kl.max()
    assert (found.top1.value, found.top5.value) == pytest.approx((scores.top1.mean(), scores.top5.mean()))
    assert found.delta_p.value == pytest.approx(change.mean())
    assert found.delta_p_rms.value == pytest.approx(np.sqrt((change**2).mean()))


@given(st.integers(2, 30), st.integers(0, 10**6))
def test_errors_of_one_token_per_window_are_scipys(windows, seed):
    scores = random_scores(windows, 1, seed)
    found = statistics(scores)
    change = (np.exp(-scores.nll) - np.exp(-scores.reference))[:, 0]
    assert found.delta_p.stderr == pytest.approx(scipy.stats.sem(change), rel=1e-9)
    assert found.delta_p_rms.stderr == pytest.approx(scipy.stats.sem(change**2) / (2 * found.delta_p_rms.value), rel=1e-9)
    assert found.kl.stderr == pytest.approx(scipy.stats.sem(scores.kl[:, 0]), rel=1e-9)


def test_the_error_of_the_root_is_what_repeating_shows():
    generator = np.random.default_rng(1)
    runs = []
    for _ in range(1500):
        reference = np.full((30, 8), 0.7)
        scores = random_scores(30, 8)
        noise = generator.normal(scale=0.1, size=(30, 8))
        runs.append(statistics(TokenScores(PROMPT, reference + noise, reference, reference, scores.kl, scores.top1, scores.top5)))
    spread = np.std([run.delta_p_rms.value for run in runs])
    assert np.mean([run.delta_p_rms.stderr for run in runs]) == pytest.approx(spread, rel=0.08)


@given(SHAPES)
def test_an_identical_model_changes_nothing(scores):
    zeros, ones = np.zeros_like(scores.kl), np.ones_like(scores.kl)
    found = statistics(TokenScores(PROMPT, scores.reference, scores.reference, scores.dense, zeros, ones, ones))
    assert found.perplexity_change.value == 0 and found.kl.value == found.kl_tail == found.kl_max == 0
    assert found.top1.value == found.top5.value == 1
    assert found.delta_p.value == found.delta_p_rms.value == 0
    json.dumps(record_of(found), allow_nan=False)


@given(SHAPES, st.integers(1, 12))
def test_buckets_add_up(scores, count):
    found, whole = by_position(scores, count), statistics(scores)
    scored = scores.nll.shape[1]
    assert len(found) == min(count, scored)
    assert [place for b in found for place in range(b.first_token, b.last_token + 1)] == list(range(PROMPT, PROMPT + scored))
    tokens = np.array([b.statistics.tokens for b in found])
    assert tokens.sum() == whole.tokens and tokens.max() - tokens.min() <= scores.nll.shape[0]
    for name in ("kl", "top1", "top5", "delta_p"):
        values = [getattr(b.statistics, name).value for b in found]
        assert np.average(values, weights=tokens) == pytest.approx(getattr(whole, name).value, abs=1e-12)
    logs = [np.log(b.statistics.perplexity.value) for b in found]
    assert np.exp(np.average(logs, weights=tokens)) == pytest.approx(whole.perplexity.value)
    assert max(b.statistics.kl_max for b in found) == whole.kl_max


def test_a_drifting_cache_shows_in_the_last_bucket():
    scores = random_scores(6, 40)
    drifting = scores.kl * np.linspace(0, 3, 40) ** 2
    found = by_position(TokenScores(PROMPT, scores.nll, scores.reference, scores.dense, drifting, scores.top1, scores.top5))
    assert found[-1].statistics.kl.value > 20 * found[0].statistics.kl.value


@given(SHAPES, st.integers(0, 12))
def test_the_worst_windows_are_the_worst(scores, count):
    found = worst_windows(scores, count)
    means = scores.kl.mean(axis=1)
    assert len(found) == min(count, len(means)) == len({worst.window for worst in found})
    assert [worst.statistics.kl.value for worst in found] == pytest.approx(sorted(means, reverse=True)[: len(found)])
    for worst in found:
        token = worst.worst_token - PROMPT
        assert scores.kl[worst.window, token] == scores.kl[worst.window].max() == worst.worst_kl
        assert worst.probability == pytest.approx(np.exp(-scores.nll[worst.window, token]))
        assert worst.reference_probability == pytest.approx(np.exp(-scores.reference[worst.window, token]))


def test_what_is_no_number_is_null():
    scores = random_scores(1, 1)
    found = record_of(
        statistics(TokenScores(PROMPT, np.array([[np.inf]]), *[getattr(scores, n) for n in ("reference", "dense", "kl", "top1", "top5")]))
    )
    assert found["perplexity"] is None and found["kl_stderr"] is None and found["kl"] > 0
    json.dumps(found, allow_nan=False)
