"""The tokenizer graphs: right on a byte-level BPE, refused with a reason on everything that they cannot do."""

import argparse
import json
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper
from onnxruntime_extensions import get_library_path
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from exporters import tokenizer_parity
from exporters.settings import TokenizerSettings
from exporters.tokenizer_corpus import adversarial_corpus, nul_documents
from exporters.tokenizer_graph import closing_token, decode_graph, encode_graph, run, token_bytes, unsupported
from exporters.tokenizer_parity import DECODE_FILE, ENCODE_FILE, Graphs, Request, check_parity
from models.errors import UserError

END = "<|endoftext|>"
SETTINGS = TokenizerSettings(random_documents=20)
QWEN_SPLIT = r"(?i:'s|'t)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


def byte_level(pre_tokenizer=None, special=(END,), vocab_size=4096) -> Tokenizer:
    """A byte-level BPE trained on a module of the standard library."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator([Path(argparse.__file__).read_text(encoding="utf-8")], trainer)
    return tokenizer


def write(folder: Path, tokenizer: Tokenizer, **config) -> Path:
    folder.mkdir(exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"bos_token": END, "eos_token": END, **config}))
    (folder / "config.json").write_text(json.dumps({"vocab_size": 4200}))
    return folder


@pytest.fixture
def text(tmp_path) -> Path:
    folder = tmp_path / "text"
    folder.mkdir()
    for name in ("calibration.npy", "evaluation.npy"):
        np.save(folder / name, np.random.default_rng(0).integers(1, 300, (3, 32), dtype=np.int32))
    return folder


def stage(folder: Path, text: Path, name: str = "out") -> tuple[Path, dict]:
    out = folder.parent / name
    out.mkdir()
    run(SETTINGS, out, checkpoint=folder, text=text)
    return out, json.loads((out / "tokenizer_graph.json").read_text(encoding="utf-8"))


def graphs_of(folder: Path, tokenizer: Tokenizer) -> Graphs:
    """Graphs built without the stage's gate."""
    write(folder, tokenizer)
    definition = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))
    encode_graph(definition, {"tokenizer_class": "GPT2Tokenizer"}, folder / ENCODE_FILE)
    decode_graph(token_bytes(tokenizer, 0), folder / DECODE_FILE)
    return Graphs(folder, folder / "progress", get_library_path())


def test_byte_level_bpe_ships_both_graphs(tmp_path, text):
    out, found = stage(write(tmp_path / "checkpoint", byte_level(), tokenizer_class="TokenizersBackend"), text)
    assert found["parity"] and found["mismatches"] == 0 and found["reason"] is None
    assert found["documents"] > 1000
    assert found["limits"] and found["tried"][found["tokenizer_class"]]["nul_mismatches"] == len(nul_documents())
    graphs = Graphs(out, tmp_path / "progress", get_library_path())
    assert graphs.decode(graphs.encode("def f(x):\n    return 'é😀'")) == "def f(x):\n    return 'é😀'"
    assert graphs.decode([]) == "" and graphs.encode("") == []
    assert graphs.decode([4199]) == ""  # a padded row of the head has no text


def test_same_input_same_bytes(tmp_path, text):
    checkpoint = write(tmp_path / "checkpoint", byte_level(vocab_size=400), tokenizer_class="GPT2Tokenizer")
    first, second = (stage(checkpoint, text, name)[0] for name in ("first", "second"))
    for path in first.iterdir():
        assert path.read_bytes() == (second / path.name).read_bytes(), path.name


def test_tokens_around_every_text_are_added(tmp_path, text):
    tokenizer = byte_level(vocab_size=400)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{END} $A {END}", special_tokens=[(END, 0)])
    out, found = stage(write(tmp_path / "checkpoint", tokenizer, tokenizer_class="GPT2Tokenizer"), text)
    assert found["parity"], found["reason"]
    assert Graphs(out, tmp_path / "progress", get_library_path()).encode("a")[0::2] == [0, 0]


def test_text_after_half_a_special_token_is_kept(tmp_path):
    graphs = graphs_of(tmp_path / "model", byte_level(vocab_size=400))
    for document in ("if a <b", "<<", "a <|endo", "<|endoftext|", "a\n<|"):
        assert graphs.encode_mismatch(document) is None


def test_split_that_the_operator_ignores_is_refused_with_an_example(tmp_path, text):
    split = pre_tokenizers.Split(Regex(r"[a-c]"), "isolated")  # the operator has no such pattern
    pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    out, found = stage(write(tmp_path / "checkpoint", byte_level(pre_tokenizer), tokenizer_class="GPT2Tokenizer"), text)
    assert not found["parity"] and found["mismatches"] > 0
    assert found["example"]["graph"] != found["example"]["original"]
    assert "differ" in found["reason"] and len(found["tried"]) == 5
    first, *others = found["tried"].values()  # only the first had to go through everything
    assert first["documents"] > 1000 and all(0 < other["documents"] <= 80 for other in others)
    assert found["mismatches"] == first["encode_mismatches"] + first["decode_mismatches"]
    assert not (out / ENCODE_FILE).exists() and not (out / DECODE_FILE).exists()
    assert (out / "tokenizer.json").exists()


def test_other_kinds_are_refused_by_name():
    assert "WordPiece" in unsupported({"model": {"type": "WordPiece"}, "decoder": {"type": "WordPiece"}})
    assert "Metaspace" in unsupported({"model": {"type": "BPE"}, "decoder": {"type": "Metaspace"}})
    assert unsupported({"model": {"type": "BPE"}, "decoder": {"type": "ByteLevel"}}) is None


def test_missing_tokenizer_is_the_users_mistake(tmp_path, text):
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no tokenizer.json"):
        stage(tmp_path / "empty", text)


def test_added_token_outside_the_alphabet_keeps_its_text(tmp_path):
    tokenizer = byte_level(vocab_size=400, special=(END, "<new line>\n"))
    graphs = graphs_of(tmp_path / "model", tokenizer)
    ids = tokenizer.encode("a<new line>\nb").ids
    assert graphs.decode(ids) == tokenizer.decode(ids, skip_special_tokens=False) == "a<new line>\nb"


def test_half_a_character_is_bytes_not_an_error(tmp_path):
    graphs = graphs_of(tmp_path / "model", byte_level(vocab_size=300))
    halves = [graphs.decoder.run(None, {"ids": np.array([token])})[0].tobytes() for token in graphs.encode("é")]
    assert len(halves) == 2 and b"".join(halves).decode() == "é"


def test_native_crash_is_a_finding(tmp_path):
    """BpeDecoder divides by the number of ids, so no ids end the process: the parity check must survive that and say so."""
    graphs_of(tmp_path / "model", byte_level(vocab_size=300))
    node = helper.make_node("BpeDecoder", ["ids"], ["utf8"], domain="ai.onnx.contrib", id_vocab="a\nb", byte_decoder="97\t97")
    ids = helper.make_tensor_value_info("ids", onnx.TensorProto.INT64, ["tokens"])
    string = helper.make_tensor_value_info("utf8", onnx.TensorProto.STRING, None)
    model = helper.make_model(
        helper.make_graph([node], "crash", [ids], [string]),
        opset_imports=[helper.make_opsetid("", 17), helper.make_opsetid("ai.onnx.contrib", 1)],
        ir_version=8,
    )
    onnx.save(model, tmp_path / "model" / DECODE_FILE)
    parity = check_parity(tmp_path / "model", Request(get_library_path(), ["a"], [], [[]]))
    assert "died by signal SIG" in parity.reason and parity.mismatches > 0
    assert parity.example == {"step": "ids", "input": []}


def test_endless_graph_is_a_finding(tmp_path, monkeypatch):
    monkeypatch.setattr(tokenizer_parity, "SECONDS", 0.01)
    graphs_of(tmp_path / "model", byte_level(vocab_size=300))
    assert "took longer" in check_parity(tmp_path / "model", Request(get_library_path(), ["a"], [], [[]])).reason


def test_corpus_holds_what_tells_tokenizers_apart():
    corpus = adversarial_corpus([END], 30, seed=0)
    assert corpus == adversarial_corpus([END], 30, seed=0) != adversarial_corpus([END], 30, seed=1)
    assert "" in corpus and max(map(len, corpus)) == 100_000
    assert {ord(letter) >> 16 for text in corpus for letter in text} == set(range(17))
    assert not any("\0" in text for text in corpus)
    for text in corpus:
        text.encode("utf-8")


def test_closing_token_must_stand_alone():
    token = {"content": END, "id": 0, "special": True, "lstrip": False, "single_word": False}
    assert closing_token({"added_tokens": [{**token, "lstrip": True}, token]}) == token
    assert closing_token({"added_tokens": []}) is None
