"""The TFLite session over int8 tensors and over a model in numpy, with runners that need no runtime."""

from itertools import combinations_with_replacement
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from device_tests import prompt_cache
from device_tests.artifact import Artifact, Interface
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.tflite_calls import InterpreterCalls, dequantised, quantised
from device_tests.tflite_session import CALL_TOKENS, FEWEST_ROWS, HIDDEN, TfliteSession, cover, signatures_of

LENGTHS, CHUNK, CONTEXT, VOCABULARY = (2, 4), 4, 12, 6
CACHE, MASK, LOGITS = (0.5, -3), (30 / 255, 127), (0.25, 10)  # scale and zero point
SIZES = Interface(VOCABULARY, 1, 2, 8, CONTEXT, LENGTHS, None, None)
ARTIFACT = Artifact("int8", "tflite", Path("int8.tflite"), "", 0, SIZES)


class RecordingRunner:
    """One signature: answers with its count of calls in every new slice."""

    def __init__(self, width: int, calls: list):
        self.width, self.calls = width, calls
        self.cache_scale, self.cache_dtype = CACHE, np.int8

    def get_input_details(self) -> dict:
        shapes = {"tokens": (1, self.width), "positions": (1, self.width), "mask": (1, 1, self.width, CONTEXT + self.width)}
        described = {name: describe(shape, np.int32, (0.0, 0)) for name, shape in shapes.items()}
        described["mask"] = describe(shapes["mask"], np.int8, MASK)
        if self.width > 1:
            described["last"] = describe((1,), np.int32, (0.0, 0))
        return described | {name: describe((1, 2, CONTEXT, 8), np.int8, CACHE) for name in ("k_0", "v_0")}

    def get_output_details(self) -> dict:
        fresh = {name: describe((1, 2, self.width, 8), self.cache_dtype, self.cache_scale) for name in ("new_k_0", "new_v_0")}
        return fresh | {"logits": describe((1, VOCABULARY), np.int8, LOGITS)}

    def __call__(self, **feeds) -> dict:
        self.calls.append({name: value.copy() for name, value in feeds.items()})
        fresh = np.full((1, 2, self.width, 8), len(self.calls), np.int8)
        return {"logits": np.arange(VOCABULARY, dtype=np.int8)[None], "new_k_0": fresh, "new_v_0": -fresh}


class RecordingInterpreter:
    """``calls`` are what the signatures were fed, in the order of the calls."""

    def __init__(self):
        self.calls = []
        self.runners = {name: RecordingRunner(width, self.calls) for name, width in (("prefill_2", 2), ("prefill_4", 4), ("decode", 1))}

    def get_signature_runner(self, name: str) -> RecordingRunner:
        return self.runners[name]


def describe(shape: tuple, dtype: type, quantization: tuple) -> dict:
    return {"name": "tensor", "shape": np.array(shape), "dtype": dtype, "quantization": quantization}


def session_of(interpreter: RecordingInterpreter) -> TfliteSession:
    return TfliteSession(ARTIFACT, InterpreterCalls(interpreter, signatures_of(ARTIFACT)))


def test_mask_caches_and_logits_are_int8():
    interpreter = RecordingInterpreter()
    session = session_of(interpreter)
    logits = session.prefill(np.arange(6) % VOCABULARY)  # one whole long call, and a short one
    np.testing.assert_allclose(logits, (np.arange(VOCABULARY) - 10) * 0.25)
    first, second = interpreter.calls
    assert first["tokens"].shape == (1, 4) and second["tokens"].tolist() == [[4, 5]] and second["positions"].tolist() == [[4, 5]]
    assert first["mask"].dtype == first["k_0"].dtype == np.int8
    assert (first["k_0"] == -3).all() and (first["v_0"] == -3).all()  # empty slots are the zero point
    assert set(np.unique(first["mask"])) == {-128, 127} and (first["mask"][..., :CONTEXT] == -128).all()
    np.testing.assert_array_equal(first["mask"][0, 0, :, CONTEXT:] == 127, np.tri(CHUNK, dtype=bool))
    assert (second["k_0"][:, :, :4] == 1).all() and (second["v_0"][:, :, :4] == -1).all() and (second["k_0"][:, :, 4:] == -3).all()
    assert (second["mask"][..., :4] == 127).all() and (second["mask"][..., 4:CONTEXT] == -128).all()
    session.step(1)
    step = interpreter.calls[-1]
    assert (step["k_0"][:, :, 4:6] == 2).all() and (step["k_0"][:, :, 6:] == -3).all()
    assert (step["mask"][..., :6] == 127).all() and step["mask"][..., -1] == 127 and step["positions"] == 6
    session.reset()
    session.step(1)
    assert (interpreter.calls[-1]["k_0"] == -3).all()


@pytest.mark.parametrize(("signature", "change"), [("prefill_2", {"cache_scale": (0.5, -2)}), ("decode", {"cache_dtype": np.float32})])
def test_new_slices_of_another_kind_are_refused(signature, change):
    interpreter = RecordingInterpreter()
    vars(interpreter.runners[signature]).update(change)
    with pytest.raises(ArtifactFailure, match="cache k_0.*export the artifact again"):
        session_of(interpreter)


def test_a_signature_of_another_length_is_refused():
    interpreter = RecordingInterpreter()
    interpreter.runners["prefill_4"] = RecordingRunner(3, [])
    with pytest.raises(ArtifactFailure, match=r"prefill_4: mask is \(1, 1, 3, 15\), the contract says \(1, 1, 4, 16\)"):
        session_of(interpreter)


def test_numbers_survive_a_round_trip():
    tensor = describe((1,), np.int8, (0.1, 20))
    for value in (-14.8, -3.0, 0.0, 5.5, 10.7):
        assert dequantised(np.array([quantised(value, tensor)]), tensor)[0] == pytest.approx(value, abs=0.051)
    assert quantised(HIDDEN, tensor) == -128 and quantised(99.0, tensor) == 127  # outside its range a value saturates
    assert quantised(HIDDEN, describe((1,), np.float32, (0.0, 0))) == HIDDEN
    with pytest.raises(ArtifactFailure, match="uint8"):
        quantised(0, describe((1,), np.uint8, (1.0, 0)))


def test_a_prompt_cache_goes_into_an_int8_session_and_back(tmp_path):
    """Behind what was put back lie empty slots, whatever was there before: a hidden slot still has a little weight."""
    session, other = (session_of(RecordingInterpreter()) for _ in range(2))
    tokens = np.arange(6) % VOCABULARY
    session.prefill(tokens)
    prompt_cache.save(tmp_path / "cache", session, ARTIFACT, tokens)
    other.prefill(np.ones(9, np.int64))
    other.reset()
    assert prompt_cache.load(tmp_path / "cache", other, ARTIFACT, np.append(tokens[:3], [5, 5])) == 3 == other.position
    for name, cache in other.caches().items():
        np.testing.assert_array_equal(cache[:, :, :3], session.caches()[name][:, :, :3])
        assert (cache[:, :, 3:] == CACHE[1]).all()


lengths = st.sets(st.integers(1, 40), min_size=1, max_size=4).map(lambda found: tuple(sorted(found)))


@given(tokens=st.integers(1, 500), lengths=lengths)
def test_calls_hold_the_prompt_and_only_the_last_is_padded(tokens, lengths):
    calls = cover(tokens, lengths)
    assert set(calls) <= set(lengths) and list(calls) == sorted(calls, reverse=True)
    assert sum(calls[:-1]) < tokens <= sum(calls)


@given(tokens=st.integers(1, 60), lengths=st.sets(st.integers(4, 40), min_size=1, max_size=3).map(lambda found: tuple(sorted(found))))
@settings(max_examples=60)
def test_no_other_calls_cost_less(tokens, lengths):
    enough = [
        calls
        for count in range(1, -(-tokens // min(lengths)) + 1)
        for calls in combinations_with_replacement(lengths, count)
        if sum(calls) >= tokens
    ]
    cheapest = min(sum(calls) + CALL_TOKENS * len(calls) for calls in enough)
    found = cover(tokens, lengths)
    assert sum(found) + CALL_TOKENS * len(found) == cheapest


def test_usual_prompts_go_in_few_calls():
    assert [cover(tokens, (16, 64, 256)) for tokens in (5, 16, 17, 50, 70, 128, 200, 300, 1000)] == [
        (16,), (16,), (16, 16), (64,), (64, 16), (64, 64), (256,), (256, 64), (256, 256, 256, 256),
    ]  # fmt: skip


DIM, LONG = 4, 200
FLOATS = Interface(VOCABULARY, 1, 1, DIM, LONG, (3, 16, 40), None, None, resizable_cache=True)


class NumpyModel:
    """One attention layer over tokens and positions; ``logits`` recomputes the whole text, signatures use the cache that they are fed."""

    def __init__(self):
        draw = np.random.default_rng(0).normal
        self.query, self.key, self.value = (draw(size=(VOCABULARY, LONG, DIM)).astype(np.float32) for _ in range(3))
        self.head = draw(size=(DIM, VOCABULARY)).astype(np.float32)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """[vocab] after the last of ``tokens`` int [n]."""
        places = np.arange(len(tokens))
        scores = self.key[tokens, places] @ self.query[tokens[-1], len(tokens) - 1]
        weights = np.exp(scores - scores.max())
        return weights / weights.sum() @ self.value[tokens, places] @ self.head


class NumpyRunner:
    """One signature of a ``NumpyModel``; its cache may have any length. ``rows`` are those that it was fed."""

    def __init__(self, model: NumpyModel, width: int):
        self.model, self.width, self.rows = model, width, []

    def get_input_details(self) -> dict:
        shapes = {"tokens": (1, self.width), "positions": (1, self.width)} | ({"last": (1,)} if self.width > 1 else {})
        floats = {"mask": (1, 1, self.width, LONG + self.width), "k_0": (1, 1, LONG, DIM), "v_0": (1, 1, LONG, DIM)}
        ints = {name: describe(shape, np.int32, (0.0, 0)) for name, shape in shapes.items()}
        return ints | {name: describe(shape, np.float32, (0.0, 0)) for name, shape in floats.items()}

    def get_output_details(self) -> dict:
        shapes = {"logits": (1, VOCABULARY), "new_k_0": (1, 1, self.width, DIM), "new_v_0": (1, 1, self.width, DIM)}
        return {name: describe(shape, np.float32, (0.0, 0)) for name, shape in shapes.items()}

    def __call__(self, tokens, positions, mask, k_0, v_0, last=(0,)) -> dict:
        rows = k_0.shape[2]
        assert mask.shape == (1, 1, self.width, rows + self.width) and v_0.shape[2] == rows
        self.rows.append(rows)
        ids, places = tokens[0], positions[0]
        keys, values = (np.concatenate([old[0, 0], new[ids, places]]) for old, new in ((k_0, self.model.key), (v_0, self.model.value)))
        scores = self.model.query[ids, places] @ keys.T + mask[0, 0] * 1000
        weights = np.exp(scores - scores.max(1, keepdims=True))
        mixed = weights / weights.sum(1, keepdims=True) @ values
        fresh = {"new_k_0": self.model.key[ids, places][None, None], "new_v_0": self.model.value[ids, places][None, None]}
        return fresh | {"logits": (mixed[int(last[0])] @ self.model.head)[None]}


class NumpyInterpreter:
    def __init__(self, model: NumpyModel):
        self.runners = {"decode": NumpyRunner(model, 1)} | {f"prefill_{width}": NumpyRunner(model, width) for width in (3, 16, 40)}

    def get_signature_runner(self, name: str) -> NumpyRunner:
        return self.runners[name]


MODEL = NumpyModel()


@given(
    lengths=st.lists(st.integers(1, 90), min_size=1, max_size=3), steps=st.integers(0, 5), resizable=st.booleans(), seed=st.integers(0, 9)
)
@settings(max_examples=80, deadline=None)
def test_any_prompts_are_what_the_text_as_a_whole_gives(lengths, steps, resizable, seed):
    """Prompts of any length one after the other, then tokens, with a cache of full length and with one that grows."""
    artifact = Artifact("floats", "tflite", Path("floats.tflite"), "", 0, FLOATS)
    interpreter = NumpyInterpreter(MODEL)
    session = TfliteSession(artifact, InterpreterCalls(interpreter, signatures_of(artifact), resizable))
    text = np.random.default_rng(seed).integers(0, VOCABULARY, sum(lengths) + steps)
    if len(text) > LONG:
        with pytest.raises(DeviceTestError, match="do not fit the context"):
            for end in np.cumsum([*lengths, steps or 1]):
                session.prefill(text[session.position : end])
        return
    for end in np.cumsum(lengths):
        found = session.prefill(text[session.position : end])
        np.testing.assert_allclose(found, MODEL.logits(text[:end]), rtol=1e-3, atol=1e-4)
    for token in text[session.position :]:
        np.testing.assert_allclose(session.step(token), MODEL.logits(text[: session.position]), rtol=1e-3, atol=1e-4)
    fed = {rows for runner in interpreter.runners.values() for rows in runner.rows}
    assert fed <= ({FEWEST_ROWS, 128, LONG} if resizable else {LONG})


def test_a_cache_that_grew_is_seen_whole_and_shrinks_again():
    artifact = Artifact("floats", "tflite", Path("floats.tflite"), "", 0, FLOATS)
    interpreter = NumpyInterpreter(MODEL)
    session = TfliteSession(artifact, InterpreterCalls(interpreter, signatures_of(artifact), resizable=True))
    text = np.random.default_rng(3).integers(0, VOCABULARY, 150)
    session.prefill(text)
    assert session.caches()["k_0"].shape == (1, 1, LONG, DIM)
    np.testing.assert_array_equal(session.caches()["k_0"][0, 0, :150], MODEL.key[text, np.arange(150)])
    session.rewind(30)
    assert not session.caches()["k_0"][:, :, 30:].any()
    np.testing.assert_allclose(session.step(text[30]), MODEL.logits(text[:31]), rtol=1e-3, atol=1e-4)
    assert interpreter.runners["decode"].rows == [FEWEST_ROWS]
