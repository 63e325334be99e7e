"""Text from an open session, token by token: how it is drawn, where it ends, what it cost."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from tokenizers import Tokenizer

from device_tests.artifact import Interface
from device_tests.sampling import Sampling, next_token
from device_tests.sessions import Session
from device_tests.timing import peak_rss_mb
from models.errors import UserError
from pipeline.text_pieces import StopAt, TextStream

INTERRUPTED = "interrupted"


@dataclass(frozen=True)
class GenerateOptions:
    """How text is drawn. ``temperature`` 0 takes the most likely token; ``top_k`` 0 and ``top_p`` 1 cut nothing off.

    ``stop``: texts before which the answer ends. ``prompt_cache``: a file that keeps what was computed for the prompt. ``draft``: a
    bundle of a pruned sibling that goes ``ahead`` by so many tokens. ``packed``: a folder that keeps packed weights.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    threads: int = 1
    stop: tuple[str, ...] = ()
    artifact: str | None = None
    echo: bool = False  # write the prompt before what follows it
    prompt_cache: Path | None = None
    draft: Path | None = None
    ahead: int = 4
    packed: Path | None = None

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)


@dataclass(frozen=True)
class Generated:
    """What a run gave and cost. ``ended`` says why it stopped; speeds are None where nothing was timed.

    ``reused_tokens`` of the prompt came from its cache; of ``drafted_tokens`` the model took ``accepted_tokens``.
    """

    text: str
    artifact: str
    prompt_tokens: int
    new_tokens: int
    first_token_ms: float
    decode_tokens_per_s: float | None
    peak_rss_mb: float | None
    ended: str
    reused_tokens: int = 0
    drafted_tokens: int = 0
    accepted_tokens: int = 0


@dataclass(frozen=True)
class Written:
    """A piece of text as it comes, and how the run goes so far."""

    text: str
    new_tokens: int
    first_token_ms: float
    decode_tokens_per_s: float | None


class Opened(Protocol):
    """An artifact as a manifest or a sidecar describes it."""

    name: str
    interface: Interface


class Chooser(Protocol):
    """Whatever says which token is next: `OneByOne`, or a `Speculator` with a draft."""

    def first(self, ids: np.ndarray) -> int:
        """The token after the prompt int ``[n]``."""

    def next(self, token: int) -> int:
        """The token after ``token``."""


class OneByOne:
    """Chooses each token from the logits of one session."""

    def __init__(self, session: Session, options: GenerateOptions) -> None:
        self._session, self._sampling, self._generator = session, options.sampling, np.random.default_rng(options.seed)

    def first(self, ids: np.ndarray) -> int:
        """The token after the prompt, of which the session may hold the beginning."""
        return self._chosen(self._session.prefill(ids[self._session.position :]))

    def next(self, token: int) -> int:
        """The token after ``token``."""
        return self._chosen(self._session.step(token))

    def _chosen(self, logits: np.ndarray) -> int:
        return next_token(logits, self._sampling, self._generator)


@dataclass(frozen=True)
class Request:
    """One prompt for one artifact."""

    artifact: Opened
    tokenizer: Tokenizer
    ids: list[int]
    options: GenerateOptions


class Clock:
    """Times of a run: the first token apart, because the prompt's computation is in it."""

    def __init__(self) -> None:
        self.tokens = 0
        self.started = self.first = self.last = time.perf_counter()

    def answered(self) -> None:
        """The prompt is computed, and the first token chosen."""
        self.first = self.last = time.perf_counter()

    def tick(self) -> None:
        """One more token is there."""
        self.last = time.perf_counter() if self.tokens else self.last
        self.tokens += 1

    @property
    def first_token_ms(self) -> float:
        return 1000 * (self.first - self.started)

    @property
    def tokens_per_s(self) -> float | None:
        spent = self.last - self.first
        return (self.tokens - 1) / spent if self.tokens > 1 and spent > 0 else None

    def written(self, text: str) -> Written:
        return Written(text, self.tokens, self.first_token_ms, self.tokens_per_s)


def stream(chooser: Chooser, request: Request, emit: Callable[[Written], bool]) -> Generated:
    """Prompt, then token by token until the end of text, a stop text, the limit, the end of the context, or Ctrl-C.

    ``emit`` is given each piece of text as it becomes certain and says whether to go on.
    """
    text, stops, clock, pieces = TextStream(request.tokenizer, request.ids), StopAt(request.options.stop), Clock(), []

    def give(piece: str) -> bool:
        pieces.append(piece)
        return emit(clock.written(piece))

    try:
        ended = write_all(chooser, request, clock, lambda token: give(stops.push(text.push(token))) and stops.found is None)
        if ended is None:
            ended = "stop text" if stops.found is not None else INTERRUPTED
    except KeyboardInterrupt:
        ended = INTERRUPTED
    if rest := stops.push(text.finish()) + stops.finish():
        give(rest)
    return Generated(
        text="".join(pieces),
        artifact=request.artifact.name,
        prompt_tokens=len(request.ids),
        new_tokens=clock.tokens,
        first_token_ms=clock.first_token_ms,
        decode_tokens_per_s=clock.tokens_per_s,
        peak_rss_mb=peak_rss_mb(),
        ended=ended,
    )


def write_all(chooser: Chooser, request: Request, clock: Clock, take: Callable[[int], bool]) -> str | None:
    """Give tokens to ``take`` until it wants no more (None), or the text, the limit or the context ends (why)."""
    interface, options = request.artifact.interface, request.options
    token = chooser.first(np.array(request.ids))
    clock.answered()
    while token != interface.eos_token_id:
        clock.tick()
        if not take(token):
            return None
        if len(request.ids) + clock.tokens > interface.context_tokens:
            return "context is full"
        if clock.tokens == options.max_tokens:
            return "limit of tokens"
        token = chooser.next(token)
    return "end of text"


def prompt_ids(tokenizer: Tokenizer, prompt: str, artifact: Opened) -> list[int]:
    """Ids of the prompt with at least one free place behind them; an empty prompt is the model's first token."""
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError("the prompt is not UTF-8; give it in UTF-8") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    ids = tokenizer.encode(prompt).ids
    sizes = artifact.interface
    if not ids:
        start = sizes.bos_token_id if sizes.bos_token_id is not None else sizes.eos_token_id
        if start is None:
            raise UserError("the prompt is empty and this model has no token that begins a text; give a --prompt")
        ids = [start]
    if len(ids) >= sizes.context_tokens:
        raise UserError(f"the prompt has {len(ids)} tokens but the context holds {sizes.context_tokens}; give a shorter --prompt")
    return ids


def check_options(options: GenerateOptions) -> None:
    """UserError that names the option whose value makes no sense."""
    limits = {
        "--max-tokens": (options.max_tokens >= 1, "1 or more"),
        "--temperature": (0 <= options.temperature < float("inf"), "0 or more"),
        "--top-k": (options.top_k >= 0, "0 or more"),
        "--top-p": (0 < options.top_p <= 1, "more than 0 and at most 1"),
        "--seed": (options.seed >= 0, "0 or more"),
        "--threads": (options.threads >= 1, "1 or more"),
        "--ahead": (options.ahead >= 1, "1 or more"),
    }
    for name, (holds, allowed) in limits.items():
        if not holds:
            raise UserError(f"{name} {getattr(options, name[2:].replace('-', '_'))}: give {allowed}")
    if "" in options.stop:
        raise UserError("--stop with an empty text would stop nothing; give a text, or leave it out")
    if options.draft and options.temperature > 0:
        raise UserError(f"--draft goes with greedy text only, and --temperature is {options.temperature:g}; leave one of the two out")


def told_of(generated: Generated) -> str:
    """One line for a person at the end."""
    speed = f"{generated.decode_tokens_per_s:.0f} tokens/s" if generated.decode_tokens_per_s else "too short to time"
    memory = f"{generated.peak_rss_mb:.0f} MB at most" if generated.peak_rss_mb else "memory unknown"
    reused = f", {generated.reused_tokens} of {generated.prompt_tokens} prompt tokens from the cache" if generated.reused_tokens else ""
    share = generated.accepted_tokens / generated.drafted_tokens if generated.drafted_tokens else 0
    drafted = f", {share:.0%} of {generated.drafted_tokens} drafted tokens taken" if generated.drafted_tokens else ""
    return (
        f"{generated.artifact}: {generated.new_tokens} tokens, {speed}, first after {generated.first_token_ms:.0f} ms, "
        f"{memory}{reused}{drafted}; stopped: {generated.ended}"
    )
