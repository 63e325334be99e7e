"""Golden vectors through an artifact, as a program would use it: the prompt by prefill, then token by token with the cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from device_tests.answers import Answers, golden_answers
from device_tests.errors import ArtifactFailure
from device_tests.sessions import Session
from device_tests.token_statistics import Estimate, broken_logits, kl_full, log_softmax, mean_estimate
from device_tests.vectors import Vectors, read_rows


@dataclass(frozen=True)
class Place:
    """Where a number was worst: a window of the file and the position in it whose logits are meant."""

    window: int
    position: int

    def __str__(self) -> str:
        return f"window {self.window} token {self.position}"


@dataclass(frozen=True)
class Replay:
    """Agreement with the reference on the golden vectors. ``kl`` in nats per token; ``worst`` is where ``max_abs_diff`` was.

    ``answers`` are the logits themselves.
    """

    max_abs_diff: float
    worst: Place
    kl: Estimate
    top1: float
    tokens: int
    greedy_prefixes: list[int]
    greedy_tokens: int
    answers: Answers

    @property
    def greedy_prefix(self) -> int:
        """Tokens of greedy text equal to the reference's before the first other one, in the prompt where it is shortest."""
        return min(self.greedy_prefixes)


def replay(session: Session, golden: Vectors) -> Replay:
    """Teacher-forced logits against the golden ones, then free-running greedy text. ArtifactFailure for broken logits."""
    prompt_tokens = golden.prompt_tokens
    differences, divergences, agreements, answered, windows = [], [], [], [], []
    for window, row in enumerate(read_rows(golden, ("windows", "logits"))):
        logits = teacher_forced(session, row["windows"], prompt_tokens, len(row["logits"]), window)
        reference = row["logits"]  # [scored, vocab]
        differences.append(np.abs(logits - reference).max(axis=1))
        divergences.append(kl_full(log_softmax(reference), log_softmax(logits)))
        agreements.append(logits.argmax(axis=1) == reference.argmax(axis=1))
        answered.append(logits)
        windows.append(row["windows"])
    difference = np.stack(differences)  # [windows, scored]
    window, token = np.unravel_index(int(difference.argmax()), difference.shape)
    prefixes, length = greedy_prefixes(session, golden)
    return Replay(
        max_abs_diff=float(difference.max()),
        worst=Place(int(window), prompt_tokens - 1 + int(token)),
        kl=mean_estimate(np.stack(divergences)),
        top1=float(np.mean(agreements)),
        tokens=difference.size,
        greedy_prefixes=prefixes,
        greedy_tokens=length,
        answers=golden_answers(np.stack(answered), np.stack(windows), prompt_tokens),
    )


def teacher_forced(session: Session, window: np.ndarray, prompt_tokens: int, scored: int, index: int) -> np.ndarray:
    """Logits ``[scored, vocab]`` at positions ``prompt_tokens - 1`` and after. ArtifactFailure names the window when broken."""
    session.reset()
    rows = np.empty((scored, session.interface.vocab_size), dtype=np.float32)
    for row, logits in enumerate(each_logits(session, window, prompt_tokens, scored)):
        refuse_broken(logits, Place(index, prompt_tokens - 1 + row))
        rows[row] = logits
    refuse_frozen(rows, index)
    return rows


def each_logits(session: Session, window: np.ndarray, prompt_tokens: int, scored: int):
    """Yield ``scored`` rows of logits ``[vocab]``: after the prompt, then after each further token of the window."""
    session.reset()
    yield session.prefill(window[:prompt_tokens])
    for token in window[prompt_tokens : prompt_tokens + scored - 1]:
        yield session.step(int(token))


def refuse_broken(logits: np.ndarray, place: Place) -> None:
    """ArtifactFailure when the logits cannot be an answer."""
    reason = broken_logits(logits)
    if reason:
        raise ArtifactFailure(f"{reason} at {place}")


def refuse_frozen(rows: np.ndarray, window: int) -> None:
    """ArtifactFailure when different texts all got the same logits."""
    if len(rows) > 1 and bool((rows == rows[0]).all()):
        raise ArtifactFailure(f"the same logits for every token of window {window}: constant logits")


def greedy_prefixes(session: Session, golden: Vectors) -> tuple[list[int], int]:
    """Per greedy prompt the number of leading tokens equal to the reference's, and how many there are."""
    prefixes = []
    for row in read_rows(golden, ("greedy_prompts", "greedy_tokens")):
        session.reset()
        logits = session.prefill(row["greedy_prompts"])
        prefix = 0
        for expected in row["greedy_tokens"]:
            token = int(logits.argmax())
            if token != int(expected):
                break
            prefix += 1
            if prefix < golden.sizes["N"]:
                logits = session.step(token)
        prefixes.append(prefix)
    return prefixes, golden.sizes["N"]
