"""Numbers of single tokens against full distributions in numpy and scipy, and their way through a file and a process."""

import numpy as np
import pytest
import scipy.special
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from device_tests.devices.local import Run, run_local
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.gates import Gates
from device_tests.quality import evaluate, rank, read_scores, score, score_session, summary, write_scores
from device_tests.tests.toy import INTERFACE, VOCABULARY, NumpySession, ToyModel, write_onnx, write_vectors
from device_tests.vectors import open_evaluation


def damaged_toy() -> ToyModel:
    """Toy 0 with noise on its head, as heavy quantisation makes it: it agrees with toy 0 here and there."""
    model = ToyModel(0)
    model.head = model.head + np.random.default_rng(5).normal(scale=0.35, size=model.head.shape).astype(np.float32)
    return model


REFERENCE, OTHER = ToyModel(0), damaged_toy()
PROMPT, SCORED = 11, 13
NAMES = ("nll", "reference", "dense", "kl", "top1", "top5")


@pytest.fixture(scope="module")
def golden(tmp_path_factory):
    """Vectors whose reference is toy 0 and whose dense model is the damaged one."""
    return write_vectors(tmp_path_factory.mktemp("golden"), REFERENCE, OTHER)


@pytest.fixture(scope="module")
def evaluation(golden):
    return open_evaluation(golden, INTERFACE)


def logprobs(model, window) -> np.ndarray:
    """Log-probabilities float64 ``[scored, vocab]`` of one window."""
    return scipy.special.log_softmax(model.logits(window)[PROMPT - 1 : -1].astype(float), axis=-1)


def test_every_token_has_the_numbers_of_the_full_distributions(golden, evaluation):
    found = score_session(NumpySession(OTHER), evaluation)
    windows = np.load(golden / "evaluation.npz")["windows"]
    assert found.prompt_tokens == PROMPT and found.nll.shape == (len(windows), SCORED)
    for index, window in enumerate(windows):
        p, q = logprobs(REFERENCE, window), logprobs(OTHER, window)
        targets = window[PROMPT:]
        np.testing.assert_allclose(found.nll[index], -q[np.arange(SCORED), targets], atol=1e-6)
        np.testing.assert_allclose(found.reference[index], -p[np.arange(SCORED), targets], atol=1e-6)
        np.testing.assert_allclose(found.dense[index], found.nll[index], atol=1e-6)  # the dense model of these vectors
        firsts, order = p.argmax(axis=1), np.argsort(-q, axis=1)
        np.testing.assert_array_equal(found.top1[index], order[:, 0] == firsts)
        np.testing.assert_array_equal(found.top5[index], [first in row[:5] for first, row in zip(firsts, order, strict=True)])
    assert 0 < found.top1.mean() < found.top5.mean() < 1  # else the last two say nothing


def test_the_reference_itself_has_no_divergence(evaluation):
    found = score_session(NumpySession(REFERENCE), evaluation)
    assert found.top1.all() and found.top5.all()
    np.testing.assert_allclose(found.kl, 0, atol=1e-6)
    np.testing.assert_allclose(found.nll, found.reference, atol=1e-6)


def test_answers_without_a_session_score_alike(evaluation):
    """One forward pass over the whole window, as PyTorch does it, and token by token."""

    def whole(window, scored):
        return OTHER.logits(window[:-1])[-scored:]

    expected = score_session(NumpySession(OTHER), evaluation)
    for name in NAMES:
        np.testing.assert_allclose(getattr(score(whole, evaluation, VOCABULARY), name), getattr(expected, name), atol=1e-6)


def test_the_summary_is_of_the_same_tokens(evaluation):
    scores = score_session(NumpySession(OTHER), evaluation)
    found = evaluate(NumpySession(OTHER), evaluation)
    assert found == summary(scores)
    assert found.kl.value == pytest.approx(scores.kl.mean()) and found.tokens == 3 * SCORED
    assert found.worst_window == int(np.argmax((scores.nll - scores.reference).sum(axis=1)))
    assert scores.kl[found.worst.window, found.worst.position - PROMPT + 1] == scores.kl.max()


@given(arrays(np.float32, 12, elements=st.integers(-3, 3)), st.integers(0, 11))
def test_rank_is_the_place_in_a_stable_order(logits, token):
    order = np.argsort(-logits, kind="stable").tolist()
    assert rank(logits, token) == order.index(token)
    assert (rank(logits, token) == 0) == (int(logits.argmax()) == token)


def test_scores_come_back_from_their_file(tmp_path, evaluation):
    scores = score_session(NumpySession(OTHER), evaluation)
    write_scores(tmp_path / "tokens.npz", scores)
    found = read_scores(tmp_path / "tokens.npz")
    assert found.prompt_tokens == PROMPT and [path.name for path in tmp_path.iterdir()] == ["tokens.npz"]
    for name in NAMES:
        np.testing.assert_array_equal(getattr(found, name), getattr(scores, name))
    with pytest.raises(DeviceTestError, match="cannot be written.*give another --tokens"):
        write_scores(tmp_path / "none" / "tokens.npz", scores)


def test_broken_logits_end_it_by_place(evaluation):
    session = NumpySession(REFERENCE, spoil=lambda row, position: row * np.nan if position == 14 else row)
    with pytest.raises(ArtifactFailure, match="NaN or infinite logits at window 0 token 14"):
        score_session(session, evaluation)


def test_ids_of_another_vocabulary_are_told(evaluation):
    with pytest.raises(DeviceTestError, match="outside the vocabulary"):
        score(lambda window, scored: REFERENCE.logits(window)[-scored:], evaluation, 3)


def test_a_process_of_its_own_leaves_the_tokens_and_the_usual_result(golden, tmp_path, evaluation):
    """The ONNX toy in ONNX Runtime; the same numbers as the toy in numpy, whose top-1 no rounding decides."""
    sidecar = write_onnx(OTHER, tmp_path / "toy.onnx")
    result = run_local(sidecar, golden, Run("onnxruntime", gates=Gates(), timing=False, tokens=tmp_path / "tokens.npz"))
    found, expected = read_scores(tmp_path / "tokens.npz"), score_session(NumpySession(OTHER), evaluation)
    for name in NAMES:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), atol=2e-4)
    assert result["device"]["passed"] and result["quality"]["kl"] == pytest.approx(found.kl.mean(), rel=1e-5)
    assert {"perplexity", "perplexity_stderr", "perplexity_change", "kl", "top1", "worst_window", "worst_token"} <= result["quality"].keys()
