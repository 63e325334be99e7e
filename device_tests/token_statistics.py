"""The numbers that say how far one next-token distribution is from another. All in nats per token, computed in float64.

Symbols: p is the reference's distribution over the vocabulary, q the artifact's, n the number of scored tokens.

- negative log-likelihood of a token: -log q(token); perplexity: exp(mean of it).
- KL(p || q) = sum_v p(v) (log p(v) - log q(v)). *Grouped*: over the k likeliest tokens of p and one bucket for all others. By
  the data-processing inequality grouping can only lower it.
- top-1 agreement: share of tokens where p and q have the same first choice.
- Standard errors take windows, not tokens, as independent (tokens of one text are correlated): with residuals summed per window
  r_w = sum_{i in w} (x_i - mean), se(mean)^2 = W/(W-1) * sum_w r_w^2 / n^2 (cluster-robust variance). By the delta method
  se(exp(mean)) = exp(mean) * se(mean). A change of perplexity is exp(mean(d)) - 1 with d the paired difference of the
  log-likelihoods of the same tokens, and its error is that of d: what both models find hard cancels.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Estimate:
    """A number with its standard error. ``stderr`` is NaN when there is but one token."""

    value: float
    stderr: float


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Log-probabilities float64 ``[..., vocab]``."""
    shifted = logits.astype(np.float64) - np.max(logits, axis=-1, keepdims=True)
    return shifted - np.log(np.sum(np.exp(shifted), axis=-1, keepdims=True))


def kl_full(reference: np.ndarray, artifact: np.ndarray) -> np.ndarray:
    """KL(reference || artifact) ``[...]`` of log-probabilities ``[..., vocab]``."""
    return np.sum(np.exp(reference) * (reference - artifact), axis=-1)


def rest_logprob(logprob: np.ndarray, top_ids: np.ndarray) -> float:
    """Log of the mass that ``logprob`` ``[vocab]`` gives to all tokens but ``top_ids`` ``[k]``; -inf when there are none."""
    rest = np.delete(logprob, top_ids)
    if rest.size == 0:
        return -np.inf
    highest = rest.max()
    return float(highest + np.log(np.sum(np.exp(rest - highest))))


def kl_grouped(top_logprob: np.ndarray, rest: float, artifact: np.ndarray, top_ids: np.ndarray) -> float:
    """KL over the reference's ``top_ids`` ``[k]`` and one bucket for the rest; ``artifact`` are log-probabilities ``[vocab]``."""
    top = np.asarray(top_logprob, dtype=np.float64)
    divergence = float(np.sum(np.exp(top) * (top - artifact[top_ids])))
    if np.isneginf(rest):  # the top covers the vocabulary: no mass is left to compare
        return divergence
    return divergence + float(np.exp(rest) * (rest - rest_logprob(artifact, top_ids)))


def mean_estimate(values: np.ndarray) -> Estimate:
    """Mean over ``values`` ``[windows, tokens]`` and its error with windows as clusters (tokens, when there is one window)."""
    values = np.asarray(values, dtype=np.float64)
    clusters = values.sum(axis=1) if values.shape[0] > 1 else values.reshape(-1)
    mean, count = float(values.mean()), len(clusters)
    if count < 2:
        return Estimate(mean, float("nan"))
    residuals = clusters - mean * values.size / count
    return Estimate(mean, float(np.sqrt(count / (count - 1) * np.sum(residuals**2)) / values.size))


def perplexity(nll: np.ndarray) -> Estimate:
    """exp of the mean of negative log-likelihoods ``[windows, tokens]``."""
    mean = mean_estimate(nll)
    with np.errstate(over="ignore"):  # garbage has infinite perplexity; the caller judges
        value = float(np.exp(np.float64(mean.value)))
    return Estimate(value, value * mean.stderr)


def perplexity_change(nll: np.ndarray, reference_nll: np.ndarray) -> Estimate:
    """Relative change of perplexity against the reference on the same tokens: 0.003 is +0.3 %."""
    ratio = perplexity(np.asarray(nll, dtype=np.float64) - reference_nll)
    return Estimate(ratio.value - 1.0, ratio.stderr)


def broken_logits(logits: np.ndarray) -> str | None:
    """Why one row of logits ``[vocab]`` cannot be an answer, or None when it can."""
    low, high = float(logits.min()), float(logits.max())  # NaN passes through both
    if not (np.isfinite(low) and np.isfinite(high)):
        return "NaN or infinite logits"
    if low == 0.0 and high == 0.0:
        return "all-zero logits"
    if low == high:
        return "constant logits"
    return None
