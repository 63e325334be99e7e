"""Streams text from a bundle's model: ``device_tests`` sessions for the model, the tokenizers library for the text."""

import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TextIO

import numpy as np
from tokenizers import Tokenizer

from device_tests import prompt_cache
from device_tests.artifact import read_artifact
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.sampling import Sampling, next_token
from device_tests.sessions import Session, import_runtime, open_artifact, open_session
from device_tests.speculative import Speculator
from device_tests.timing import peak_rss_mb
from models.errors import GateError, UserError
from pipeline.manifest import Artifact, Manifest
from pipeline.verify import bundle_folder

RUNTIMES = {"onnx": ("onnxruntime", "onnx"), "litert": ("litert", "tflite"), "tflite": ("tflite", "tflite")}
ANSWER_TOKENS = 64  # the length of answer by which artifacts are compared
UNFINISHED = "\ufffd"  # what a decoder writes for the bytes of a character that is not whole yet


@dataclass(frozen=True)
class GenerateOptions:
    """How text is drawn. ``temperature`` 0 takes the most likely token; ``top_k`` 0 and ``top_p`` 1 cut nothing off.

    ``prompt_cache``: a file that keeps what was computed for the prompt. ``draft``: a bundle of a pruned sibling that goes ``ahead``
    by so many tokens.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    threads: int = 1
    artifact: str | None = None
    echo: bool = False  # write the prompt before what follows it
    prompt_cache: Path | None = None
    draft: Path | None = None
    ahead: int = 4

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


def generate(bundle: Path, runtime: str, prompt: str, options: GenerateOptions, out: TextIO | None = None) -> Generated:
    """Write the continuation of ``prompt`` to ``out`` (stdout) as it comes.

    ``runtime`` is onnx, litert or tflite. Ctrl-C ends it well. Raises UserError for options, prompts and bundles that cannot
    be used, GateError when the artifact or its runtime does wrong.
    """
    check_options(runtime, options)
    with bundle_folder(bundle) as (folder, manifest):
        artifact = chosen_artifact(manifest, runtime, options.artifact)
        tokenizer = Tokenizer.from_file(str(folder / manifest.tokenizer.file))
        ids = prompt_ids(tokenizer, prompt, artifact)
        try:
            import_runtime(RUNTIMES[runtime][0])
            exported = read_artifact(folder / artifact.sidecar)
            session = open_artifact(exported, RUNTIMES[runtime][0], options.threads)
            reused = prompt_cache.load(options.prompt_cache, session, exported, np.array(ids)) if options.prompt_cache else 0
            chooser = OneByOne(session, options)
            if options.draft:
                chooser = Speculator(session, draft_session(options, runtime, folder / manifest.tokenizer.file), options.ahead)
            sink = out or sys.stdout
            sink.write(prompt if options.echo else "")
            made = stream(chooser, artifact, ids, TextStream(tokenizer, ids), options, sink)
            if options.prompt_cache and session.position >= len(ids):
                prompt_cache.save(options.prompt_cache, session, exported, np.array(ids))
            drafted, accepted = (chooser.proposed, chooser.accepted) if isinstance(chooser, Speculator) else (0, 0)
            return replace(made, reused_tokens=reused, drafted_tokens=drafted, accepted_tokens=accepted)
        except DeviceTestError as error:
            raise UserError(str(error)) from error
        except ArtifactFailure as error:
            raise GateError(str(error)) from error


def check_options(runtime: str, options: GenerateOptions) -> None:
    """UserError that names the option whose value makes no sense."""
    if runtime not in RUNTIMES:
        raise UserError(f"--runtime {runtime}: no such runtime; give one of {', '.join(RUNTIMES)}")
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
    if options.draft and options.temperature > 0:
        raise UserError(f"--draft goes with greedy text only, and --temperature is {options.temperature:g}; leave one of the two out")


def draft_session(options: GenerateOptions, runtime: str, tokenizer_file: Path) -> Session:
    """The draft's session. UserError unless its bundle has the very same tokenizer."""
    with bundle_folder(options.draft) as (folder, manifest):
        if (folder / manifest.tokenizer.file).read_bytes() != tokenizer_file.read_bytes():
            raise UserError(f"--draft {options.draft}: its tokenizer is another one; give a bundle of a pruned sibling of the same model")
        artifact = chosen_artifact(manifest, runtime, None)
        return open_session(folder / artifact.sidecar, RUNTIMES[runtime][0], options.threads)


def chosen_artifact(manifest: Manifest, runtime: str, name: str | None) -> Artifact:
    """The artifact called ``name``, else the one that ``runtime`` answers with soonest, as it was measured when the bundle was made."""
    ours = RUNTIMES[runtime][0]
    fitting = [artifact for artifact in manifest.artifacts if ours in [device.runtime for device in artifact.runtimes]]
    if not fitting:
        raise UserError(f"this bundle has nothing for --runtime {runtime}; give another runtime")
    if name is None:
        return min(fitting, key=lambda artifact: (answer_ms(artifact, ours), artifact.bytes))
    for artifact in fitting:
        if artifact.name == name:
            return artifact
    names = ", ".join(artifact.name for artifact in fitting)
    raise UserError(f"--artifact {name}: --runtime {runtime} opens {names}; give one of them")


def answer_ms(artifact: Artifact, runtime: str) -> float:
    """Milliseconds of an answer of ``ANSWER_TOKENS``, on the first device that timed it; infinite where none did."""
    for device in artifact.runtimes:
        if device.runtime == runtime and device.first_token_ms and device.decode_tokens_per_s:
            return device.first_token_ms + 1000 * ANSWER_TOKENS / device.decode_tokens_per_s
    return float("inf")


def prompt_ids(tokenizer: Tokenizer, prompt: str, artifact: Artifact) -> list[int]:
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


class TextStream:
    """Ids in, text out, never half a character: text is held back while it ends in the mark of unfinished bytes."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.tokenizer = tokenizer
        self.ids = prompt[-1:]  # some tokenizers drop a leading space at the start of a text: one token before keeps it
        self.shown = self.decoded()

    def decoded(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=False)

    def push(self, token: int) -> str:
        """The text that became whole with ``token``."""
        self.ids.append(token)
        text = self.decoded()
        if text.endswith(UNFINISHED):
            return ""
        piece = text[len(self.shown) :]
        self.ids, self.shown = self.ids[-1:], self.tokenizer.decode(self.ids[-1:], skip_special_tokens=False)
        return piece

    def finish(self) -> str:
        """What was held back, unfinished bytes as U+FFFD."""
        return self.decoded()[len(self.shown) :]


def stream(
    chooser: OneByOne | Speculator, artifact: Artifact, ids: list[int], text: TextStream, options: GenerateOptions, out: TextIO
) -> Generated:  # fmt: skip
    """Prompt, then token by token until the end of text, the limit, the end of the context, or Ctrl-C."""
    pieces, new_tokens, ended = [], 0, "limit of tokens"
    started = first = last = time.perf_counter()
    try:
        token = chooser.first(np.array(ids))
        first = last = time.perf_counter()
        while token != artifact.interface.eos_token_id:
            new_tokens += 1
            last = time.perf_counter()
            pieces.append(text.push(token))
            out.write(pieces[-1])
            out.flush()
            if len(ids) + new_tokens > artifact.interface.context_tokens:
                ended = "context is full"
                break
            if new_tokens == options.max_tokens:
                break
            token = chooser.next(token)
        else:
            ended = "end of text"
    except KeyboardInterrupt:
        ended = "interrupted"
    pieces.append(text.finish())
    out.write(pieces[-1])
    out.flush()
    steps = new_tokens - 1
    return Generated(
        text="".join(pieces),
        artifact=artifact.name,
        prompt_tokens=len(ids),
        new_tokens=new_tokens,
        first_token_ms=1000 * (first - started),
        decode_tokens_per_s=steps / (last - first) if steps > 0 else None,
        peak_rss_mb=peak_rss_mb(),
        ended=ended,
    )


def told(generated: Generated) -> str:
    """One line for stderr at the end."""
    speed = f"{generated.decode_tokens_per_s:.0f} tokens/s" if generated.decode_tokens_per_s else "too short to time"
    memory = f"{generated.peak_rss_mb:.0f} MB at most" if generated.peak_rss_mb else "memory unknown"
    reused = f", {generated.reused_tokens} of {generated.prompt_tokens} prompt tokens from the cache" if generated.reused_tokens else ""
    share = generated.accepted_tokens / generated.drafted_tokens if generated.drafted_tokens else 0
    drafted = f", {share:.0%} of {generated.drafted_tokens} drafted tokens taken" if generated.drafted_tokens else ""
    return (
        f"{generated.artifact}: {generated.new_tokens} tokens, {speed}, first after {generated.first_token_ms:.0f} ms, "
        f"{memory}{reused}{drafted}; stopped: {generated.ended}"
    )
