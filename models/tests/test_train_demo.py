"""The demo's tokenizer, schedule and training, on a model small enough to train in a second."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer

from models import demo_card
from models.demo_data import PackedTokens, pack
from models.demo_export import export_model, perplexity, sample
from models.demo_log import LogRow, append_row, plot_losses, read_log, write_log
from models.demo_tokenizer import END_OF_TEXT, END_OF_TEXT_ID, save_tokenizer, train_tokenizer
from models.demo_training import Schedule, Training

TEXT = "def area(width, height):\n    return width * height\n\n\nclass Box:\n    pass\n"
VOCABULARY = 300
CONTEXT = 32
TINY = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "intermediate_size": 64,
    "max_position_embeddings": CONTEXT,
    "tie_word_embeddings": True,
}
TOKENIZER = train_tokenizer([TEXT * 20], VOCABULARY)


def training(steps: int = 12) -> Training:
    return Training(TINY, Schedule(steps, batch_blocks=4, warmup_steps=2), seed=1)


@pytest.fixture
def data(tmp_path) -> PackedTokens:
    pack([f"{TEXT}number = {n}\n" for n in range(200)], TOKENIZER, tmp_path / "train.npy", seed=3)
    return PackedTokens(tmp_path / "train.npy", CONTEXT, seed=3)


@given(st.text())
def test_any_text_survives_the_tokenizer(text):
    if END_OF_TEXT not in text:
        assert TOKENIZER.decode(TOKENIZER.encode(text).ids) == text


def test_the_saved_tokenizer_is_the_same_tokenizer(tmp_path):
    save_tokenizer(TOKENIZER, tmp_path, CONTEXT)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    text = f"{TEXT}\n\t  print('é 漢字 🎉')   \n\n"
    assert tokenizer(text).input_ids == TOKENIZER.encode(text).ids
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer(END_OF_TEXT).input_ids == [END_OF_TEXT_ID]
    assert {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id} == {END_OF_TEXT_ID}
    assert len(tokenizer) == TOKENIZER.get_vocab_size()


def test_the_schedule_warms_up_holds_and_decays_to_zero():
    schedule = Schedule(steps=200, warmup_steps=10, decay_share=0.25, whole_share=0.1)
    assert [schedule.lr_factor(step) for step in (0, 4, 9, 10, 149, 150)] == pytest.approx([0.1, 0.5, 1, 1, 1, 1])
    assert [schedule.lr_factor(step) for step in (175, 199, 200)] == pytest.approx([0.5, 0.02, 0])
    assert [schedule.pieces(step) for step in (0, 179, 180, 199)] == [2, 2, 1, 1]


def test_a_longer_run_starts_just_as_a_shorter_one():
    short, long = Schedule(steps=400), Schedule(steps=1000)
    assert [short.lr_factor(step) for step in range(220)] == [long.lr_factor(step) for step in range(220)]


def test_packing_keeps_every_token_and_ends_each_document(tmp_path):
    texts = ["a = 1\n", "b = 2\n", "c = 3\n"]
    count = pack(texts, TOKENIZER, tmp_path / "tokens.npy", seed=0)
    stream = np.load(tmp_path / "tokens.npy")
    documents = TOKENIZER.decode(stream.tolist(), skip_special_tokens=False).split(END_OF_TEXT)
    assert len(stream) == count
    assert sorted(documents) == ["", *texts]
    assert stream[-1] == END_OF_TEXT_ID


def test_an_epoch_shows_each_block_once_and_the_next_in_another_order(data):
    total = len(data.blocks)
    first = torch.cat([data.batch(step, 1) for step in range(total)])
    second = torch.cat([data.batch(step, 1) for step in range(total, 2 * total)])
    assert not torch.equal(first, second)
    assert sorted(first.tolist()) == sorted(second.tolist()) == sorted(data.blocks.tolist())


def test_training_reduces_the_loss(data):
    run = training(steps=40)
    losses = [run.learn(data.batch(step, 4)) for step in range(40)]
    assert losses[0] == pytest.approx(np.log(VOCABULARY), rel=0.05)
    assert losses[-1] < 0.7 * losses[0]


def test_a_resumed_run_ends_where_an_unbroken_one_does(data, tmp_path):
    unbroken = training()
    expected = [unbroken.learn(data.batch(step, 4)) for step in range(12)]
    broken = training()
    begun = [broken.learn(data.batch(step, 4)) for step in range(5)]
    broken.save(tmp_path / "checkpoint.pt")
    resumed = training()
    resumed.load(tmp_path / "checkpoint.pt")
    assert resumed.step == 5
    ended = [resumed.learn(data.batch(resumed.step, 4)) for _ in range(7)]
    assert begun + ended == expected
    for name, weight in unbroken.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name
    assert [file.name for file in tmp_path.glob("checkpoint*")] == ["checkpoint.pt"]


def test_the_export_is_an_ordinary_folder_in_fp16_with_one_embedding(tmp_path):
    run = training()
    export_model(run.model, TOKENIZER, tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (tmp_path / "model.safetensors").stat().st_size < 2.2 * run.model.num_parameters()
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] == "float16"
    rows = torch.arange(24).reshape(1, 24)
    with torch.inference_mode():
        torch.testing.assert_close(model(rows).logits, run.model(rows).logits, atol=5e-3, rtol=0)


def test_perplexity_of_an_untrained_model_is_near_the_vocabulary():
    measured = perplexity(training().model, TOKENIZER, TEXT * 50, CONTEXT)
    assert measured.perplexity == pytest.approx(VOCABULARY, rel=0.1)
    assert measured.tokens == measured.windows * (CONTEXT - 1)
    tokens_per_byte = len(TOKENIZER.encode(TEXT * 50).ids) / len(TEXT * 50)
    assert measured.bits_per_byte == pytest.approx(measured.nats_per_token / np.log(2) * tokens_per_byte, rel=0.02)


def test_greedy_text_is_the_same_each_time_and_leaves_the_prompt_out():
    model = training().model
    first, second = (sample(model, TOKENIZER, "def ", 8, temperature=0.0) for _ in range(2))
    assert first == second
    assert not first.startswith("def ")


def test_the_log_reads_back_as_it_was_written(tmp_path):
    rows = [LogRow(10, 1000, 1.5, 0.5, 5.25), LogRow(20, 2000, 3.0, 1.0, 4.5, 4.75)]
    write_log(tmp_path / "log.csv", rows[:1])
    append_row(tmp_path / "log.csv", rows[1])
    assert read_log(tmp_path / "log.csv") == rows
    plot_losses(rows, tmp_path / "loss.png")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_card_holds_the_numbers_that_were_measured(tmp_path, monkeypatch):
    monkeypatch.setattr(demo_card, "SAMPLE_TOKENS", 4)
    model = training().model
    export_model(model, TOKENIZER, tmp_path)
    write_log(tmp_path / "training" / "log.csv", [LogRow(10, 1000, 2.0, 0.5, 5.25, 5.125)])
    quality = perplexity(model, TOKENIZER, TEXT * 20, CONTEXT)
    corpus = {"train_files": 7, "train_tokens": 500, "packages": [["click", "8.0", "BSD-3-Clause", 2_000_000]]}
    demo_card.write_card(tmp_path, model, TOKENIZER, corpus, quality)
    card = (tmp_path / "README.md").read_text("utf-8")
    assert f"**{quality.perplexity:.3f}**" in card
    assert "1,000 tokens (2.00 epochs)" in card
    assert "| click | 8.0 | BSD-3-Clause | 2.00 |" in card
    assert json.loads((tmp_path / "training" / "evaluation.json").read_text())["validation_loss"] == 5.125
