"""Keys and values on disk: the same logits as when everything is computed, and nothing from another model."""

import numpy as np
import pytest

from device_tests import prompt_cache
from device_tests.artifact import read_artifact
from device_tests.errors import DeviceTestError
from device_tests.sessions import open_session
from device_tests.tests.toy import ToyModel, write_onnx

TOKENS = np.array([3, 9, 4, 11, 2, 7, 30, 1, 5, 8, 6])


@pytest.fixture
def model(tmp_path):
    """A session's opener and the artifact."""
    sidecar = write_onnx(ToyModel(0), tmp_path / "toy.onnx")
    return lambda: open_session(sidecar, "onnxruntime"), read_artifact(sidecar)


@pytest.mark.parametrize("common", [1, 6, 10])
def test_a_reused_beginning_gives_the_logits_of_a_recomputed_one(model, tmp_path, common):
    """What follows the common beginning differs; steps after it see the same cache."""
    opened, artifact = model
    session = opened()
    session.prefill(TOKENS)
    session.step(40)  # what came after the prompt is not kept
    prompt_cache.save(tmp_path / "cache", session, artifact, TOKENS)
    other = np.concatenate([TOKENS[:common], [20, 21]])
    fresh, reusing = opened(), opened()
    assert prompt_cache.load(tmp_path / "cache", reusing, artifact, other) == common == reusing.position
    np.testing.assert_allclose(reusing.prefill(other[common:]), fresh.prefill(other), atol=1e-5)
    for token in (4, 9, 2):
        np.testing.assert_allclose(reusing.step(token), fresh.step(token), atol=1e-5)


def test_the_same_prompt_leaves_one_token_to_feed(model, tmp_path):
    opened, artifact = model
    session = opened()
    session.prefill(TOKENS)
    prompt_cache.save(tmp_path / "cache", session, artifact, TOKENS)
    assert prompt_cache.load(tmp_path / "cache", opened(), artifact, TOKENS) == len(TOKENS) - 1


def test_another_models_cache_and_a_missing_one_are_not_used(model, tmp_path):
    opened, artifact = model
    session = opened()
    session.prefill(TOKENS)
    other = type(artifact)(**{**vars(artifact), "sha256": "0" * 64})
    prompt_cache.save(tmp_path / "cache", session, other, TOKENS)
    fresh = opened()
    assert prompt_cache.load(tmp_path / "cache", fresh, artifact, TOKENS) == 0 == fresh.position
    assert prompt_cache.load(tmp_path / "none", fresh, artifact, TOKENS) == 0


def test_a_file_that_is_no_cache_is_one_line(model, tmp_path):
    opened, artifact = model
    session = opened()
    session.prefill(TOKENS)
    path = tmp_path / "cache"
    name, cache = next(iter(session.caches().items()))
    arrays = {name: cache[:, :, :11] for name, cache in session.caches().items()}
    facts = {"tokens": TOKENS, "artifact": np.array(artifact.sha256)}
    for spoiled, reason in (
        ({**facts, **arrays, name: arrays[name][..., :1]}, "this model's is"),
        ({**facts, **arrays, name: arrays[name].astype(np.float64)}, "this model's is"),
        ({**facts, name: arrays[name]}, "no prompt cache"),
        ({"tokens": np.array([{}], dtype=object), "artifact": facts["artifact"]}, "no prompt cache"),
    ):
        with path.open("wb") as file:
            np.savez(file, **spoiled)
        before = {key: value.copy() for key, value in session.caches().items()}
        with pytest.raises(DeviceTestError, match=reason):
            prompt_cache.load(path, session, artifact, TOKENS)
        assert all(np.array_equal(before[key], value) for key, value in session.caches().items())


def test_a_folder_that_cannot_be_written_to_is_one_line(model, tmp_path):
    opened, artifact = model
    with pytest.raises(DeviceTestError, match="cannot be written"):
        prompt_cache.save(tmp_path / "missing" / "cache", opened(), artifact, TOKENS[:0])
