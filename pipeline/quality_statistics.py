"""From the numbers of single tokens to what is reported: overall, by position in the window, and the worst windows.

The names are llama.cpp's where it has one (its perplexity tool's KL report): change of perplexity with paired error, mean and
99.9 % KL, change of the probability of the right token (mean and root of the mean square), equal first choices.
"""

from dataclasses import dataclass, fields, replace

import numpy as np

from device_tests.quality import TokenScores
from device_tests.token_statistics import Estimate, mean_estimate, perplexity, perplexity_change

BUCKETS = 8
TAIL = 0.999  # quantile of KL


@dataclass(frozen=True)
class Statistics:
    """Over some scored tokens. Changes are fractions, KL nats per token (grouped), shares and probabilities 0 to 1.

    ``delta_p`` is the artifact's probability of the right token less the reference's: its mean shows a bias, its root mean
    square how far answers scatter.
    """

    tokens: int
    perplexity: Estimate
    perplexity_change: Estimate
    perplexity_change_dense: Estimate
    kl: Estimate
    kl_tail: float
    kl_max: float
    top1: Estimate
    top5: Estimate
    delta_p: Estimate
    delta_p_rms: Estimate


@dataclass(frozen=True)
class Bucket:
    """Tokens ``first_token`` to ``last_token`` of every window (the window's first token is 0)."""

    first_token: int
    last_token: int
    statistics: Statistics


@dataclass(frozen=True)
class WorstWindow:
    """A window with a high mean KL: its own statistics and the token where KL was largest, counted from the window's start.

    ``probability`` and ``reference_probability`` are those of the right token at that place.
    """

    window: int
    statistics: Statistics
    worst_token: int
    worst_kl: float
    probability: float
    reference_probability: float


def statistics(scores: TokenScores) -> Statistics:
    """All numbers over all tokens of ``scores``."""
    change = np.exp(-scores.nll) - np.exp(-scores.reference)
    mean = mean_estimate(scores.kl)
    return Statistics(
        tokens=scores.nll.size,
        perplexity=perplexity(scores.nll),
        perplexity_change=perplexity_change(scores.nll, scores.reference),
        perplexity_change_dense=perplexity_change(scores.nll, scores.dense),
        kl=Estimate(max(0.0, mean.value), mean.stderr),  # the reference is kept in float32: equal models can give -1e-8
        kl_tail=max(0.0, float(np.quantile(scores.kl, TAIL))),
        kl_max=max(0.0, float(scores.kl.max())),
        top1=mean_estimate(scores.top1),
        top5=mean_estimate(scores.top5),
        delta_p=mean_estimate(change),
        delta_p_rms=root(mean_estimate(change**2)),
    )


def root(squares: Estimate) -> Estimate:
    """Root of a mean square; its error by the delta method, se(sqrt(x)) = se(x) / (2 sqrt(x))."""
    value = float(np.sqrt(squares.value))
    return Estimate(value, squares.stderr / (2 * value) if value > 0 else squares.stderr)


def by_position(scores: TokenScores, buckets: int = BUCKETS) -> list[Bucket]:
    """Statistics of neighbouring tokens, in buckets as equal as can be: a cache that drifts is worse the further it gets."""
    places = np.array_split(np.arange(scores.nll.shape[1]), min(buckets, scores.nll.shape[1]))
    return [
        Bucket(
            first_token=scores.prompt_tokens + int(place[0]),
            last_token=scores.prompt_tokens + int(place[-1]),
            statistics=statistics(part(scores, np.s_[:, place[0] : place[-1] + 1])),
        )
        for place in places
    ]


def worst_windows(scores: TokenScores, count: int) -> list[WorstWindow]:
    """The ``count`` windows of highest mean KL, worst first (the earlier one among equals)."""
    found = []
    for window in np.argsort(-scores.kl.mean(axis=1), kind="stable")[:count]:
        token = int(scores.kl[window].argmax())
        found.append(
            WorstWindow(
                window=int(window),
                statistics=statistics(part(scores, np.s_[window : window + 1])),
                worst_token=scores.prompt_tokens + token,
                worst_kl=max(0.0, float(scores.kl[window, token])),
                probability=float(np.exp(-scores.nll[window, token])),
                reference_probability=float(np.exp(-scores.reference[window, token])),
            )
        )
    return found


def part(scores: TokenScores, cut) -> TokenScores:
    """The same numbers for some windows and tokens; ``cut`` is numpy's index of ``[windows, scored]``."""
    names = [field.name for field in fields(TokenScores) if field.name != "prompt_tokens"]
    return replace(scores, **{name: getattr(scores, name)[cut] for name in names})


def record_of(found: Statistics) -> dict:
    """JSON values: every estimate as ``name`` and ``name_stderr``; what no number can say is null."""
    record = {}
    for field in fields(Statistics):
        value = getattr(found, field.name)
        if isinstance(value, Estimate):
            record |= {field.name: plain(value.value), f"{field.name}_stderr": plain(value.stderr)}
        else:
            record[field.name] = plain(value)
    return record


def plain(value: float) -> float | None:
    """JSON has neither NaN nor infinity."""
    return value if np.isfinite(value) else None
