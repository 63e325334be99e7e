"""How fast and how large: load, first token, each later token, and the peak memory of this process.

Run in a fresh process before anything else is loaded, so that the peak is the model's and not the test's. The text does not
matter for the time, so the loop feeds the model its own choices.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np

from device_tests.board import condition
from device_tests.errors import ArtifactFailure
from device_tests.sessions import Session
from device_tests.token_statistics import broken_logits

FIRST_TOKEN_REPEATS = 5
LEAST_REPEATS, ENOUGH_MS = 2, 4000.0  # a prompt that takes seconds is not fed as often: rounds repeat it anyway
WARM_UP_TOKENS = 8


@dataclass(frozen=True)
class PromptTiming:
    """Milliseconds to the first token after a prompt of ``tokens``: the first time, then the median of ``samples_ms``."""

    tokens: int
    cold_ms: float
    ms: float
    samples_ms: list[float]

    @property
    def tokens_per_s(self) -> float:
        """Prompt tokens over the median time to the first token."""
        return self.tokens / self.ms * 1000


@dataclass(frozen=True)
class Timing:
    """Milliseconds and MB (10^6 bytes). ``decode_ms`` are single tokens: one step and the choice of the next token;
    ``host_us_per_token``, microseconds, is the median of what is left of them without the call of the runtime, None where a session
    does not count its calls.

    ``first`` is the prompt that decoding goes on from; ``prompts`` are all that were timed, it among them, shortest first.
    Memory is VmHWM: ``baseline`` with interpreter, numpy and runtime imported, ``load`` once the model is open, ``peak`` after
    prompts and decoding; None where there is no /proc. ``conditions`` are the board's before, during and after.
    """

    load_ms: float
    first: PromptTiming
    prompts: list[PromptTiming]
    decode_ms: list[float]
    host_us_per_token: float | None
    baseline_rss_mb: float | None
    load_rss_mb: float | None
    peak_rss_mb: float | None
    conditions: dict[str, dict[str, Any]]

    @property
    def decode_tokens_per_s(self) -> float:
        """Tokens over the sum of their times."""
        return len(self.decode_ms) / sum(self.decode_ms) * 1000


def peak_rss_mb() -> float | None:
    """VmHWM of this process in MB. Not ``ru_maxrss``: that is inherited from the parent and so lies."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return None
    lines = [line for line in status.splitlines() if line.startswith("VmHWM:")]
    return int(lines[0].split()[1]) * 1024 / 1e6 if lines else None


def measure(load: Callable[[], Session], prompt: np.ndarray, decode_tokens: int, lengths: tuple[int, ...] = ()) -> tuple[Session, Timing]:
    """Load, then time prompts and at least ``decode_tokens`` single tokens; returns the open session too.

    ``prompt`` int ``[n]`` is timed and decoded from; ``lengths`` are more prompt lengths, timed where the context holds them.
    When the context ends sooner than ``decode_tokens``, the prompt is fed again and decoding goes on from there.
    """
    baseline = peak_rss_mb()
    conditions = {"before": condition()}
    start = time.perf_counter()
    session = load()
    load_ms = (time.perf_counter() - start) * 1000
    load_rss = peak_rss_mb()
    longest = session.interface.context_tokens - 1  # room for one token at least
    prompt = prompt[:longest]
    first = _time_prompts(session, prompt)
    decode_ms, host_ms = _time_decode(session, prompt, decode_tokens)
    conditions["during"] = condition()
    # The other lengths come last: a long one would raise the peak that decoding is told to have.
    others = sorted(length for length in set(lengths) if length != len(prompt) and length <= longest)
    peak = peak_rss_mb()
    prompts = [first] + [_time_prompts(session, np.resize(prompt, length)) for length in others]
    timing = Timing(
        load_ms=load_ms,
        first=first,
        prompts=sorted(prompts, key=lambda timed: timed.tokens),
        decode_ms=decode_ms,
        host_us_per_token=float(np.median(host_ms)) * 1000 if host_ms else None,
        baseline_rss_mb=baseline,
        load_rss_mb=load_rss,
        peak_rss_mb=peak,
        conditions={**conditions, "after": condition()},
    )
    session.reset()
    return session, timing


def _time_prompts(session: Session, prompt: np.ndarray) -> PromptTiming:
    cold_ms, samples = _time_prompt(session, prompt), []
    while len(samples) < LEAST_REPEATS or (len(samples) < FIRST_TOKEN_REPEATS and sum(samples) < ENOUGH_MS):
        samples.append(_time_prompt(session, prompt))
    return PromptTiming(tokens=len(prompt), cold_ms=cold_ms, ms=float(np.median(samples)), samples_ms=samples)


def _time_prompt(session: Session, prompt: np.ndarray) -> float:
    session.reset()
    start = time.perf_counter()
    logits = session.prefill(prompt)
    int(logits.argmax())
    elapsed = (time.perf_counter() - start) * 1000
    _refuse_broken(logits, len(prompt) - 1)
    return elapsed


def _time_decode(session: Session, prompt: np.ndarray, decode_tokens: int) -> tuple[list[float], list[float]]:
    """Milliseconds of each token, and of those what the runtime did not take."""
    samples: list[float] = []
    host: list[float] = []
    skip = WARM_UP_TOKENS
    while len(samples) < decode_tokens:
        session.reset()
        token = int(session.prefill(prompt).argmax())
        room = session.interface.context_tokens - len(prompt)
        if room <= skip:  # a context this short is warm from the prompts alone
            skip = 0
        for _ in range(min(room, skip + decode_tokens - len(samples))):
            before = getattr(session, "runtime_s", None)
            start = time.perf_counter()
            logits = session.step(token)
            token = int(logits.argmax())
            samples.append((time.perf_counter() - start) * 1000)
            if before is not None:
                host.append(samples[-1] - (session.runtime_s - before) * 1000)
        _refuse_broken(logits, session.position - 1)
        del samples[:skip], host[:skip]
        skip = 0
    return samples, host


def _refuse_broken(logits: np.ndarray, position: int) -> None:
    reason = broken_logits(logits)
    if reason:
        raise ArtifactFailure(f"{reason} after token {position} of the timing prompt")
