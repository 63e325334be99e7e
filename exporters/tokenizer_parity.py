"""Holds the tokenizer graphs against the original tokenizer, document by document, in a process of its own.

The operators of onnxruntime-extensions can end the process (a segmentation fault is no exception), so the parent asks
here and reads a file back; the number of the document being tried stands in a second file for the case of a crash.

``python -m exporters.tokenizer_parity FOLDER REQUEST.json PROGRESS RESULT.json``
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnxruntime
from tokenizers import Tokenizer

ENCODE_FILE = "tokenizer_encode.onnx"
DECODE_FILE = "tokenizer_decode.onnx"
PROBE_DOCUMENTS = 40
SECONDS = 240  # for the whole corpus; a graph that needs longer is no use on a phone


@dataclass(frozen=True)
class Request:
    """What is tried: texts in both directions, texts with NUL that are only counted, ids that no text gives.

    ``library`` is the file with the operators; the package around it would import torch into every process that asks it.
    """

    library: str
    documents: list[str]
    nul_documents: list[str]
    id_sequences: list[list[int]]


@dataclass(frozen=True)
class Parity:
    """How often a graph and the original tokenizer disagreed. ``reason`` is None when they never did."""

    documents: int
    encode_mismatches: int
    decode_mismatches: int
    nul_mismatches: int
    example: dict | None
    reason: str | None
    wrong_documents: list[int]  # places of the first texts that came out wrong, so that the next graph can be tried on them

    @property
    def mismatches(self) -> int:
        return self.encode_mismatches + self.decode_mismatches


def check_parity(folder: Path, request: Request) -> Parity:
    """Compare the graphs in ``folder`` with its ``tokenizer.json`` in a fresh process; a crash there is a finding here."""
    with tempfile.TemporaryDirectory() as scratch:
        asked, progress, answer = (Path(scratch) / name for name in ("request.json", "progress", "result.json"))
        asked.write_text(json.dumps(asdict(request)), encoding="utf-8")
        command = [sys.executable, "-m", __spec__.name, *map(str, (folder.resolve(), asked, progress, answer))]
        root = Path(__file__).resolve().parent.parent
        try:
            child = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            return died(request, progress, f"took longer than {SECONDS} s")
        if answer.exists():
            return Parity(**json.loads(answer.read_text(encoding="utf-8")))
        if child.returncode < 0:
            return died(request, progress, f"died by signal {signal.Signals(-child.returncode).name}")
        return died(request, progress, (child.stderr.strip().splitlines() or ["ended without a word"])[-1])


def died(request: Request, progress: Path, reason: str) -> Parity:
    """The finding when the process gave no answer: everything from the document it stood at counts as wrong."""
    every = [*request.documents, *request.nul_documents]
    stage, index = progress.read_text().split() if progress.exists() else ("load", 0)
    index = int(index)
    subjects = {"encode": every, "ids": [*request.id_sequences, *request.documents], "load": [""]}  # texts go through both
    subject = subjects[stage][index]
    example = {"step": stage, "input": shortened(subject)}
    total = len(request.documents) + len(request.id_sequences)
    reason = f"the graph {reason} at {stage} {index}"
    return Parity(total, len(request.documents), len(request.id_sequences), 0, example, reason, [])


def shortened(value: str | list[int], limit: int = 60) -> str | list[int]:
    """An example small enough to read."""
    return value if len(value) <= limit else value[:limit]


def session(path: Path, library: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(library)
    options.log_severity_level = 4  # failures come back as exceptions; the log line would say them twice
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


class Graphs:
    """Both graphs of a folder beside the tokenizer that they must equal."""

    def __init__(self, folder: Path, progress: Path, library: str):
        self.original = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.original.no_truncation()
        self.original.no_padding()
        self.encoder, self.decoder = (session(folder / name, library) for name in (ENCODE_FILE, DECODE_FILE))
        self.progress = os.open(progress, os.O_WRONLY | os.O_CREAT)

    def note(self, stage: str, index: int) -> None:
        """Leave on disk what is being tried, in a fixed width, so that it can be overwritten in place."""
        os.pwrite(self.progress, f"{stage:8}{index:10}".encode(), 0)

    def encode(self, text: str) -> list[int] | str:
        """Ids ``[tokens]`` of the graph, or the operator's own words where it raised."""
        try:
            return self.encoder.run(None, {"text": np.array([text], dtype=object)})[0][0].tolist()
        except Exception as error:  # whatever a native operator throws is a mismatch, and its words are the example
            return f"raised: {error}"[:200]

    def decode(self, ids: list[int]) -> str:
        """Text of the graph; bytes that are no UTF-8 become U+FFFD as in the original."""
        try:
            return self.decoder.run(None, {"ids": np.array(ids, dtype=np.int64)})[0].tobytes().decode("utf-8", errors="replace")
        except Exception as error:
            return f"raised: {error}"[:200]

    def encode_mismatch(self, text: str) -> dict | None:
        expected = self.original.encode(text).ids
        got = self.encode(text)
        if got == expected:
            return None
        return {"step": "encode", **around(text, got, expected)}

    def decode_mismatch(self, ids: list[int]) -> dict | None:
        expected, got = self.original.decode(ids, skip_special_tokens=False), self.decode(ids)
        return None if got == expected else {"step": "decode", **around(ids, got, expected)}


def around(value: str | list[int], got: list[int] | str, expected: list[int] | str) -> dict:
    """Input and both answers, cut to the first place where the answers part."""
    shared = enumerate(zip(got, expected, strict=False))
    first = next((index for index, (left, right) in shared if left != right), min(len(got), len(expected)))
    start = max(0, first - 4)
    cut = got if isinstance(got, str) else got[start : first + 8]
    return {"input": shortened(value), "answers_from": start, "graph": cut, "original": expected[start : first + 8]}


def compare(folder: Path, request: Request, progress: Path) -> Parity:
    """Every text through both graphs, every id sequence through the decoder."""
    graphs = Graphs(folder, progress, request.library)
    encode_examples, nul_examples, decode_examples = [], [], []
    for index, text in enumerate([*request.documents, *request.nul_documents]):
        graphs.note("encode", index)
        examples = encode_examples if index < len(request.documents) else nul_examples
        examples.append(graphs.encode_mismatch(text))
    sequences = request.id_sequences + [graphs.original.encode(text).ids for text in request.documents]
    for index, ids in enumerate(sequences):
        graphs.note("ids", index)
        decode_examples.append(graphs.decode_mismatch(ids))
    wrong_encode, wrong_decode = ([example for example in found if example] for found in (encode_examples, decode_examples))
    reason = None
    if wrong_encode or wrong_decode:
        texts, ids = len(request.documents), len(sequences)
        reason = f"{len(wrong_encode)} of {texts} texts and {len(wrong_decode)} of {ids} id sequences differ"
    return Parity(
        documents=len(request.documents) + len(sequences),
        encode_mismatches=len(wrong_encode),
        decode_mismatches=len(wrong_decode),
        nul_mismatches=sum(example is not None for example in nul_examples),
        example=next(iter(wrong_encode + wrong_decode), None),
        reason=reason,
        wrong_documents=[index for index, example in enumerate(encode_examples) if example][:PROBE_DOCUMENTS],
    )


def main(folder: str, request: str, progress: str, result: str) -> None:
    """The child process: compare, then leave the answer as JSON in one piece."""
    asked = Request(**json.loads(Path(request).read_text(encoding="utf-8")))
    found = json.dumps(asdict(compare(Path(folder), asked, Path(progress))))
    draft = Path(result).with_suffix(".draft")
    draft.write_text(found, encoding="utf-8")
    draft.rename(result)


if __name__ == "__main__":
    main(*sys.argv[1:])
