"""A draft that goes ahead: the text is the model's own whatever the draft says, and the cache is as if there were none."""

import numpy as np
import pytest

from device_tests.errors import DeviceTestError
from device_tests.sessions import open_session
from device_tests.speculative import Speculator
from device_tests.tests.toy import CONTEXT, VOCABULARY, NumpySession, ToyModel, write_onnx

PROMPT = np.array([3, 9, 4, 11])


@pytest.fixture(scope="module")
def sidecars(tmp_path_factory):
    """A model, a sibling whose choices are often the same, and a stranger."""
    model, sibling = ToyModel(0), ToyModel(0)
    draws = np.random.default_rng(5)
    sibling.head = sibling.head + draws.normal(scale=0.12, size=sibling.head.shape).astype(np.float32)
    made = {}
    for name, toy in (("model", model), ("sibling", sibling), ("stranger", ToyModel(7))):
        made[name] = write_onnx(toy, tmp_path_factory.mktemp(name) / "toy.onnx")
    return made


def greedy(sidecar, count):
    session = open_session(sidecar, "onnxruntime")
    tokens = [int(session.prefill(PROMPT).argmax())]
    while len(tokens) < count:
        tokens.append(int(session.step(tokens[-1]).argmax()))
    return tokens, session


@pytest.mark.parametrize("ahead", [1, 2, 4, 9])
@pytest.mark.parametrize("draft", ["model", "sibling", "stranger"])
def test_the_text_is_the_models_own(sidecars, draft, ahead):
    """To the end of the context: the last rounds have no room for guesses."""
    count = CONTEXT - len(PROMPT) + 1
    expected, alone = greedy(sidecars["model"], count)
    model, other = (open_session(sidecars[name], "onnxruntime") for name in ("model", draft))
    speculator = Speculator(model, other, ahead)
    tokens = [speculator.first(PROMPT)]
    while len(tokens) < count:
        tokens.append(speculator.next(tokens[-1]))
    assert tokens == expected and model.position <= CONTEXT
    share = speculator.accepted / speculator.proposed
    assert share == 1 if draft == "model" else share < 1
    if draft == "sibling":
        assert share > 0
    held = model.position
    for name, cache in model.caches().items():
        np.testing.assert_allclose(cache[:, :, :held], alone.caches()[name][:, :, :held], atol=1e-4, err_msg=name)


def test_every_round_counts_what_was_proposed(sidecars):
    """Its own draft three ahead: rounds of three guesses that give four tokens each."""
    model, draft = (open_session(sidecars["model"], "onnxruntime") for _ in range(2))
    speculator = Speculator(model, draft, 3)
    token = speculator.first(PROMPT)
    for _ in range(8):
        token = speculator.next(token)
    assert (speculator.proposed, speculator.accepted) == (6, 6)


def test_sessions_that_cannot_work_together_are_refused(sidecars):
    model = open_session(sidecars["model"], "onnxruntime")
    with pytest.raises(DeviceTestError, match="the draft gives logits of the last token alone"):
        Speculator(model, NumpySession(ToyModel(0)), 2)
    small = open_session(sidecars["model"], "onnxruntime")
    small.interface = type(small.interface)(**{**vars(small.interface), "vocab_size": VOCABULARY - 1})
    with pytest.raises(DeviceTestError, match=f"the draft knows {VOCABULARY - 1} tokens and the model {VOCABULARY}"):
        Speculator(model, small, 2)
