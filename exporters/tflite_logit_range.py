"""The int8 range of the logits: as narrow at the lower end as it may be, since logits far below the top cost no probability.

An int8 output has 255 steps. With the whole range from the least to the largest logit a step is about a tenth of a nat, and
neighbours at the top become equal. The range is chosen by what counts: KL(float || quantised) over sampled rows.
"""

from dataclasses import dataclass

import numpy as np

LOW_SHARES = np.linspace(0.2, 1.0, 17)  # tried shares of the lower end seen in calibration
HIGH_SHARES = (0.9, 0.95, 1.0)
STEPS = 255


@dataclass(frozen=True)
class LogitRange:
    """The range chosen, and what it costs in KL (nats per token) against what the whole range costs."""

    low: float
    high: float
    kl: float
    kl_whole_range: float


def choose_logit_range(logits: np.ndarray, row_scale: np.ndarray) -> LogitRange:
    """``logits`` [rows, vocab] are quantised divided by ``row_scale`` [vocab] or [1], as the equalised head computes them."""
    raw = logits / row_scale
    lowest, highest = min(float(raw.min()), 0.0), max(float(raw.max()), 0.0)
    expected = log_softmax(logits)
    best = None
    for low_share in LOW_SHARES[::-1]:
        for high_share in HIGH_SHARES[::-1]:
            low, high = lowest * low_share, highest * high_share
            if high <= low:
                continue
            found = log_softmax(fake_quantised(raw, low, high) * row_scale)
            kl = float((np.exp(expected) * (expected - found)).sum(-1).mean())
            whole = kl if best is None else best.kl_whole_range
            if best is None or kl < best.kl:
                best = LogitRange(low, high, kl, whole)
    if best is None:  # all logits are zero; any range will do
        return LogitRange(lowest, highest + 1.0, 0.0, 0.0)
    return best


def fake_quantised(values: np.ndarray, low: float, high: float) -> np.ndarray:
    """Values after a round trip through asymmetric int8 with the range [low, high], which holds zero."""
    step = (high - low) / STEPS
    zero_point = np.round(-128 - low / step)
    return (np.clip(np.round(values / step) + zero_point, -128, 127) - zero_point) * step


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """Natural logarithm of the softmax over the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
