"""Quality over held-out windows in the runtime itself: one teacher-forced pass, one window in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, fields
from itertools import islice
from pathlib import Path
from typing import Callable

import numpy as np

from device_tests.answers import Choices
from device_tests.errors import DeviceTestError
from device_tests.replay import Place, each_logits, refuse_broken
from device_tests.sessions import Session
from device_tests.token_statistics import Estimate, kl_grouped, log_softmax, mean_estimate, perplexity, perplexity_change
from device_tests.vectors import Vectors, read_rows, write_arrays

ROWS = ("windows", "top_ids", "top_logprob", "rest_logprob", "target_logprob", "dense_target_logprob")
TOP = 5  # first choices of the artifact among which the reference's one is looked for
Answers = Callable[[np.ndarray, int], Iterable[np.ndarray]]  # window [T], scored -> rows of logits [vocab]


@dataclass(frozen=True)
class TokenScores:
    """Every scored token, float64 ``[windows, scored]``; column 0 is the token after a prompt of ``prompt_tokens``.

    ``nll``, ``reference`` and ``dense`` are negative log-likelihoods (nats) of the right token in the artifact, in the fp32 model
    that was exported, and in the dense model; ``kl`` is grouped; ``top1`` and ``top5`` are 1 where the reference's first choice is
    the artifact's, or among its five likeliest.
    """

    prompt_tokens: int
    nll: np.ndarray
    reference: np.ndarray
    dense: np.ndarray
    kl: np.ndarray
    top1: np.ndarray
    top5: np.ndarray


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
    return summary(score_session(session, evaluation))


def score_session(session: Session, evaluation: Vectors, choices: Choices | None = None, windows: int | None = None) -> TokenScores:
    """Every token of ``evaluation`` in a session: the prompt by prefill, the rest step by step. ArtifactFailure for broken logits.

    ``choices`` notes the first choices; ``windows`` bounds how many windows are scored.
    """

    def answers(window: np.ndarray, scored: int) -> Iterable[np.ndarray]:
        rows = each_logits(session, window, evaluation.prompt_tokens, scored)
        return rows if choices is None else choices.of(rows)

    return score(answers, evaluation, session.interface.vocab_size, windows)


def score(answers: Answers, evaluation: Vectors, vocab_size: int, windows: int | None = None) -> TokenScores:
    """As ``score_session``, for whatever gives logits: row i of ``answers`` belongs to token ``prompt_tokens + i``."""
    columns: dict[str, list] = {field.name: [] for field in fields(TokenScores) if field.name != "prompt_tokens"}
    for index, row in enumerate(islice(read_rows(evaluation, ROWS), windows)):
        if row["top_ids"].min() < 0 or row["top_ids"].max() >= vocab_size:
            raise DeviceTestError(f"{evaluation.path}: token ids outside the vocabulary; it was made for another model")
        scored = _score_window(answers, row, evaluation.prompt_tokens, index)
        scored["reference"] = -row["target_logprob"].astype(np.float64)
        scored["dense"] = -row["dense_target_logprob"].astype(np.float64)
        for name, column in columns.items():
            column.append(scored[name])
    return TokenScores(evaluation.prompt_tokens, **{name: np.stack(column) for name, column in columns.items()})


def summary(scores: TokenScores) -> Quality:
    """The numbers that gates judge."""
    worst_window, worst_token = np.unravel_index(int(scores.kl.argmax()), scores.kl.shape)
    return Quality(
        perplexity=perplexity(scores.nll),
        perplexity_change=perplexity_change(scores.nll, scores.reference),
        perplexity_change_dense=perplexity_change(scores.nll, scores.dense),
        kl=mean_estimate(scores.kl),
        top1=mean_estimate(scores.top1),
        tokens=scores.nll.size,
        worst_window=int((scores.nll - scores.reference).mean(axis=1).argmax()),
        worst=Place(int(worst_window), scores.prompt_tokens - 1 + int(worst_token)),
    )


def write_scores(path: Path, scores: TokenScores) -> None:
    """All numbers as .npz, whole or not at all. DeviceTestError where it cannot be written."""
    write_arrays(path, "--tokens", {field.name: getattr(scores, field.name) for field in fields(TokenScores)})


def read_scores(path: Path) -> TokenScores:
    """What ``write_scores`` wrote."""
    with np.load(path, allow_pickle=False) as found:
        columns = {name: found[name] for name in found.files if name != "prompt_tokens"}
        return TokenScores(int(found["prompt_tokens"]), **columns)


def rank(logits: np.ndarray, token: int) -> int:
    """How many of ``logits`` ``[vocab]`` come before ``token``: larger ones, and equal ones of lower id, as argmax has it."""
    return int(np.count_nonzero(logits > logits[token]) + np.count_nonzero(logits[:token] == logits[token]))


def _score_window(answers: Answers, row: dict, prompt_tokens: int, index: int) -> dict[str, np.ndarray]:
    """Negative log-likelihood, grouped KL and agreement of one window, each float64 ``[scored]``."""
    targets = row["windows"][prompt_tokens:]
    scored = {name: np.empty(len(targets)) for name in ("nll", "kl", "top1", "top5")}
    for token, logits in enumerate(answers(row["windows"], len(targets))):
        refuse_broken(logits, Place(index, prompt_tokens - 1 + token))
        logprob = log_softmax(logits)
        ids = row["top_ids"][token]  # likeliest first
        before = rank(logits, int(ids[0]))
        scored["nll"][token] = -logprob[targets[token]]
        scored["kl"][token] = kl_grouped(row["top_logprob"][token], float(row["rest_logprob"][token]), logprob, ids)
        scored["top1"][token] = before < 1
        scored["top5"][token] = before < TOP
    return scored
