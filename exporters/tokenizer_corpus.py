"""Texts that tell tokenizers apart: all planes of Unicode, marks, joiners, both directions, whitespace, code, digits."""

import random

ZERO_WIDTH_JOINER = "\u200d"
LONG_CHARACTERS = 100_000
SURROGATES = range(0xD800, 0xE000)

PLAIN = (
    "",
    " ",
    "a",
    "Hello, world!",
    "The quick brown fox jumps over the lazy dog.",
    "it's I'LL WE'VE y'all'd 's 'S ' s",
    "don\u2019t l\u2019\u00e9t\u00e9 \u02bcs \uff07s",
    "snake_case CamelCase kebab-case SCREAMING_CASE __dunder__",
    "https://example.org/a?b=c&d=%20#frag user@example.org C:\\path\\file",
    "~!@#$%^&*()_+`-={}|[]\\:\";'<>?,./",
)
WHITESPACE = (
    "  ",
    "   leading",
    "trailing   ",
    "a  b   c    d",
    "\t",
    "\t\tx\t \ty",
    "\n",
    "\n\n\n",
    "a\nb",
    "a\r\nb\r\n",
    "a\rb",
    " \n \n ",
    "a \n",
    "\n a",
    "x\u00a0y\u2003z\u3000w\u2028v\u2029u\u0085t",
    "a\u200bb\ufeffc\u2060d",
    "\x0b\x0c\x1c\x1d\x1e\x1f\x7f",
    "".join(chr(code) for code in range(1, 32)),
    " " * 1000,
    "\n" * 1000,
    "\t " * 500,
)
UNICODE = (
    "na\u00efve caf\u00e9 e\u0301 a\u0308o\u0308",
    "\u0301leading mark, z\u0351\u036b\u0343\u036a\u0302a\u0333l\u0332g\u0331o\u0330",
    "\u1e9e \u00df \u0130 \u0131 \ufb01 \ufb00 \u01c5 \u00b5",
    "\u05e9\u05dc\u05d5\u05dd \u05e2\u05d5\u05dc\u05dd \u0645\u0631\u062d\u0628\u0627 \u0628\u0643\u0645 \u202eabc\u202c",
    "\u0661\u0662\u0663 \u0967\u0968\u0969 \u00bd \u2167 \u00b2\u00b3 \u2460 \U0001d7d8\U0001d7d9",
    "\u65e5\u672c\u8a9e\u30c6\u30ad\u30b9\u30c8 \u4e2d\u6587\u6587\u672c \ud55c\uad6d\uc5b4 \u1112\u1161\u11ab",
    "\u0e20\u0e32\u0e29\u0e32\u0e44\u0e17\u0e22 \u0939\u093f\u0928\u094d\u0926\u0940 \u0ba4\u0bae\u0bbf\u0bb4\u0bcd",
    "\U0001f600 \U0001f469\U0001f3fd" + ZERO_WIDTH_JOINER + "\U0001f4bb " + "\U0001f1e9\U0001f1ea \u2764\ufe0f 1\ufe0f\u20e3",
    ZERO_WIDTH_JOINER.join("\U0001f468\U0001f469\U0001f467\U0001f466"),
    "\U00010348\U0001d11e\U00020000\U0002a6d6\U000e0001\U000e0100\U000f0000\U0010fffd\U0010ffff",
    "\ufffd\ufffe\uffff\ue000\uf8ff",
    "\u2200x\u2208\u211d: \u2308x\u2309 = \u2212\u230a\u2212x\u230b \u221a2 \u2260 \u221e",
)
CODE = (
    "def f(x):\n    return x ** 2  # comment\n",
    "class A:\n\tdef __init__(self):\n\t\tself.x = [1, 2, 3]\n\n\n        \n",
    "if (a<b&&c!=d){x+=1;}else{y--;}//\n",
    '{"key": [1, 2.5e-3, null], "s": "\\u00e9\\n"}',
    "<html><body class='x'>&nbsp;</body></html>",
    "0 1 12 123 1234 12345 1234567890 3.14159 1e10 0x1F 1_000_000 -42 +7",
    "2024-02-29T23:59:59Z 192.168.0.1 +1 (555) 010-9999",
    "x=1;y=22;z=333;" * 20,
)


def adversarial_corpus(special_tokens: list[str], random_documents: int, seed: int) -> list[str]:
    """Texts without NUL, the same for the same arguments. ``special_tokens`` are put inside, beside and into pieces."""
    documents = [*PLAIN, *WHITESPACE, *UNICODE, *CODE, *planes()]
    for token in special_tokens:
        documents += [token, f"a{token}b", f" {token} ", f"{token}{token}\n{token}", token[:-1], token[1:], token.upper()]
        documents += [f"if a {token[:end]}{tail}" for end in range(1, min(len(token), 4)) for tail in ("", "b", "\n", " b")]
    if special_tokens:
        documents += token_fragments(special_tokens, random_documents, seed)
    return documents + long_documents() + random_texts(random_documents, seed)


def nul_documents() -> list[str]:
    """Texts with NUL: the operator of onnxruntime-extensions reads C strings and stops there."""
    return ["\0", "a\0b", "\0a", "a\0", "line\n\0\nline"]


def planes() -> list[str]:
    """Every block of 256 code points that a text may hold, thinned to each 8th block above the basic plane."""
    starts = [*range(0x100, 0x10000, 0x100), *range(0x10000, 0x110000, 0x800)]
    return ["".join(map(chr, range(start, start + 256))) for start in starts if start not in SURROGATES]


def long_documents() -> list[str]:
    """Very long texts: words, code, and text without a single space."""
    words = "The price is 1,234.50 and it's \u00e9levated \U0001f600. "
    code = "for index in range(10):\n    total += values[index]\n\n"
    unbroken = "abcdefghijklmnopqrstuvwxyz"
    return [(text * (LONG_CHARACTERS // len(text) + 1))[:LONG_CHARACTERS] for text in (words, code)] + [unbroken * 80]


def random_texts(count: int, seed: int) -> list[str]:
    """Random code points: a third over all planes, a third of neighbours in one script, a third of mixed short pieces."""
    source = random.Random(seed)
    pieces = [*WHITESPACE[:18], *"aAzZ09.,;'\"", "'s", "'ll", " the", "\u00e9", "\U0001f600", "\u4e2d", "\u0301", "\u200d"]
    documents = []
    for index in range(count):
        length = source.randint(1, 80)
        if index % 3 == 0:
            documents.append("".join(random_character(source, 1, 0x10FFFF) for _ in range(length)))
        elif index % 3 == 1:
            start = source.randrange(1, 0x3000)
            documents.append("".join(random_character(source, start, start + 120) for _ in range(length)))
        else:
            documents.append("".join(source.choice(pieces) for _ in range(length)))
    return documents


def token_fragments(special_tokens: list[str], count: int, seed: int) -> list[str]:
    """Beginnings, ends and wholes of special tokens run together: matching by trie loses text after a half match."""
    source = random.Random(seed)
    documents = []
    for _ in range(count):
        pieces = []
        for _ in range(source.randint(1, 6)):
            token = source.choice(special_tokens)
            beginning, end = token[: source.randint(1, len(token))], token[source.randrange(len(token)) :]
            pieces.append(source.choice([token, beginning, beginning, end, " ", "a", "\n", "\u00e9", "def f"]))
        documents.append("".join(pieces))
    return documents


def random_character(source: random.Random, low: int, high: int) -> str:
    """One code point in ``low..high`` that UTF-8 can hold."""
    code = source.randint(low, high)
    return chr(code) if code not in SURROGATES else " "
