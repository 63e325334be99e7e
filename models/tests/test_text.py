"""Windows: the right tokens, no overlap between what calibrates, trains and judges, and short or broken texts refused."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from conftest import tiny_text, tiny_tokenizer
from models import text
from models.checkpoint import load_model
from models.errors import UserError
from models.sampling import sample_tokens
from models.settings import TextSettings

LENGTHS = {"window_tokens": 32, "prompt_tokens": 8, "sampled_recovery_tokens": 1024}
SMALL = {**LENGTHS, "calibration_windows": 12, "evaluation_windows": 6}


@pytest.fixture
def evaluation_file(tmp_path) -> Path:
    path = tmp_path / "held out.txt"
    path.write_text(Path(text.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    return path


def make(checkpoint: Path, out: Path, **choices) -> dict:
    """Run the stage; its arrays and its record."""
    out.mkdir()
    text.run(TextSettings(**{**SMALL, **choices}), out, checkpoint=checkpoint)
    arrays = {path.stem: np.load(path) for path in out.glob("*.npy")}
    return {**arrays, "record": json.loads((out / "text.json").read_text())}


def refusal(checkpoint: Path, out: Path, **choices) -> str:
    with pytest.raises(UserError) as caught:
        make(checkpoint, out, **choices)
    assert "\n" not in str(caught.value) and not list(out.iterdir())
    return str(caught.value)


def occurs_at(window: np.ndarray, stream: list[int]) -> list[int]:
    """Every multiple of the window's length at which the window stands in the stream."""
    length = len(window)
    return [start for start in range(0, len(stream) - length + 1, length) if stream[start : start + length] == window.tolist()]


def test_windows_are_pieces_of_the_files(checkpoints, tmp_path, evaluation_file, text_file):
    made = make(checkpoints["llama"], tmp_path / "out", calibration=text_file, evaluation=evaluation_file)
    stream = tiny_tokenizer()(tiny_text()).input_ids
    judged = tiny_tokenizer()(evaluation_file.read_text()).input_ids
    assert made["calibration"].shape == (12, 32) and made["evaluation"].shape == (6, 32)
    assert all(array.dtype == np.int32 for name, array in made.items() if name != "record")
    assert all(occurs_at(window, stream) for window in np.concatenate([made["calibration"], made["validation"]]))
    assert all(occurs_at(window, judged) for window in made["evaluation"])


@settings(max_examples=60, deadline=None)
@given(st.integers(400, 3000), st.integers(16, 40), st.integers(1, 8), st.sampled_from([None, 9999]), st.integers(0, 9))
def test_calibration_validation_and_recovery_never_share_a_token(tokens, window, wanted, bos, seed):
    stream = np.arange(tokens, dtype=np.int32)  # every token is unique, so sharing shows
    chosen = TextSettings(window_tokens=window, prompt_tokens=4, calibration_windows=wanted, seed=seed)
    body = window - (bos is not None)
    split = text.split_calibration(stream, chosen, bos)
    calibration, validation = split.calibration[:, window - body :], split.validation[:, window - body :]
    assert calibration.shape == (wanted, body) and len(validation) >= 1
    assert len(np.unique(calibration)) == calibration.size and len(np.unique(validation)) == validation.size
    assert not np.intersect1d(validation, calibration).size and not np.intersect1d(validation, split.recovery).size
    assert np.array_equal(np.union1d(validation, split.recovery), stream)  # nothing is lost
    assert (np.diff(calibration, axis=1) == 1).all() and (calibration[:, 0] % body == 0).all()
    if bos is not None:
        assert (split.calibration[:, 0] == bos).all() and (split.validation[:, 0] == bos).all()


def test_same_seed_same_bytes_and_another_seed_other_windows(checkpoints, tmp_path, text_file, evaluation_file):
    files = {"calibration": text_file, "evaluation": evaluation_file}
    one = make(checkpoints["llama"], tmp_path / "one", **files)
    make(checkpoints["llama"], tmp_path / "two", **files)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()
    assert not np.array_equal(one["calibration"], make(checkpoints["llama"], tmp_path / "three", **files, seed=1)["calibration"])


def test_record_says_what_was_read_but_not_where(checkpoints, tmp_path, text_file, evaluation_file):
    made = make(checkpoints["llama"], tmp_path / "out", calibration=text_file, evaluation=evaluation_file)
    record = made["record"]
    assert record["calibration"]["kind"] == "file" and record["evaluation"]["name"] == "held out.txt"
    assert record["calibration"]["tokens"] == len(tiny_tokenizer()(tiny_text()).input_ids)
    assert record["recovery_tokens"] == len(made["recovery"]) and record["windows"]["validation"] == len(made["validation"])
    assert str(tmp_path) not in json.dumps(record) and str(text_file.parent) not in json.dumps(record)


def test_leading_token_as_the_tokenizer_puts_it(checkpoints, tmp_path, text_file, evaluation_file):
    folder = tmp_path / "with_bos"
    tokenizer = tiny_tokenizer()
    first = [("<|endoftext|>", 0)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<|endoftext|> $A", special_tokens=first)
    load_model(checkpoints["llama"]).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    made = make(folder, tmp_path / "out", calibration=text_file, evaluation=evaluation_file)
    assert made["record"]["bos_token_id"] == 0
    stream = tiny_tokenizer()(tiny_text(), add_special_tokens=False).input_ids
    for name in ("calibration", "validation"):
        assert (made[name][:, 0] == 0).all() and all(occurs_at(window[1:], stream) for window in made[name])
    assert (made["evaluation"][:, 0] == 0).all()
    assert (made["recovery"] == 0).sum() <= stream.count(0)  # none was put in
    assert make(checkpoints["llama"], tmp_path / "plain", calibration=text_file)["record"]["bos_token_id"] is None


def test_without_files_the_model_writes_the_text(checkpoints, tmp_path):
    made = make(checkpoints["llama"], tmp_path / "out")
    again = make(checkpoints["llama"], tmp_path / "again")
    for name in ("calibration", "validation", "recovery", "evaluation"):
        assert np.array_equal(made[name], again[name])
    assert made["record"]["calibration"]["kind"] == made["record"]["evaluation"]["kind"] == "sampled from the dense model"
    assert made["evaluation"].shape == (6, 32) and len(made["recovery"]) >= 1024
    pieces = {tuple(window) for window in made["recovery"].reshape(-1, 32)}
    assert not pieces & {tuple(window) for window in np.concatenate([made["evaluation"], made["validation"]])}


def test_samples_are_as_likely_as_the_model_says(checkpoints):
    """Entropy and mean negative log-likelihood agree for text drawn at temperature 1; for any other text they do not."""
    model = load_model(checkpoints["llama"])
    rows = torch.from_numpy(sample_tokens(model, 48, 24, seed=3).astype(np.int64))
    reference = AutoModelForCausalLM.from_pretrained(checkpoints["llama"]).eval()
    with torch.no_grad():
        log = torch.log_softmax(reference(torch.cat([torch.zeros(48, 1, dtype=torch.long), rows], 1)).logits[:, :-1].double(), -1)
    likelihood = log.gather(-1, rows[..., None])[..., 0]  # [rows, length]
    entropy = -(log.exp() * log).sum(-1)
    surplus = (-likelihood - entropy).flatten()
    assert abs(surplus.mean()) < 4 * surplus.std() / len(surplus) ** 0.5
    other = rows[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    mismatch = (-log.gather(-1, other[..., None])[..., 0] - entropy).flatten()
    assert mismatch[48:].mean() > 4 * surplus.std() / len(surplus) ** 0.5


@pytest.mark.parametrize("key", ["calibration", "evaluation"])
@pytest.mark.parametrize(
    ("content", "said"), [(b"", "is empty"), (b" \n\n", "is empty"), (b"gr\xfc\xdf dich", "not UTF-8"), (None, "cannot be read")]
)
def test_broken_files_are_named(checkpoints, tmp_path, key, content, said):
    path = tmp_path / "broken.txt"
    if content is not None:
        path.write_bytes(content)
    message = refusal(checkpoints["llama"], tmp_path / "out", **{key: path})
    assert said in message and f"text.{key}" in message and "broken.txt" in message


@pytest.mark.parametrize("key", ["calibration", "evaluation"])
def test_short_text_tells_how_many_windows_it_yields(checkpoints, tmp_path, key, text_file):
    path = tmp_path / "short.txt"
    path.write_text(" ".join("abcdefgh"[index % 8] for index in range(150)))
    ids = len(tiny_tokenizer()(path.read_text()).input_ids)
    available = ids // 32 - (1 if key == "calibration" else 0)  # one window validates
    message = refusal(checkpoints["llama"], tmp_path / "out", **{key: path, f"{key}_windows": 40})
    assert f"{ids} tokens yield {available} windows" in message and f"text.{key}_windows={available}" in message
    other = {"evaluation" if key == "calibration" else "calibration": text_file}
    made = make(checkpoints["llama"], tmp_path / "followed", **{key: path, f"{key}_windows": available}, **other)
    assert len(made[key]) == available


def test_text_of_a_few_tokens(checkpoints, tmp_path):
    path = tmp_path / "tiny.txt"
    path.write_text("def")
    assert "yield 0 windows" in refusal(checkpoints["llama"], tmp_path / "out", evaluation=path)


def test_evaluating_on_the_calibration_text_is_refused(checkpoints, tmp_path, text_file):
    copy = tmp_path / "copy.txt"
    copy.write_bytes(text_file.read_bytes())
    for evaluation in (text_file, copy):
        out = tmp_path / f"out_{evaluation.stem}"
        assert "nothing was fitted to" in refusal(checkpoints["llama"], out, calibration=text_file, evaluation=evaluation)


def test_window_longer_than_the_context(checkpoints, tmp_path):
    assert "set text.window_tokens to 128" in refusal(checkpoints["gpt2"], tmp_path / "out", window_tokens=129)


def test_prompt_that_leaves_nothing_to_score(checkpoints, tmp_path):
    assert "text.prompt_tokens" in refusal(checkpoints["llama"], tmp_path / "out", prompt_tokens=32)
