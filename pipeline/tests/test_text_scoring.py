"""Likelihoods and answers against the toy recomputed from nothing for every prefix, and against PyTorch's own greedy text."""

import math

import numpy as np
import pytest
import scipy.special
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from device_tests.errors import ArtifactFailure
from device_tests.tests.toy import CONTEXT, INTERFACE, VOCABULARY, NumpySession, ToyModel
from models.errors import UserError
from pipeline.streaming import GenerateOptions
from pipeline.text_scoring import MAX_TOKENS, Answering, answer, continuation_loglikelihood, cut, read_answering

MODEL = ToyModel(0)
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=12)


def letters() -> Tokenizer:
    """One letter per id of the toy."""
    alphabet = [chr(ord("A") + index) for index in range(VOCABULARY)]
    tokenizer = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(alphabet)}, unk_token="A"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


LETTERS = letters()


def naive(tokens: list[int], scored: int) -> tuple[float, bool]:
    """Each of the last ``scored`` tokens from a run over all that stands before it."""
    total, greedy = 0.0, True
    for end in range(len(tokens) - scored, len(tokens)):
        row = MODEL.logits(np.array(tokens[max(0, end - CONTEXT) : end]))[-1].astype(float)
        total += scipy.special.log_softmax(row)[tokens[end]]
        greedy &= row.argmax() == tokens[end]
    return total, bool(greedy)


@settings(deadline=None, max_examples=40)
@given(TOKENS, TOKENS)
def test_a_continuation_has_the_sum_of_its_tokens(context, continuation):
    found, greedy = continuation_loglikelihood(NumpySession(MODEL), context, continuation)
    expected, expected_greedy = naive(context + continuation, len(continuation))
    assert found == pytest.approx(expected, abs=1e-4) and greedy == expected_greedy


def greedy_ids(context: list[int], count: int) -> list[int]:
    tokens = list(context)
    for _ in range(count):
        tokens.append(int(MODEL.logits(np.array(tokens))[-1].argmax()))
    return tokens[len(context) :]


def test_greedy_says_whether_each_token_is_the_first_choice():
    ids = greedy_ids([3, 1, 4], 6)
    assert continuation_loglikelihood(NumpySession(MODEL), [3, 1, 4], ids)[1]
    for place in range(6):
        wrong = ids[:place] + [(ids[place] + 1) % VOCABULARY] + ids[place + 1 :]
        assert not continuation_loglikelihood(NumpySession(MODEL), [3, 1, 4], wrong)[1]


def test_what_does_not_fit_is_dropped_from_the_left():
    generator = np.random.default_rng(0)
    context, continuation = generator.integers(0, VOCABULARY, 90).tolist(), [5, 6, 7]
    found, _ = continuation_loglikelihood(NumpySession(MODEL), context, continuation)
    kept = (context + continuation)[-(CONTEXT + 1) :]
    rows = scipy.special.log_softmax(MODEL.logits(np.array(kept[:-1])).astype(float), axis=1)
    assert found == pytest.approx(sum(rows[place][token] for place, token in zip((-3, -2, -1), continuation, strict=True)), abs=1e-4)
    whole = generator.integers(0, VOCABULARY, CONTEXT).tolist()  # the longest that is scored at all: one token stands before it
    found, _ = continuation_loglikelihood(NumpySession(MODEL), [1, 2], whole)
    rows = scipy.special.log_softmax(MODEL.logits(np.array([2, *whole[:-1]])).astype(float), axis=1)
    assert found == pytest.approx(rows[np.arange(CONTEXT), whole].sum(), abs=1e-3)
    with pytest.raises(UserError, match="an answer of 41 tokens does not fit the context of 40"):
        continuation_loglikelihood(NumpySession(MODEL), [1], [0] * 41)
    with pytest.raises(UserError, match="no token that begins a text"):
        continuation_loglikelihood(NumpySession(MODEL), [], [1])


def test_an_empty_continuation_is_certain():
    assert continuation_loglikelihood(NumpySession(MODEL), [1], []) == (0.0, True)


def test_probabilities_of_all_next_tokens_add_up_to_one():
    found = [continuation_loglikelihood(NumpySession(MODEL), [9, 8], [token])[0] for token in range(VOCABULARY)]
    assert sum(math.exp(value) for value in found) == pytest.approx(1)


def written(context: list[int], **given) -> str:
    return answer(NumpySession(MODEL), LETTERS, context, read_answering(given))


def test_an_answer_is_the_greedy_text():
    context = next([start] for start in range(1, VOCABULARY) if INTERFACE.eos_token_id not in greedy_ids([start], 12))
    ids = greedy_ids(context, 12)
    whole = LETTERS.decode(ids)
    assert written(context, max_gen_toks=12) == whole and len(whole) == 12
    stop = whole[4:6]
    assert written(context, max_gen_toks=12, until=[stop, "\n"]) == whole[: whole.index(stop)]
    assert written(context, max_gen_toks=12, until=stop) == whole[: whole.index(stop)]
    assert written(context, max_gen_toks=5, until=[], temperature=0.0) == whole[:5]
    assert written(context, max_gen_toks=5, do_sample=False, temperature=0.7) == whole[:5]


def test_an_answer_ends_with_the_text():
    def ending(row, position):
        return np.where(np.arange(VOCABULARY) == INTERFACE.eos_token_id, row.max() + 1, row) if position == 6 else row

    context = next([start] * 3 for start in range(1, VOCABULARY) if INTERFACE.eos_token_id not in greedy_ids([start] * 3, 12))
    found = answer(NumpySession(MODEL, ending), LETTERS, context, read_answering({"max_gen_toks": 12}))
    assert found == LETTERS.decode(greedy_ids(context, 4))  # positions 2 to 5 chose; 6 ended it


def test_a_long_context_leaves_room_for_the_answer():
    context = np.random.default_rng(2).integers(1, VOCABULARY, 100).tolist()
    found = answer(NumpySession(MODEL), LETTERS, context, Answering((), GenerateOptions(max_tokens=10)))
    expected = greedy_ids(context[-30:], 10)
    ends = expected.index(INTERFACE.eos_token_id) if INTERFACE.eos_token_id in expected else 10
    assert found == LETTERS.decode(expected[:ends])
    with pytest.raises(UserError, match="up to 40 tokens leaves no room in the context of 40"):
        answer(NumpySession(MODEL), LETTERS, [1], Answering((), GenerateOptions(max_tokens=40)))


def test_sampling_is_drawn_and_repeats():
    drawn = [written([7, 8], max_gen_toks=15, do_sample=True, temperature=5.0) for _ in range(2)]
    assert drawn[0] == drawn[1] != written([7, 8], max_gen_toks=15)


@given(st.text("ab", max_size=8), st.lists(st.text("ab", max_size=3), max_size=3))
def test_cut_text_holds_no_stop(text, until):
    found = cut(text, tuple(until))
    assert text.startswith(found) and not any(stop in found for stop in until if stop)


def test_what_a_task_may_say_about_answers():
    assert read_answering({}) == Answering((), GenerateOptions(max_tokens=MAX_TOKENS))
    found = read_answering({"until": ["\n"], "do_sample": True, "top_p": 0.9, "top_k": 3, "max_new_tokens": 7})
    assert found == Answering(("\n",), GenerateOptions(max_tokens=7, temperature=1.0, top_k=3, top_p=0.9))
    for given_, words in (({"num_beams": 4}, "num_beams is not supported"), ({"top_p": 2}, "makes no sense"), ({"max_tokens": 0}, "makes")):
        with pytest.raises(UserError, match=words):
            read_answering(given_)


def test_broken_logits_end_it():
    session = NumpySession(MODEL, spoil=lambda row, position: row * np.nan if position == 3 else row)
    with pytest.raises(ArtifactFailure, match="NaN or infinite logits at window 0 token 3"):
        continuation_loglikelihood(session, [1, 2], [3, 4, 5])
