"""What a Hugging Face ``tokenizer.json`` says, for whoever does its work with other code."""

import json

from tokenizers import Tokenizer


def fixed_special_ids(definition: dict) -> tuple[list[int], list[int]]:
    """The ids that the tokenizer puts before and after every text, found by encoding one letter with and without them."""
    original = Tokenizer.from_str(json.dumps(definition))
    bare, whole = (original.encode("a", add_special_tokens=added).ids for added in (False, True))
    start = next((place for place in range(len(whole)) if whole[place : place + len(bare)] == bare), 0)
    return whole[:start], whole[start + len(bare) :]


def bytes_of_symbols() -> dict[str, int]:
    """The byte behind each printable symbol of byte-level BPE (GPT-2: printable bytes stand for themselves)."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {**{chr(byte): byte for byte in printable}, **{chr(256 + place): byte for place, byte in enumerate(others)}}
