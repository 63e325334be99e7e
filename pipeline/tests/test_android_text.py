"""The Kotlin library's text: tokenizer, characters, stop texts, JSON, held against Python's."""

import json
import random
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from exporters.tokenizer_corpus import adversarial_corpus, nul_documents
from pipeline.tests.test_text_rules import TOKENIZERS
from pipeline.text_pieces import StopAt
from pipeline.text_rules import text_rules_json

pytest_plugins = ["pipeline.tests.kotlin_fixtures"]

SLOW = settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request, tmp_path_factory):
    return saved(request.param, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def composing(tmp_path_factory):
    return saved("Qwen", tmp_path_factory.mktemp("tokenizer"))


def saved(name: str, folder: Path):
    """A tokenizer, and its two files as the library reads them."""
    made = TOKENIZERS[name]()
    made.save(str(folder / "tokenizer.json"))
    (folder / "text_rules.json").write_text(text_rules_json(made.to_str()), encoding="utf-8")
    return made, {"tokenizer": str(folder / "tokenizer.json"), "rules": str(folder / "text_rules.json")}


def test_ids_of_the_whole_corpus_are_the_tokenizers(onnx_library, tokenizer):
    original, files = tokenizer
    added = [token.content for token in original.get_added_tokens_decoder().values()]
    documents = adversarial_corpus(added, random_documents=300, seed=5) + nul_documents()
    documents += [f"it'{chr(code)} I'{chr(code)}l" for code in (*range(0x41, 0x7B), 0x17F, 0x212A, 0xFB06)]  # letters that fold
    found = onnx_library.ask("encode", documents=documents, **files)
    wrong = [
        (text[:60], ids[:20], original.encode(text).ids[:20])
        for text, ids in zip(documents, found, strict=True)
        if ids != original.encode(text).ids
    ]
    assert not wrong, f"{len(wrong)} of {len(documents)}: {wrong[0]}"


MARKED = st.text(
    st.sampled_from("aeo\u00e9\u0300\u0301\u0327\u0345\u0338\u0344\u0958\u0930\u093c\u09c7\u09be\u1100\u1161\u11a8\uac00\u212b\u2126\ufb1d")
    | st.sampled_from(
        "\u0e38\u0e48\u0eb8\u0eba\u0ebb\u05b0\u05bc\u3099\u304b\u0f71\u0f72\u0f80\U0001d15e\U0001d165\U000110ba\U00011099\U0001163f"
    )
    | st.characters(exclude_categories=["Cs"]),
    max_size=12,
)


@SLOW
@given(text=MARKED)
def test_normal_form_is_the_librarys(onnx_library, composing, text):
    made, files = composing
    ids = onnx_library.ask("encode", documents=[text], **files)[0]
    assert ids == made.encode(text).ids, [f"U+{ord(character):04X}" for character in text]


def test_text_of_ids_is_the_tokenizers(onnx_library, tokenizer):
    original, files = tokenizer
    source = random.Random(3)
    size = original.get_vocab_size()
    sequences = [[], *([index] for index in range(size)), *(source.choices(range(size), k=40) for _ in range(200)), [size + 5]]
    found = onnx_library.ask("decode", sequences=sequences, **files)
    assert found == [original.decode(ids, skip_special_tokens=False) for ids in sequences]


PIECES = [
    *b"aZ \n",
    *(0xC3, 0xA9, 0xE2, 0x82, 0xAC, 0xF0, 0x9F, 0x98, 0x80, 0x80, 0xBF, 0xC0, 0xE0, 0xA0, 0xED, 0x9F, 0xF4, 0x8F, 0x90, 0xF5, 0xFF),
]


@SLOW
@given(chunks=st.lists(st.lists(st.sampled_from(PIECES) | st.integers(0, 255), max_size=6), max_size=8))
def test_bytes_become_characters_as_in_python(onnx_library, chunks):
    pieces = onnx_library.ask("utf8", streams=[chunks])[0]
    assert "".join(pieces) == bytes(byte for chunk in chunks for byte in chunk).decode("utf-8", errors="replace")


@SLOW
@given(stops=st.lists(st.text("abc\n", min_size=1, max_size=4), max_size=3), pieces=st.lists(st.text("abc\n", max_size=5), max_size=8))
def test_stop_texts_hold_back_what_pythons_do(onnx_library, stops, pieces):
    answer = onnx_library.ask("stop", cases=[{"stops": stops, "pieces": pieces}])[0]
    ours = StopAt(tuple(stops))
    assert answer["pieces"] == [ours.push(piece) for piece in pieces] and answer["stopped"] == (ours.found is not None)
    assert answer["stopped"] or answer["rest"] == ours.finish()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


@SLOW
@given(value=VALUES, as_ascii=st.booleans(), indent=st.sampled_from([None, 1]))
def test_json_is_read_as_in_python(onnx_library, value, as_ascii, indent):
    text = json.dumps(value, ensure_ascii=as_ascii, indent=indent)
    assert onnx_library.ask("json", texts=[text]) == [{"value": value}]


def test_what_is_no_json_is_refused(onnx_library):
    texts = [
        "",
        "{",
        "[1,]",
        '{"a" 1}',
        "01",
        "1.",
        "+1",
        "nul",
        '"a',
        '"\\x"',
        '"\\u12G4"',
        '"\x01"',
        "[1] 2",
        "[" * 300,
        "1e",
        "\u0661",
        "'a'",
    ]
    found = onnx_library.ask("json", texts=texts)
    assert all("no JSON at character" in answer.get("refused", "") for answer in found), list(zip(texts, found, strict=True))
