"""Quality over held-out windows in the runtime itself: one teacher-forced pass, one window in memory at a time."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from device_tests.errors import DeviceTestError
from device_tests.replay import Place, each_logits, refuse_broken
from device_tests.sessions import Session
from device_tests.token_statistics import Estimate, kl_grouped, log_softmax, mean_estimate, perplexity, perplexity_change
from device_tests.vectors import Vectors, read_rows

ROWS = ("windows", "top_ids", "top_logprob", "rest_logprob", "target_logprob", "dense_target_logprob")


@dataclass(frozen=True)
class Quality:
    """Against the fp32 model that was exported: changes are fractions, ``kl`` nats per token (grouped, so a lower bound)."""

    perplexity: Estimate
    perplexity_change: Estimate
    perplexity_change_dense: Estimate
    kl: Estimate
    top1: Estimate
    tokens: int
    worst_window: int  # where perplexity rose most
    worst: Place  # where KL was largest


def evaluate(session: Session, evaluation: Vectors) -> Quality:
    """Score every window: the prompt by prefill, the rest step by step. ArtifactFailure for broken logits."""
    columns: dict[str, list] = {"nll": [], "reference": [], "dense": [], "kl": [], "top1": []}
    for index, row in enumerate(read_rows(evaluation, ROWS)):
        if row["top_ids"].min() < 0 or row["top_ids"].max() >= session.interface.vocab_size:
            raise DeviceTestError(f"{evaluation.path}: token ids outside the vocabulary; it was made for another model")
        nll, kl, top1 = _score_window(session, row, evaluation.prompt_tokens, index)
        scored = (nll, -row["target_logprob"].astype(np.float64), -row["dense_target_logprob"].astype(np.float64), kl, top1)
        for column, values in zip(columns.values(), scored):
            column.append(values)
    table = {name: np.stack(values) for name, values in columns.items()}  # each [windows, scored]
    worst_window, worst_token = np.unravel_index(int(table["kl"].argmax()), table["kl"].shape)
    return Quality(
        perplexity=perplexity(table["nll"]),
        perplexity_change=perplexity_change(table["nll"], table["reference"]),
        perplexity_change_dense=perplexity_change(table["nll"], table["dense"]),
        kl=mean_estimate(table["kl"]),
        top1=mean_estimate(table["top1"]),
        tokens=table["nll"].size,
        worst_window=int((table["nll"] - table["reference"]).mean(axis=1).argmax()),
        worst=Place(int(worst_window), evaluation.prompt_tokens - 1 + int(worst_token)),
    )


def _score_window(session: Session, row: dict, prompt_tokens: int, index: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Negative log-likelihoods, grouped KL and equal first choices, each float64 ``[scored]``."""
    targets = row["windows"][prompt_tokens:]
    nll, kl, top1 = (np.empty(len(targets)) for _ in range(3))
    for token, logits in enumerate(each_logits(session, row["windows"], prompt_tokens, len(targets))):
        refuse_broken(logits, Place(index, prompt_tokens - 1 + token))
        logprob = log_softmax(logits)
        ids = row["top_ids"][token]  # likeliest first
        nll[token] = -logprob[targets[token]]
        kl[token] = kl_grouped(row["top_logprob"][token], float(row["rest_logprob"][token]), logprob, ids)
        top1[token] = int(logits.argmax()) == ids[0]
    return nll, kl, top1
