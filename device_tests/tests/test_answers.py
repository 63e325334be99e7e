"""What one device is held against another by, with every number computed a second way."""

import numpy as np
import pytest

from device_tests.answers import Answers, agreement, golden_answers, read_answers, write_answers
from device_tests.devices.job import Run
from device_tests.devices.local import run_local
from device_tests.errors import DeviceTestError
from device_tests.tests.toy import VOCABULARY, ToyModel, write_onnx, write_vectors

WINDOWS, SCORED, PROMPT = 3, 4, 5


@pytest.fixture()
def golden():
    generator = np.random.default_rng(0)
    logits = generator.normal(size=(WINDOWS, SCORED, VOCABULARY)).astype(np.float32)
    windows = generator.integers(0, VOCABULARY, size=(WINDOWS, PROMPT + SCORED + 2))
    return golden_answers(logits, windows, PROMPT), windows


def test_golden_answers_hold_the_right_tokens_likelihood(golden):
    answers, windows = golden
    for window in range(WINDOWS):
        for place in range(SCORED):
            row = answers.logits[window, place].astype(np.float64)
            right = windows[window, PROMPT + place]
            assert answers.nll[window, place] == pytest.approx(np.log(np.exp(row).sum()) - row[right])
            assert answers.choice[window, place] == list(row).index(max(row))


def test_a_device_agrees_with_itself_to_the_bit(golden):
    answers, _ = golden
    found = agreement(answers, answers)
    assert (found.max_abs_diff, found.bit_equal, found.top1, found.perplexity_change) == (0, 1, 1, 0)
    assert found.tokens == found.golden_tokens == WINDOWS * SCORED


def test_what_differs_is_counted(golden):
    answers, _ = golden
    logits, choice = answers.logits.copy(), answers.choice.copy()
    logits[1, 2, 7] += 0.25
    logits[2, 0] += 1e-3
    choice[0, 0] = (choice[0, 0] + 1) % VOCABULARY
    found = agreement(answers, Answers(logits, choice, answers.nll + 0.01, evaluated=False))
    assert found.max_abs_diff == pytest.approx(0.25) and found.bit_equal == 10 / 12 and found.top1 == pytest.approx(11 / 12)
    assert found.perplexity_change == pytest.approx(np.exp(0.01) - 1)


def test_a_sign_of_zero_is_not_bit_equal(golden):
    answers, _ = golden
    logits = answers.logits.copy()
    logits[0, 0, 0] = 0.0
    other = logits.copy()
    other[0, 0, 0] = -0.0
    first, second = (Answers(each, answers.choice, answers.nll, False) for each in (logits, other))
    assert agreement(first, second).bit_equal == 11 / 12


def test_only_the_windows_that_both_scored_are_compared(golden):
    answers, _ = golden
    worse = answers.nll.copy()
    worse[2:] += 5.0
    found = agreement(
        Answers(answers.logits, answers.choice, worse, True), Answers(answers.logits, answers.choice[:2], answers.nll[:2], True)
    )
    assert found.windows == 2 and found.tokens == 2 * SCORED and found.perplexity_change == 0


def test_answers_to_other_texts_are_refused(golden):
    answers, _ = golden
    with pytest.raises(DeviceTestError, match="different golden vectors; test both"):
        agreement(answers, Answers(answers.logits[:, :2], answers.choice, answers.nll, False))


def test_answers_come_back_from_a_file(golden, tmp_path):
    answers, _ = golden
    write_answers(tmp_path / "answers.npz", answers)
    assert agreement(answers, read_answers(tmp_path / "answers.npz")).bit_equal == 1.0
    with pytest.raises(DeviceTestError, match="give another --answers"):
        write_answers(tmp_path / "none" / "answers.npz", answers)


@pytest.mark.parametrize("windows", [None, 2])
def test_a_run_leaves_its_answers(tmp_path, windows):
    """Without quality two evaluation windows serve the comparison; with it all three, and the same numbers as in the record."""
    sidecar = write_onnx(ToyModel(), tmp_path / "toy.onnx")
    write_vectors(tmp_path, ToyModel(), ToyModel(1))
    run = Run("onnxruntime", quality=windows is None, windows=windows, answers=tmp_path / "answers.npz", timing=False)
    result = run_local(sidecar, tmp_path, run)
    assert result["device"]["passed"], result["device"]["failures"]
    answers = read_answers(tmp_path / "answers.npz")
    assert answers.evaluated and answers.choice.shape == (windows or 3, 13) and answers.logits.shape == (3, 6, VOCABULARY)
    if windows is None:
        assert np.exp(answers.nll.mean()) == pytest.approx(result["quality"]["perplexity"], rel=1e-5)
    else:
        assert result["quality"] is None, "a part of the windows is no quality"


def test_windows_without_answers_are_a_mistake(tmp_path):
    sidecar = write_onnx(ToyModel(), tmp_path / "toy.onnx")
    write_vectors(tmp_path, ToyModel(), ToyModel(1))
    device = run_local(sidecar, tmp_path, Run("onnxruntime", windows=2, timing=False))["device"]
    assert not device["passed"] and "serve a comparison only" in device["failures"][0]
