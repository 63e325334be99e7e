"""What evaluation harnesses ask of a language model, over a device session: how likely a text is, and how it goes on."""

from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

from device_tests.replay import Place, refuse_broken
from device_tests.sampling import next_token
from device_tests.sessions import Session
from device_tests.token_statistics import log_softmax
from models.errors import UserError
from pipeline.streaming import GenerateOptions
from pipeline.text_pieces import TextStream

MAX_TOKENS = 256  # of an answer whose task names no limit, as lm-evaluation-harness has it
MAX_TOKENS_KEYS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING_KEYS = ("do_sample", "temperature", "top_k", "top_p")


@dataclass(frozen=True)
class Answering:
    """How an answer is drawn and where it ends: before any of ``until``, at the end of text, or after ``sampling.max_tokens``."""

    until: tuple[str, ...]
    sampling: GenerateOptions


def read_answering(given: dict) -> Answering:
    """A task's ``generation_kwargs``. UserError for one that is not known here: ignored, it would change what is measured."""
    unknown = sorted(given.keys() - {"until", *MAX_TOKENS_KEYS, *SAMPLING_KEYS})
    if unknown:
        known = ", ".join(("until", *MAX_TOKENS_KEYS, *SAMPLING_KEYS))
        raise UserError(f"generation_kwargs: {', '.join(unknown)} is not supported; take it out of the task (known: {known})")
    until = given.get("until") or []
    limits = [int(given[key]) for key in MAX_TOKENS_KEYS if given.get(key) is not None]
    temperature = float(given.get("temperature") or 0.0)
    if given.get("do_sample") is False:
        temperature = 0.0
    elif given.get("do_sample") and temperature == 0:
        temperature = 1.0
    sampling = GenerateOptions(
        max_tokens=limits[0] if limits else MAX_TOKENS,
        temperature=temperature,
        top_k=int(given.get("top_k") or 0),
        top_p=1.0 if given.get("top_p") is None else float(given["top_p"]),
    )
    if sampling.max_tokens < 1 or temperature < 0 or sampling.top_k < 0 or not 0 < sampling.top_p <= 1:
        raise UserError(f"generation_kwargs {given}: a limit, temperature, top_k or top_p that makes no sense; mend the task")
    return Answering((until,) if isinstance(until, str) else tuple(until), sampling)


def continuation_loglikelihood(session: Session, context: list[int], continuation: list[int]) -> tuple[float, bool]:
    """Log-probability (nats) of ``continuation`` after ``context``, and whether greedy decoding would have written it.

    What does not fit the model's context is dropped from the left of ``context``. UserError where not even one token of it is left.
    """
    room = session.interface.context_tokens
    if not context:
        raise UserError("a text without any token before it; the model has no token that begins a text")
    if len(continuation) > room:
        raise UserError(f"an answer of {len(continuation)} tokens does not fit the context of {room}; leave such tasks out")
    if not continuation:
        return 0.0, True
    tokens = (context + continuation)[-(room + 1) : -1]  # the last token is only predicted
    prompt = len(tokens) - len(continuation) + 1
    session.reset()
    logits = session.prefill(np.array(tokens[:prompt]))
    total, greedy = 0.0, True
    for place, token in enumerate(continuation):
        refuse_broken(logits, Place(0, session.position - 1))
        total += float(log_softmax(logits)[token])
        greedy &= int(logits.argmax()) == token
        if place + 1 < len(continuation):
            logits = session.step(token)
    return total, greedy


def answer(session: Session, tokenizer: Tokenizer, context: list[int], answering: Answering) -> str:
    """The text that follows ``context``, cut before the first of ``until``.

    What leaves no room for the answer is dropped from the left of ``context``. UserError where the answer alone fills the model.
    """
    sampling, interface = answering.sampling, session.interface
    if sampling.max_tokens >= interface.context_tokens:
        wanted = f"an answer of up to {sampling.max_tokens} tokens"
        raise UserError(f"{wanted} leaves no room in the context of {interface.context_tokens}; set a smaller max_gen_toks in the task")
    tokens = context[-(interface.context_tokens - sampling.max_tokens) :]
    stream, generator, text = TextStream(tokenizer, tokens), np.random.default_rng(sampling.seed), ""
    session.reset()
    logits = session.prefill(np.array(tokens))
    for place in range(sampling.max_tokens):
        refuse_broken(logits, Place(0, session.position - 1))
        token = next_token(logits, sampling.sampling, generator)
        if token == interface.eos_token_id:
            break
        text += stream.push(token)
        if any(stop and stop in text for stop in answering.until):
            return cut(text, answering.until)
        if place + 1 < sampling.max_tokens:
            logits = session.step(token)
    return cut(text + stream.finish(), answering.until)


def cut(text: str, until: tuple[str, ...]) -> str:
    """``text`` before the first of ``until``; an empty stop cuts nothing."""
    found = [text.index(stop) for stop in until if stop and stop in text]
    return text[: min(found)] if found else text
