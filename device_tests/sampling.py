"""The next token out of logits, without sorting the vocabulary: nothing is ordered but the few tokens that can be drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

FIRST_TRIED = 64  # likeliest tokens that are looked at first when only a share of probability says how many there are
MORE = 8  # times as many when those do not hold the share


@dataclass(frozen=True)
class Sampling:
    """``temperature`` 0 takes the most likely token; ``top_k`` 0 and ``top_p`` 1 cut nothing off."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0


def next_token(logits: np.ndarray, sampling: Sampling, generator: np.random.Generator) -> int:
    """Draw from logits ``[vocab]``: temperature, then the ``top_k`` likeliest, then the fewest that hold ``top_p`` together.

    Nucleus sampling as in Holtzman et al. 2020 (arXiv:1904.09751). One number is drawn from ``generator`` for each token that is not
    greedy. Of equal logits the lower id comes first, so that a seed gives the same text on every machine.
    """
    if sampling.temperature == 0:
        return int(logits.argmax())
    ids, shares = candidates(logits, sampling)
    place = np.searchsorted(np.cumsum(shares), generator.random() * shares.sum(), side="right")
    return int(ids[min(int(place), len(ids) - 1)])


def candidates(logits: np.ndarray, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """Ids that may be drawn and their probabilities up to a common factor, float64. Likeliest first where something is cut off."""
    vocabulary = len(logits)
    scaled = logits.astype(np.float64) / sampling.temperature
    if sampling.top_k or sampling.top_p < 1:
        kept = min(sampling.top_k or vocabulary, vocabulary)
        if sampling.top_p == 1:
            ids = likeliest(scaled, kept)
            return ids, np.exp(scaled[ids] - scaled[ids[0]])
        return nucleus(scaled, kept, sampling.top_p)
    return np.arange(vocabulary), np.exp(scaled - scaled.max())


def nucleus(scaled: np.ndarray, kept: int, share: float) -> tuple[np.ndarray, np.ndarray]:
    """The fewest of the ``kept`` likeliest that hold ``share`` of the probability of those."""
    tried = min(FIRST_TRIED, kept)
    total = float(np.exp(scaled - scaled.max()).sum()) if kept == len(scaled) else None
    while True:
        ids = likeliest(scaled, kept if total is None else tried)
        weights = np.exp(scaled[ids] - scaled[ids[0]])
        held = np.cumsum(weights)
        wanted = share * (held[-1] if total is None else total)
        if total is None or held[-1] >= wanted or tried == kept:
            count = min(int(np.searchsorted(held, wanted)) + 1, len(ids))
            return ids[:count], weights[:count]
        tried = min(tried * MORE, kept)


def likeliest(values: np.ndarray, count: int) -> np.ndarray:
    """Ids of the ``count`` largest of ``values`` ``[n]``, largest first, of equal ones the lower id first."""
    if count < len(values):
        least = np.partition(values, len(values) - count)[len(values) - count]
        above = np.flatnonzero(values > least)
        ids = np.concatenate([above, np.flatnonzero(values == least)[: count - len(above)]])
        ids.sort()
    else:
        ids = np.arange(len(values))
    return ids[np.argsort(-values[ids], kind="stable")]
