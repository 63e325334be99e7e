"""How well a PyTorch model predicts held-out windows: one teacher-forced pass, statistics shared with the device tests.

Models are scored one after the other: what a comparison needs of the first (its likeliest tokens) is kept, not the model.
"""

from dataclasses import asdict, dataclass

import numpy as np
import torch
from transformers import PreTrainedModel

from device_tests.token_statistics import (
    kl_full,
    kl_grouped,
    log_softmax,
    mean_estimate,
    perplexity,
    perplexity_change,
    rest_logprob,
)
from models.checkpoint import ModelShape, shape_of
from models.families import linear_layers
from models.progress import track

LOGITS_BYTES = 256 * 2**20  # of a batch while it is scored
NOISE = 0.05  # of the logits' standard deviation: about what int8 does to them


@dataclass(frozen=True)
class Plan:
    """What is scored: ``windows`` int32 ``[m, T]`` after ``prompt_tokens``; ``top_k`` log-probabilities are kept per token.

    Of the first ``golden_windows`` the first ``golden_tokens`` rows of logits are kept whole.
    """

    windows: np.ndarray
    prompt_tokens: int
    golden_windows: int
    golden_tokens: int
    top_k: int


@dataclass(frozen=True)
class Scores:
    """One model over the plan's S tokens per window. Log-probabilities in nats.

    ``top_ids`` int32 and ``top_logprob`` float32 ``[m, S, k]``, likeliest first; ``rest_logprob`` (mass of all other tokens) and
    ``target_logprob`` float32 ``[m, S]``; ``golden_logits`` float32 ``[g, R, vocab]``; ``kl`` (grouped) and ``top1`` ``[m, S]``
    against another model; ``sparsity`` is the share of zeros in the linear layers.
    """

    shape: ModelShape
    sparsity: float
    top_ids: np.ndarray
    top_logprob: np.ndarray
    rest_logprob: np.ndarray
    target_logprob: np.ndarray
    golden_logits: np.ndarray
    kl: np.ndarray | None
    top1: np.ndarray | None


@torch.inference_mode()
def score(model: PreTrainedModel, plan: Plan, name: str, against: Scores | None) -> Scores:
    """Teacher-forced scores in batches whose logits stay below ``LOGITS_BYTES``; statistics row by row in float64."""
    shape = shape_of(model)
    count, length = plan.windows.shape
    scored = length - plan.prompt_tokens
    batch = max(1, LOGITS_BYTES // (4 * length * shape.vocab_size))
    columns = empty_columns(count, scored, plan, shape.vocab_size, against is not None)
    for start in track(range(0, count, batch), f"scoring the {name}"):
        tokens = torch.from_numpy(plan.windows[start : start + batch].astype(np.int64))
        logits = model(tokens, use_cache=False).logits[:, plan.prompt_tokens - 1 : -1].numpy()  # [batch, scored, vocab]
        for index, rows in enumerate(logits, start=start):
            if index < plan.golden_windows:
                columns["golden_logits"][index] = rows[: plan.golden_tokens]
            for token, row in enumerate(rows):
                score_row(columns, (index, token), log_softmax(row), plan, against)
    return Scores(shape=shape, sparsity=zero_share(model), **columns)


def empty_columns(count: int, scored: int, plan: Plan, vocab_size: int, compared: bool) -> dict[str, np.ndarray | None]:
    """The arrays that ``score_row`` fills."""
    return {
        "top_ids": np.empty((count, scored, plan.top_k), dtype=np.int32),
        "top_logprob": np.empty((count, scored, plan.top_k), dtype=np.float32),
        "rest_logprob": np.empty((count, scored), dtype=np.float32),
        "target_logprob": np.empty((count, scored), dtype=np.float32),
        "golden_logits": np.empty((plan.golden_windows, plan.golden_tokens, vocab_size), dtype=np.float32),
        "kl": np.empty((count, scored)) if compared else None,
        "top1": np.empty((count, scored)) if compared else None,
    }


def score_row(columns: dict, place: tuple[int, int], logprob: np.ndarray, plan: Plan, against: Scores | None) -> None:
    """Fill in one scored token; ``logprob`` float64 ``[vocab]``."""
    window, token = place
    ids = likeliest(logprob, plan.top_k)
    columns["top_ids"][place] = ids
    columns["top_logprob"][place] = logprob[ids]
    columns["rest_logprob"][place] = rest_logprob(logprob, ids)
    columns["target_logprob"][place] = logprob[plan.windows[window, plan.prompt_tokens + token]]
    if against is not None:
        columns["kl"][place] = kl_grouped(against.top_logprob[place], float(against.rest_logprob[place]), logprob, against.top_ids[place])
        columns["top1"][place] = ids[0] == against.top_ids[place][0]


def likeliest(logprob: np.ndarray, count: int) -> np.ndarray:
    """The ``count`` likeliest ids, likeliest first and the lower id first among equals, as argmax has it."""
    ids = np.argpartition(-logprob, count - 1)[:count]
    ids = ids[np.lexsort((ids, -logprob[ids]))]
    ids[0] = logprob.argmax()
    return ids


def zero_share(model: PreTrainedModel) -> float:
    """Share of zeros in the linear layers of the decoder: what unstructured pruning left there."""
    matrices = [module.weight for module in linear_layers(model).values()]
    return sum(int((matrix == 0).sum()) for matrix in matrices) / sum(matrix.numel() for matrix in matrices)


def describe(scores: Scores, dense: Scores | None) -> dict:
    """What one model scores, as JSON values; against the dense model where there is one."""
    found = perplexity(-scores.target_logprob)
    record = {
        "perplexity": found.value,
        "perplexity_stderr": finite(found.stderr),
        "tokens": scores.target_logprob.size,
        "parameters": scores.shape.parameters,
        "sparsity": scores.sparsity,
        "shape": asdict(scores.shape),
    }
    if dense is None:
        return record
    change = perplexity_change(-scores.target_logprob, -dense.target_logprob.astype(np.float64))
    return {
        **record,
        "perplexity_change": change.value,
        "perplexity_change_stderr": finite(change.stderr),
        "kl": max(0.0, mean_estimate(scores.kl).value),  # references are kept in float32: equal models can give -1e-8
        "top1": mean_estimate(scores.top1).value,
    }


def finite(value: float) -> float | None:
    """JSON has no NaN: an error that one token alone cannot have is null."""
    return value if np.isfinite(value) else None


def shortcut_cost(exported: Scores, dense: Scores, plan: Plan) -> dict:
    """What comparing k tokens and one bucket loses of KL, on the golden rows, where the full distributions are at hand.

    Two comparisons: with the dense model, and with the exported logits plus noise, as quantisation makes it.
    """
    generator = np.random.default_rng(0)
    logits = exported.golden_logits.astype(np.float64)
    noisy = logits + generator.normal(scale=NOISE * logits.std(), size=logits.shape)
    cost = {"rest_probability": float(np.exp(exported.rest_logprob.astype(np.float64)).mean())}
    reference = log_softmax(logits)
    for name, other in (("dense", log_softmax(dense.golden_logits)), ("noise", log_softmax(noisy))):
        grouped = [
            kl_grouped(exported.top_logprob[place], float(exported.rest_logprob[place]), other[place], exported.top_ids[place])
            for place in np.ndindex(plan.golden_windows, plan.golden_tokens)
        ]
        full = float(kl_full(reference, other).mean())
        cost[name] = {"kl_full": full, "kl_grouped": float(np.mean(grouped)), "lost": full - float(np.mean(grouped))}
    return cost
