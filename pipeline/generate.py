"""Streams text from a bundle's model: ``device_tests`` sessions for the model, the tokenizers library for the text."""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

import numpy as np
from tokenizers import Tokenizer

from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.sessions import Session, open_session
from device_tests.timing import peak_rss_mb
from models.errors import GateError, UserError
from pipeline.manifest import Artifact, Manifest
from pipeline.verify import bundle_folder

RUNTIMES = {"onnx": ("onnxruntime", "onnx"), "litert": ("litert", "tflite"), "tflite": ("tflite", "tflite")}
UNFINISHED = "\ufffd"  # what a decoder writes for the bytes of a character that is not whole yet


@dataclass(frozen=True)
class GenerateOptions:
    """How text is drawn. ``temperature`` 0 takes the most likely token; ``top_k`` 0 and ``top_p`` 1 cut nothing off."""

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    threads: int = 1
    artifact: str | None = None
    echo: bool = False  # write the prompt before what follows it


@dataclass(frozen=True)
class Generated:
    """What a run gave and cost. ``ended`` says why it stopped; speeds are None where nothing was timed."""

    text: str
    artifact: str
    prompt_tokens: int
    new_tokens: int
    first_token_ms: float
    decode_tokens_per_s: float | None
    peak_rss_mb: float | None
    ended: str


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
            session = open_session(folder / artifact.sidecar, RUNTIMES[runtime][0], options.threads)
            sink = out or sys.stdout
            sink.write(prompt if options.echo else "")
            return stream(session, artifact, ids, TextStream(tokenizer, ids), options, sink)
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
    }
    for name, (holds, allowed) in limits.items():
        if not holds:
            raise UserError(f"{name} {getattr(options, name[2:].replace('-', '_'))}: give {allowed}")


def chosen_artifact(manifest: Manifest, runtime: str, name: str | None) -> Artifact:
    """The artifact called ``name``, else the smallest one that ``runtime`` opens (the int8 one)."""
    ours = RUNTIMES[runtime][0]
    fitting = [artifact for artifact in manifest.artifacts if ours in [device.runtime for device in artifact.runtimes]]
    if not fitting:
        raise UserError(f"this bundle has nothing for --runtime {runtime}; give another runtime")
    if name is None:
        return min(fitting, key=lambda artifact: artifact.bytes)
    for artifact in fitting:
        if artifact.name == name:
            return artifact
    names = ", ".join(artifact.name for artifact in fitting)
    raise UserError(f"--artifact {name}: --runtime {runtime} opens {names}; give one of them")


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
    session: Session, artifact: Artifact, ids: list[int], text: TextStream, options: GenerateOptions, out: TextIO
) -> Generated:  # fmt: skip
    """Prompt, then token by token until the end of text, the limit, the end of the context, or Ctrl-C."""
    generator = np.random.default_rng(options.seed)
    pieces, new_tokens, ended = [], 0, "limit of tokens"
    started = first = last = time.perf_counter()
    try:
        logits = session.prefill(np.array(ids))
        first = last = time.perf_counter()
        while new_tokens < options.max_tokens:
            token = next_token(logits, options, generator)
            if token == artifact.interface.eos_token_id:
                ended = "end of text"
                break
            new_tokens += 1
            last = time.perf_counter()
            pieces.append(text.push(token))
            out.write(pieces[-1])
            out.flush()
            if session.position >= artifact.interface.context_tokens:
                ended = "context is full"
                break
            if new_tokens < options.max_tokens:
                logits = session.step(token)
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


def next_token(logits: np.ndarray, options: GenerateOptions, generator: np.random.Generator) -> int:
    """Draw from logits ``[vocab]``: temperature, then the ``top_k`` likeliest, then the fewest that hold ``top_p`` together.

    Nucleus sampling as in Holtzman et al. 2020 (arXiv:1904.09751).
    """
    if options.temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / options.temperature
    order = np.argsort(-scaled, kind="stable")  # stable: equal logits keep the order of their ids on every machine
    if options.top_k:
        order = order[: options.top_k]
    shares = np.exp(scaled[order] - scaled[order[0]])
    shares /= shares.sum()
    kept = int(np.searchsorted(np.cumsum(shares), options.top_p)) + 1
    shares = shares[:kept] / shares[:kept].sum()
    return int(generator.choice(order[: len(shares)], p=shares))


def told(generated: Generated) -> str:
    """One line for stderr at the end."""
    speed = f"{generated.decode_tokens_per_s:.0f} tokens/s" if generated.decode_tokens_per_s else "too short to time"
    memory = f"{generated.peak_rss_mb:.0f} MB at most" if generated.peak_rss_mb else "memory unknown"
    return (
        f"{generated.artifact}: {generated.new_tokens} tokens, {speed}, first after {generated.first_token_ms:.0f} ms, "
        f"{memory}; stopped: {generated.ended}"
    )
