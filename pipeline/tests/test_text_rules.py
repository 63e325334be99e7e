"""What is written down for the Kotlin tokenizer, and which tokenizers it would get wrong."""

import json

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from conftest import tiny_text, tiny_tokenizer
from pipeline.text_rules import CL100K, CODE_POINTS, KNOWN_SPLITS, UnsupportedTokenizer, runs, text_rules_json

QWEN, LLAMA = KNOWN_SPLITS
SCRIPTS = "na\u00efve caf\u00e9 \u0939\u093f\u0928\u094d\u0926\u0940 \u65e5\u672c\u8a9e 1234 12,345.67 it's I'LL we'Ve\r\n\r\n  x\t\ty "
SCRIPTS += "\U0001f600 "


def byte_level(**options) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(add_prefix_space=False, **options)


def trained(pre_tokenizer, normalizer=None, specials=("<|endoftext|>", "<|im_start|>"), ignore_merges=False) -> Tokenizer:
    """A byte-level BPE of some hundred tokens over code and several scripts."""
    tokenizer = Tokenizer(models.BPE(ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizer, decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=list(specials), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([tiny_text(), SCRIPTS * 50], trainer)
    return tokenizer


def with_start(tokenizer: Tokenizer) -> Tokenizer:
    """As Llama 3: a token before every text, and one that is no special token but added."""
    tokenizer.add_tokens(["<tool>", "<tool_call>"])
    token, index = "<|endoftext|>", tokenizer.token_to_id("<|endoftext|>")
    template = processors.TemplateProcessing(single=f"{token} $A", pair=f"{token} $A $B", special_tokens=[(token, index)])
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=False), template])
    return tokenizer


def split_first(pattern: str):
    return pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(pattern), "isolated"), byte_level(use_regex=False)])


TOKENIZERS = {
    "GPT-2": lambda: trained(byte_level()),
    "SmolLM": lambda: trained(pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level()])),
    "Qwen": lambda: trained(split_first(QWEN), normalizers.NFC()),
    "Llama 3": lambda: with_start(trained(split_first(LLAMA), ignore_merges=True)),
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_rules_of_known_tokenizers(name):
    rules = json.loads(text_rules_json(TOKENIZERS[name]().to_str()))
    wanted = {
        "GPT-2": ("gpt2", 0, False, False, False),
        "SmolLM": ("gpt2", 0, True, False, False),
        "Qwen": ("cl100k", 1, False, True, False),
        "Llama 3": ("cl100k", 3, False, False, True),
    }[name]
    assert tuple(rules[key] for key in ("split", "max_digits", "digits_alone", "nfc", "ignore_merges")) == wanted
    assert rules["before"] == ([0] if name == "Llama 3" else []) and rules["after"] == []


def test_classes_are_those_of_the_library():
    rules = json.loads(text_rules_json(tiny_tokenizer().backend_tokenizer.to_str()))
    for name, pattern in (("letters", r"\p{L}"), ("numbers", r"\p{N}"), ("spaces", r"\s")):
        belongs, code = [], 0
        for place, length in enumerate(rules[name]):
            belongs += [place % 2 == 1] * length
            code += length
        belongs += [False] * (CODE_POINTS - code)
        split = pre_tokenizers.Split(Regex(pattern), "removed")
        asked = [*range(0x3000), *range(0xFE00, 0x10200), *range(0x1D7C0, 0x1D800), 0x323AF, 0x10FFFF]
        for code in asked:
            assert belongs[code] == (split.pre_tokenize_str(chr(code)) == []), f"{name}: U+{code:04X}"


def test_runs():
    assert runs([]) == [] and runs([(0, 2), (5, 6)]) == [0, 2, 3, 1]


def changed(change) -> str:
    definition = json.loads(tiny_tokenizer().backend_tokenizer.to_str())
    change(definition)
    return json.dumps(definition)


BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}
UNKNOWN_SPLIT = {"type": "Split", "pattern": {"Regex": r"\p{L}+"}, "behavior": "Isolated", "invert": False}
MERGED_SPLIT = {"type": "Split", "pattern": {"Regex": CL100K % ""}, "behavior": "MergedWithNext", "invert": False}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda d: d["model"].update(type="Unigram"), "it is Unigram with decoder ByteLevel"),
        (lambda d: d["model"].update(dropout=0.1), "its dropout is 0.1"),
        (lambda d: d["model"].update(byte_fallback=True), "its byte_fallback is True"),
        (lambda d: d["model"]["vocab"].pop("a"), "1 of the 256 bytes have no token"),
        (lambda d: d["pre_tokenizer"].update(add_prefix_space=True), "puts a blank before every text"),
        (lambda d: d["pre_tokenizer"].update(use_regex=False), "its way of cutting text is not known here (none)"),
        (lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [UNKNOWN_SPLIT, BYTES]}), "not known here (Split)"),
        (lambda d: d.update(pre_tokenizer={"type": "Sequence", "pretokenizers": [MERGED_SPLIT, BYTES]}), "not known here (Split)"),
        (lambda d: d.update(pre_tokenizer=None), "does not cut bytes as GPT-2 does"),
        (lambda d: d.update(normalizer={"type": "NFKC"}), "its normaliser is NFKC"),
        (lambda d: d["added_tokens"][0].update(lstrip=True), "added token <|endoftext|> takes blanks along"),
        (lambda d: d["added_tokens"][0].update(single_word=True), "must be a word"),
    ],
)
def test_a_tokenizer_that_would_be_cut_otherwise_is_named(change, reason):
    with pytest.raises(UnsupportedTokenizer) as caught:
        text_rules_json(changed(change))
    assert reason in str(caught.value)
