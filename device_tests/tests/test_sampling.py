"""Sampling without sorting the vocabulary, against the plain form that sorts all of it."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_tests import sampling
from device_tests.sampling import Sampling, candidates, likeliest, next_token


def by_sorting(logits, options):
    """The same set by sorting everything: written as the paper says it."""
    scaled = logits.astype(np.float64) / options.temperature
    order = sorted(range(len(scaled)), key=lambda index: (-scaled[index], index))[: options.top_k or None]
    weights = np.exp(scaled[order] - scaled[order[0]])
    total, held, kept = weights.sum(), 0.0, []
    for index, weight in zip(order, weights, strict=True):
        kept.append(index)
        held += weight
        if held >= options.top_p * total:
            break
    return kept


@settings(max_examples=200, deadline=None)
@given(
    logits=st.lists(st.integers(-12, 12), min_size=1, max_size=300),
    top_k=st.integers(0, 320),
    top_p=st.sampled_from([0.05, 0.31, 0.5, 0.77, 0.93, 1.0]),
    temperature=st.sampled_from([0.3, 1.0, 2.7]),
)
def test_the_same_tokens_may_be_drawn_as_when_all_are_sorted(logits, top_k, top_p, temperature):
    """Whole numbers make many equal logits; the order of ids decides among them."""
    logits = np.array(logits, np.float32) / 3
    options = Sampling(temperature, top_k, top_p)
    ids, shares = candidates(logits, options)
    expected = by_sorting(logits, options)
    if top_k == 0 and top_p == 1:
        assert sorted(ids) == sorted(expected)
    else:
        # a share that is met exactly up to rounding may take one token more or less
        assert abs(len(ids) - len(expected)) <= 1 and list(ids)[: len(expected)] == expected[: len(ids)]
    relative = np.exp((logits[ids].astype(np.float64) - float(logits.max())) / temperature)
    np.testing.assert_allclose(shares / shares[0], relative / relative[0], rtol=1e-9)


def test_a_nucleus_wider_than_the_first_look(monkeypatch):
    """Nearly even logits: hundreds of tokens hold the share."""
    logits = np.random.default_rng(0).normal(scale=0.01, size=5000).astype(np.float32)
    ids, _ = candidates(logits, Sampling(1.0, 0, 0.9))
    assert 4000 < len(ids) < 5000 and list(ids) == by_sorting(logits, Sampling(1.0, 0, 0.9))[: len(ids)]


def test_the_whole_vocabulary_is_never_sorted(monkeypatch):
    """Sorting 150,000 logits takes longer than many a model's step."""
    longest = []
    sort = np.argsort
    monkeypatch.setattr(sampling.np, "argsort", lambda values, **options: longest.append(len(values)) or sort(values, **options))
    logits = np.random.default_rng(0).normal(scale=4, size=50_000).astype(np.float32)
    for options in (Sampling(1.0), Sampling(0.7, 40), Sampling(0.7, 40, 0.9), Sampling(0.7, 0, 0.9)):
        next_token(logits, options, np.random.default_rng(0))
    assert max(longest) <= sampling.FIRST_TRIED * sampling.MORE


@pytest.mark.parametrize("options", [Sampling(1.0), Sampling(1.0, 3), Sampling(1.0, 0, 0.8), Sampling(0.5, 4, 0.9)], ids=str)
def test_draws_follow_the_shares(options):
    logits = np.log(np.array([0.1, 0.4, 0.25, 0.05, 0.2], np.float32))
    ids, shares = candidates(logits, options)
    generator = np.random.default_rng(1)
    drawn = np.bincount([next_token(logits, options, generator) for _ in range(20_000)], minlength=5) / 20_000
    expected = np.zeros(5)
    expected[ids] = shares / shares.sum()
    np.testing.assert_allclose(drawn, expected, atol=0.015)


def test_greedy_takes_the_first_of_the_largest_and_draws_nothing():
    class Nothing:
        def random(self):
            raise AssertionError("a greedy choice draws nothing")

    assert next_token(np.array([1.0, 3.0, 3.0], np.float32), Sampling(), Nothing()) == 1


def test_likeliest_of_equal_values_are_the_lower_ids():
    assert list(likeliest(np.array([2.0, 5.0, 2.0, 2.0, 7.0]), 4)) == [4, 1, 0, 2]


def test_certain_logits_and_more_candidates_than_tokens():
    logits = np.array([-1e30, 5.0, -1e30], dtype=np.float32)
    for options in (Sampling(1.0, 50), Sampling(1.0), Sampling(1.0, 0, 1e-9), Sampling(1e-6)):
        assert next_token(logits, options, np.random.default_rng(0)) == 1
