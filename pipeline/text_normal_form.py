"""Unicode's normal form C as the tokenizers library computes it, as tables: it knows another version of Unicode than a phone does.

Which characters the library knows is asked of it; what they are comes from Python's own table, because what an assigned character
decomposes into, and its combining class, never change (Unicode's stability policy).
"""

import unicodedata
from functools import cache

from tokenizers import normalizers

CODE_POINTS = 0x110000
SURROGATES = range(0xD800, 0xE000)
HANGUL = range(0xAC00, 0xD7A4)  # composed by arithmetic, not by table
LAST_MARK, EARLIER_MARK = "\u0345", "\u0300"  # combining classes 240, the highest, and 230


@cache
def tables() -> dict[str, list[int]]:
    """Flat lists: ``marks`` are code and combining class, ``pairs`` are code, first and second of what composes, ``apart`` what does not.

    A second of 0: one character stands for another. The order is that of the codes.
    """
    known = known_decompositions()
    composes = [(code, *parts) for code, parts in known.items() if len(parts) == 2 and composed("".join(map(chr, parts))) == chr(code)]
    alone = {code for code, _, _ in composes}
    apart = [(code, *parts, *[0] * (2 - len(parts))) for code, parts in known.items() if code not in alone]
    marks = [(code, unicodedata.combining(chr(code))) for code in code_points() if is_mark(chr(code))]
    return {name: [value for row in rows for value in row] for name, rows in {"marks": marks, "pairs": composes, "apart": apart}.items()}


def known_decompositions() -> dict[int, list[int]]:
    """By code, the one or two characters that it stands for, where the library takes it apart."""
    found = {}
    for code in code_points():
        written = unicodedata.decomposition(chr(code))
        if written and not written.startswith("<") and code not in HANGUL and normalizers.NFD().normalize_str(chr(code)) != chr(code):
            found[code] = [int(part, 16) for part in written.split()]
    return found


def is_mark(character: str) -> bool:
    """Whether the library moves it before a mark of a higher class (or, as the highest, behind a lower one)."""
    kind = unicodedata.combining(character)
    if kind == 0:
        return False
    first, second = (character, EARLIER_MARK) if character == LAST_MARK else (LAST_MARK, character)
    return normalizers.NFD().normalize_str(f"a{first}{second}") != f"a{first}{second}"


def composed(text: str) -> str:
    return normalizers.NFC().normalize_str(text)


def code_points():
    return (code for code in range(CODE_POINTS) if code not in SURROGATES)
