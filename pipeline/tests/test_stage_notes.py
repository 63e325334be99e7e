"""What a person is told of a stage that ended well: read from the records that the real stages write."""

import json

import numpy as np
import pytest

from pipeline import prune, recover
from pipeline.settings import PruneSettings, RecoverSettings
from pipeline.stage_notes import notes_of


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text_stage")
    stream = np.random.default_rng(0).zipf(1.4, 3000).clip(max=383).astype(np.int32)
    np.save(folder / "calibration.npy", stream[:24].reshape(1, 24))
    np.save(folder / "recovery.npy", stream[:2700])
    np.save(folder / "validation.npy", stream[2700:2988].reshape(9, 32))
    (folder / "text.json").write_text(json.dumps({"bos_token_id": None}))
    return folder


@pytest.mark.parametrize(("damping", "told"), [(1e-12, True), (0.01, False)])
def test_more_damping_than_asked_for_is_told(damping, told, checkpoints, text, tmp_path):
    """24 tokens span no 64 inputs, and 1e-12 of the diagonal is below float32."""
    settings = PruneSettings(method="sparsegpt", sparsity=0.5, damping=damping, windows=1)
    prune.run(settings, tmp_path, checkpoint=checkpoints["llama"], text=text)
    notes = notes_of("prune", tmp_path)
    assert len(notes) == told
    for note in notes:
        assert "not positive definite at prune.damping 1e-12" in note and "calibration windows" in note and "\n" not in note


@pytest.mark.parametrize(("learning_rate", "told"), [(30.0, True), (2e-3, False)])
def test_divergence_is_told_with_what_was_kept(learning_rate, told, checkpoints, text, tmp_path):
    for name in ("pruned", "out"):
        (tmp_path / name).mkdir()
    prune.run(PruneSettings(method="magnitude", sparsity=0.5, windows=1), tmp_path / "pruned", checkpoint=checkpoints["llama"], text=text)
    settings = RecoverSettings(steps=16, batch_windows=4, window_tokens=32, learning_rate=learning_rate)
    recover.run(settings, tmp_path / "out", checkpoint=checkpoints["llama"], prune=tmp_path / "pruned", text=text)
    notes = notes_of("recover", tmp_path / "out")
    assert len(notes) == told
    for note in notes:
        assert note.startswith("diverged after step ") and "the model before it is kept; set recover.learning_rate below 30" in note


def test_a_stage_without_notes_has_none(tmp_path):
    assert notes_of("text", tmp_path) == []
