"""How a byte-level BPE tokenizer cuts text, written down for the Kotlin tokenizer, or why it cannot be.

The classes of code points are asked of the tokenizers library itself, so that a phone cuts as the training did, whatever version of
Unicode its Android has.
"""

import json
from functools import cache

from tokenizers import Regex, pre_tokenizers

from exporters.tokenizer_definition import bytes_of_symbols, fixed_special_ids
from pipeline.text_normal_form import tables as normal_form_tables

CODE_POINTS = 0x110000
SURROGATES = range(0xD800, 0xE000)  # no text holds them
# cl100k's way of cutting, with digits in runs of up to so many: Qwen 2 and 3, Llama 3
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
KNOWN_SPLITS = {CL100K % "": 1, CL100K % "{1,3}": 3}


class UnsupportedTokenizer(Exception):
    """The Kotlin tokenizer does not know this one; the message says what it does not know."""


def text_rules_json(tokenizer_json: str) -> str:
    """``text_rules.json`` for a ``tokenizer.json``. UnsupportedTokenizer where the Kotlin tokenizer would cut or join otherwise."""
    definition = json.loads(tokenizer_json)
    split = split_of(definition)
    check_model(definition)
    check_added_tokens(definition)
    before, after = fixed_special_ids(definition)
    rules = {
        "format_version": 1,
        **split,
        "nfc": is_nfc(definition),
        "ignore_merges": bool(definition["model"].get("ignore_merges")),
        "before": before,
        "after": after,
        **classes(),
        **(normal_form_tables() if is_nfc(definition) else {}),
    }
    return json.dumps(rules, separators=(",", ":")) + "\n"


@cache
def classes() -> dict[str, list[int]]:
    """The library's classes of code points, as ``runs``."""
    found = {"letters": matching(r"\p{L}"), "numbers": matching(r"\p{N}"), "spaces": matching(r"\s"), "digits": digits()}
    return {name: runs(ranges) for name, ranges in found.items()}


def split_of(definition: dict) -> dict:
    """Which regular expression cuts, and what it is told."""
    steps = definition.get("pre_tokenizer") or {}
    steps = steps["pretokenizers"] if steps.get("type") == "Sequence" else [steps]
    *first, last = [dict(step) for step in steps] or [{}]
    if last.get("type") != "ByteLevel" or last.get("add_prefix_space"):
        raise UnsupportedTokenizer("it does not cut bytes as GPT-2 does, or puts a blank before every text")
    by_regex = last.get("use_regex", True)
    if not first and by_regex:
        return {"split": "gpt2", "max_digits": 0, "digits_alone": False}
    if first == [{"type": "Digits", "individual_digits": True}] and by_regex:
        return {"split": "gpt2", "max_digits": 0, "digits_alone": True}
    if len(first) == 1 and first[0].get("type") == "Split" and not by_regex:
        cut = first[0]
        digits_together = KNOWN_SPLITS.get(cut["pattern"].get("Regex"))
        if digits_together and cut["behavior"] == "Isolated" and not cut["invert"]:
            return {"split": "cl100k", "max_digits": digits_together, "digits_alone": False}
    raise UnsupportedTokenizer(
        f"its way of cutting text is not known here ({', '.join(step.get('type', '?') for step in first) or 'none'})"
    )


def check_model(definition: dict) -> None:
    """UnsupportedTokenizer unless it is plain byte-level BPE."""
    model, decoder = definition.get("model") or {}, definition.get("decoder") or {}
    if model.get("type") != "BPE" or decoder.get("type") != "ByteLevel":
        raise UnsupportedTokenizer(f"it is {model.get('type')} with decoder {decoder.get('type')}, not byte-level BPE")
    for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback"):
        if model.get(name):
            raise UnsupportedTokenizer(f"its {name} is {model[name]}")
    missing = [symbol for symbol in bytes_of_symbols() if symbol not in model["vocab"]]
    if missing:
        raise UnsupportedTokenizer(f"{len(missing)} of the 256 bytes have no token")


def check_added_tokens(definition: dict) -> None:
    """UnsupportedTokenizer where an added token takes blanks along or wants to be a word."""
    for token in definition.get("added_tokens") or []:
        if token["lstrip"] or token["rstrip"] or token["single_word"]:
            raise UnsupportedTokenizer(f"its added token {token['content']} takes blanks along or must be a word")


def is_nfc(definition: dict) -> bool:
    """Whether texts are normalised. UnsupportedTokenizer for another normaliser than NFC."""
    kind = (definition.get("normalizer") or {}).get("type")
    if kind not in (None, "NFC"):
        raise UnsupportedTokenizer(f"its normaliser is {kind}")
    return kind == "NFC"


def all_code_points() -> str:
    """Every code point that a text can hold, in order."""
    return "".join(chr(code) for code in range(CODE_POINTS) if code not in SURROGATES)


def matching(pattern: str) -> list[tuple[int, int]]:
    """Ranges (begin, end) of code points that ``pattern`` matches in the library's regular expressions."""
    others = pre_tokenizers.Split(Regex(f"(?:{pattern})+"), "removed").pre_tokenize_str(all_code_points())
    begins = [0, *(code_at(end) for _, (_, end) in others)]
    ends = [*(code_at(start) for _, (start, _) in others), CODE_POINTS]
    return [(begin, end) for begin, end in zip(begins, ends, strict=True) if begin < end]


def digits() -> list[tuple[int, int]]:
    """Ranges of code points that the library's Digits takes: its pieces are digits and others in turn."""
    pieces = pre_tokenizers.Digits(individual_digits=False).pre_tokenize_str(all_code_points())
    return [(code_at(start), code_at(end)) for _, (start, end) in pieces[1::2]]


def code_at(place: int) -> int:
    """The code point at a place of ``all_code_points``, or where a range that ends there ends."""
    return place if place <= SURROGATES.start else place + len(SURROGATES)


def runs(ranges: list[tuple[int, int]]) -> list[int]:
    """How many code points lie before the first range, how many in it, how many up to the next, and so on."""
    found, last = [], 0
    for begin, end in ranges:
        found += [begin - last, end - begin]
        last = end
    return found
