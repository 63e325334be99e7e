"""The statistics against scipy, against formulas written out naively, and against simulation."""

import numpy as np
import pytest
import scipy.special
import scipy.stats
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from device_tests.token_statistics import (
    broken_logits,
    kl_full,
    kl_grouped,
    log_softmax,
    mean_estimate,
    perplexity,
    perplexity_change,
    rest_logprob,
)

VOCABULARY = 17
LOGITS = arrays(np.float32, VOCABULARY, elements=st.floats(-60, 60, width=32))
LOSSES = arrays(np.float64, st.tuples(st.integers(2, 6), st.integers(1, 5)), elements=st.floats(0, 12))


@given(LOGITS)
def test_log_softmax_is_scipys(logits):
    np.testing.assert_allclose(log_softmax(logits), scipy.special.log_softmax(logits.astype(np.float64)), atol=1e-12)


@given(LOGITS, LOGITS)
def test_kl_is_scipys_entropy(reference, artifact):
    expected = scipy.stats.entropy(*(scipy.special.softmax(row.astype(np.float64)) for row in (reference, artifact)))
    assert kl_full(log_softmax(reference), log_softmax(artifact)) == pytest.approx(expected, rel=1e-9, abs=1e-9)


@given(LOGITS, LOGITS, st.integers(1, VOCABULARY))
def test_grouped_kl_is_that_of_the_buckets_and_a_lower_bound(reference, artifact, count):
    p, q = log_softmax(reference), log_softmax(artifact)
    ids = np.argsort(-p)[:count]
    grouped = kl_grouped(p[ids], rest_logprob(p, ids), q, ids)
    buckets = [np.append(np.exp(row[ids]), np.delete(np.exp(row), ids).sum()) for row in (p, q)]
    if count == VOCABULARY:
        buckets = [bucket[:-1] for bucket in buckets]
        assert grouped == pytest.approx(kl_full(p, q), rel=1e-9, abs=1e-9)
    assert grouped == pytest.approx(scipy.special.rel_entr(*buckets).sum(), rel=1e-6, abs=1e-9)
    assert -1e-9 <= grouped <= kl_full(p, q) * (1 + 1e-9) + 1e-9


@given(LOGITS)
def test_rest_is_the_mass_that_is_left(logits):
    p = log_softmax(logits)
    ids = np.argsort(-p)[:5]
    assert np.exp(rest_logprob(p, ids)) == pytest.approx(np.delete(np.exp(p), ids).sum(), rel=1e-12)
    assert rest_logprob(p, np.arange(VOCABULARY)) == -np.inf


@given(LOSSES)
def test_perplexity_is_exp_of_the_mean_loss(losses):
    found = perplexity(losses)
    assert found.value == pytest.approx(np.exp(losses.sum() / losses.size))
    assert found.stderr == pytest.approx(found.value * mean_estimate(losses).stderr)


@given(arrays(np.float64, st.integers(2, 30), elements=st.floats(-5, 5)))
def test_error_of_independent_tokens_is_scipys_sem(values):
    expected = scipy.stats.sem(values)
    assert mean_estimate(values[:, None]).stderr == pytest.approx(expected, abs=1e-12)  # one token per window
    assert mean_estimate(values[None, :]).stderr == pytest.approx(expected, abs=1e-12)  # one window: tokens are the units


@given(arrays(np.float64, st.integers(2, 30), elements=st.floats(-5, 5)), st.integers(1, 9))
def test_tokens_that_repeat_within_a_window_add_no_certainty(values, repeats):
    assert mean_estimate(np.repeat(values[:, None], repeats, axis=1)).stderr == pytest.approx(scipy.stats.sem(values), abs=1e-12)


@given(LOSSES, st.floats(-0.5, 0.5))
def test_a_constant_shift_is_a_certain_change(losses, shift):
    found = perplexity_change(losses + shift, losses)
    assert found.value == pytest.approx(np.expm1(shift), abs=1e-9)
    assert found.stderr == pytest.approx(0, abs=1e-9)


def test_errors_are_what_repeating_the_experiment_shows():
    """Losses with a part common to a window, and a second model that differs by a little noise: simulated 2000 times."""
    generator = np.random.default_rng(0)
    runs, windows, tokens = 2000, 40, 16
    losses = 3 + generator.normal(scale=0.4, size=(runs, windows, 1)) + generator.normal(scale=0.8, size=(runs, windows, tokens))
    changed = losses + 0.01 + generator.normal(scale=0.05, size=losses.shape)
    absolute = [perplexity(run) for run in losses]
    paired = [perplexity_change(after, before) for after, before in zip(changed, losses, strict=True)]
    for found in (absolute, paired):
        spread = np.std([estimate.value for estimate in found])
        assert np.mean([estimate.stderr for estimate in found]) == pytest.approx(spread, rel=0.06)
    assert np.mean([estimate.stderr for estimate in paired]) < 0.05 * np.mean([e.stderr / e.value for e in absolute])


def test_one_token_has_no_error():
    assert np.isnan(mean_estimate(np.array([[2.0]])).stderr)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (np.zeros(9), "all-zero logits"),
        (np.full(9, -3.5), "constant logits"),
        (np.array([1.0, np.nan, 2.0]), "NaN or infinite logits"),
        (np.array([1.0, np.inf, 2.0]), "NaN or infinite logits"),
        (np.array([1.0, 1.0, 2.0]), None),
    ],
)
def test_broken_logits_are_named(row, reason):
    assert broken_logits(row.astype(np.float32)) == reason
