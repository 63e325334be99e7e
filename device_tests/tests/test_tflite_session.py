"""The TFLite session over int8 tensors, with a runner that records what it is fed: no runtime is needed for that."""

from pathlib import Path

import numpy as np
import pytest

from device_tests import prompt_cache
from device_tests.artifact import Artifact, Interface
from device_tests.errors import ArtifactFailure
from device_tests.tflite_session import HIDDEN, TfliteSession, dequantised, quantised

CHUNK, CONTEXT, VOCABULARY = 4, 12, 6
CACHE, MASK, LOGITS = (0.5, -3), (30 / 255, 127), (0.25, 10)  # scale and zero point
SIZES = Interface(VOCABULARY, 1, 2, 8, CONTEXT, CHUNK, None, None)
ARTIFACT = Artifact("int8", "tflite", Path("int8.tflite"), "", 0, SIZES)


class RecordingRunner:
    """One signature: answers with its count of calls in every new slice."""

    def __init__(self, width: int):
        self.width, self.calls = width, []
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
    def __init__(self):
        self.runners = {"prefill": RecordingRunner(CHUNK), "decode": RecordingRunner(1)}

    def get_signature_runner(self, name: str) -> RecordingRunner:
        return self.runners[name]


def describe(shape: tuple, dtype: type, quantization: tuple) -> dict:
    return {"name": "tensor", "shape": np.array(shape), "dtype": dtype, "quantization": quantization}


def test_mask_caches_and_logits_are_int8():
    interpreter = RecordingInterpreter()
    session = TfliteSession(ARTIFACT, interpreter)
    logits = session.prefill(np.arange(6) % VOCABULARY)  # one whole chunk, and two tokens of the next
    np.testing.assert_allclose(logits, (np.arange(VOCABULARY) - 10) * 0.25)
    first, second = interpreter.runners["prefill"].calls
    assert first["mask"].dtype == first["k_0"].dtype == np.int8
    assert (first["k_0"] == -3).all() and (first["v_0"] == -3).all()  # empty slots are the zero point
    assert set(np.unique(first["mask"])) == {-128, 127} and (first["mask"][..., :CONTEXT] == -128).all()
    np.testing.assert_array_equal(first["mask"][0, 0, :, CONTEXT:] == 127, np.tri(CHUNK, dtype=bool))
    assert (second["k_0"][:, :, :4] == 1).all() and (second["v_0"][:, :, :4] == -1).all() and (second["k_0"][:, :, 4:] == -3).all()
    assert (second["mask"][..., :4] == 127).all() and (second["mask"][..., 4:CONTEXT] == -128).all()
    session.step(1)
    step = interpreter.runners["decode"].calls[0]
    assert (step["k_0"][:, :, 4:6] == 2).all() and (step["k_0"][:, :, 6:] == -3).all()
    assert (step["mask"][..., :6] == 127).all() and step["mask"][..., -1] == 127 and step["positions"] == 6
    session.reset()
    session.step(1)
    assert (interpreter.runners["decode"].calls[1]["k_0"] == -3).all()


@pytest.mark.parametrize(("signature", "change"), [("prefill", {"cache_scale": (0.5, -2)}), ("decode", {"cache_dtype": np.float32})])
def test_new_slices_of_another_kind_are_refused(signature, change):
    interpreter = RecordingInterpreter()
    vars(interpreter.runners[signature]).update(change)
    with pytest.raises(ArtifactFailure, match="cache k_0.*export the artifact again"):
        TfliteSession(ARTIFACT, interpreter)


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
    session, other = (TfliteSession(ARTIFACT, RecordingInterpreter()) for _ in range(2))
    tokens = np.arange(6) % VOCABULARY
    session.prefill(tokens)
    prompt_cache.save(tmp_path / "cache", session, ARTIFACT, tokens)
    other.prefill(np.ones(9, np.int64))
    other.reset()
    assert prompt_cache.load(tmp_path / "cache", other, ARTIFACT, np.append(tokens[:3], [5, 5])) == 3 == other.position
    for name, cache in other.caches().items():
        np.testing.assert_array_equal(cache[:, :, :3], session.caches()[name][:, :, :3])
        assert (cache[:, :, 3:] == CACHE[1]).all()
