"""The signatures of a TFLite file: ``decode``, and ``prefill_N`` for each number N of tokens that a call of a prompt may have."""

import mmap
import re
import shutil
import struct
from collections.abc import Iterable
from pathlib import Path

from ai_edge_litert import schema_py_generated as schema

DECODE = "decode"
USUAL_TOKENS = 64
SUBGRAPHS, SIGNATURES, SUBGRAPH_INDEX = 8, 18, 12  # places in the tables Model, Model and SignatureDef of schema.fbs, as vtables count


def prefill_name(tokens: int) -> str:
    """The signature that takes so many tokens at once, as LiteRT-LM calls it."""
    return f"prefill_{tokens}"


def prefill_tokens(signature: str) -> int | None:
    """How many tokens a signature of that name takes at once; None for one that takes no prompt."""
    found = re.fullmatch(r"prefill_(\d+)", signature)
    return int(found[1]) if found else None


def usual_prefill(signatures: Iterable[str]) -> str:
    """The one that prompts of usual length go through: the longest up to 64 tokens, else the shortest."""
    sizes = sorted(size for size in map(prefill_tokens, signatures) if size)
    return prefill_name(max((size for size in sizes if size <= USUAL_TOKENS), default=sizes[0]))


def decode_first(model: schema.ModelT) -> None:
    """Put the subgraph and the signature of decoding before the others, whatever order the converter chose."""
    signatures = sorted(model.signatureDefs, key=lambda signature: signature.signatureKey.decode() != DECODE)
    model.subgraphs = [model.subgraphs[signature.subgraphIndex] for signature in signatures]
    for index, signature in enumerate(signatures):
        signature.subgraphIndex = index
    model.signatureDefs = signatures


def signatures_of(path: Path) -> list[str]:
    """Names in the order of the file."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        model = schema.Model.GetRootAs(data, 0)
        return [model.SignatureDefs(index).SignatureKey().decode() for index in range(model.SignatureDefsLength())]


def copy_with(path: Path, names: tuple[str, ...], out: Path) -> Path:
    """Write the file with these signatures alone: a runtime packs the weights anew for each that it finds.

    The copy's lists are shortened in place, since reading a large file as objects takes several times its size. ``decode`` has to
    be among ``names``: its subgraph is the first, a number that the file leaves out.
    """
    shutil.copyfile(path, out)
    with out.open("r+b") as file, mmap.mmap(file.fileno(), 0) as data:
        model = schema.Model.GetRootAs(data, 0)
        found = [model.SignatureDefs(index) for index in range(model.SignatureDefsLength())]
        kept = sorted((one for one in found if one.SignatureKey().decode() in names), key=lambda one: one.SubgraphIndex())
        subgraphs = [model.Subgraphs(signature.SubgraphIndex())._tab.Pos for signature in kept]
        for number, signature in enumerate(kept):
            place = signature._tab.Offset(SUBGRAPH_INDEX)
            if place:
                struct.pack_into("<I", data, signature._tab.Pos + place, number)
            elif number:
                raise ValueError(f"{path}: signature {names} cannot be renumbered")
        keep_elements(data, model, SIGNATURES, [signature._tab.Pos for signature in kept])
        keep_elements(data, model, SUBGRAPHS, subgraphs)
    return out


def keep_elements(data: mmap.mmap, model: schema.Model, field: int, places: list[int]) -> None:
    """Let a vector of tables hold those at ``places`` alone: references are relative to where they stand."""
    start = model._tab.Vector(model._tab.Offset(field))
    for number, place in enumerate(places):
        slot = start + 4 * number
        struct.pack_into("<I", data, slot, place - slot)
    struct.pack_into("<I", data, start - 4, len(places))
