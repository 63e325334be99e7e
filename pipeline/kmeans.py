"""k-means of numbers on a line: sorted once, after which a round of Lloyd costs as much as the centroids, not as the numbers."""

from dataclasses import dataclass

import numpy as np

ROUNDS = 300  # of Lloyd at most; with 16 centroids it stands still long before


@dataclass(frozen=True)
class Clusters:
    """``centroids`` float64 ``[k]``, rising, each the mean of its members; member ``x`` of cluster i has ``x >= lowest[i]``."""

    centroids: np.ndarray
    lowest: np.ndarray

    def codes(self, values: np.ndarray) -> np.ndarray:
        """The cluster's number for every one of the values that were clustered, int64 in their shape."""
        return np.searchsorted(self.lowest[1:], values, side="right")


def kmeans(values: np.ndarray, k: int, seed: int) -> Clusters:
    """At most ``k`` clusters of ``values`` ``[n]``, n > 0: the least squared error of three starts.

    The starts are the centroids evenly over the range, at the quantiles, and at values drawn by ``seed``. Not more than ``k``
    distinct values are their own centroids.
    """
    ordered = np.sort(values, axis=None).astype(np.float64)
    first = np.flatnonzero(np.diff(ordered, prepend=-np.inf))  # where each distinct value begins
    if len(first) <= k:
        return Clusters(ordered[first], ordered[first])
    sums = np.concatenate([[0.0], np.cumsum(ordered)])
    runs = [lloyd(ordered, sums, start) for start in starts(ordered, first, k, seed)]
    edges, centroids = max(runs, key=explained)
    return Clusters(centroids, ordered[edges[:-1]])


def starts(ordered: np.ndarray, first: np.ndarray, k: int, seed: int) -> list[np.ndarray]:
    """Three first guesses of the centroids, float64, each of ``k`` or fewer distinct values that rise.

    ``first`` are the positions in ``ordered`` at which its distinct values begin, more than ``k``.
    """
    quantiles = ordered[((np.arange(k) + 0.5) / k * len(ordered)).astype(np.int64)]
    drawn = np.random.default_rng(seed).choice(len(first), k, replace=False)
    return [np.linspace(ordered[0], ordered[-1], k), np.unique(quantiles), np.sort(ordered[first[drawn]])]


def lloyd(ordered: np.ndarray, sums: np.ndarray, centroids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Edges int64 ``[k + 1]`` of the clusters in ``ordered`` and their means ``[k]``.

    ``sums`` ``[n + 1]`` are the running sums of ``ordered``. A centroid without members waits where it is, for others may move
    away from members near it; it is dropped at the end.
    """
    edges = np.zeros(0, dtype=np.int64)
    for _ in range(ROUNDS):
        borders = np.searchsorted(ordered, (centroids[1:] + centroids[:-1]) / 2, side="right")
        moved = np.concatenate([[0], borders, [len(ordered)]])
        if np.array_equal(moved, edges):
            break
        edges, counts = moved, np.diff(moved)
        centroids = np.where(counts > 0, np.diff(sums[edges]) / np.maximum(counts, 1), centroids)
    used = np.diff(edges) > 0
    return np.append(edges[:-1][used], len(ordered)), centroids[used]


def explained(run: tuple[np.ndarray, np.ndarray]) -> float:
    """Sum of squares that the means explain: what is left of the whole sum of squares is the error."""
    edges, centroids = run
    return float((np.diff(edges) * centroids**2).sum())
