"""The tokenizer as two ONNX graphs, so that a phone needs no Python: text to ids, and ids to UTF-8 bytes.

``tokenizer_encode.onnx``: ``text`` string [1] to ``input_ids`` int64 [1, tokens], by the HfJsonTokenizer operator of
onnxruntime-extensions, which carries the whole ``tokenizer.json`` inside. One text per call: the operator pads a batch
with a real token and gives no mask. It reads C strings, so text is cut at NUL. Where a text ends within the beginning of
an added token it loses the rest without a word (version 0.15.2: ``if a <b`` becomes ``if a <`` when a token starts with
``<|``), so the graph puts a whole added token behind the text and takes its id off again.

``tokenizer_decode.onnx``: ``ids`` int64 [tokens] to ``utf8`` uint8 [bytes], by standard operators and a table of the
bytes behind every id. BpeDecoder of onnxruntime-extensions would give a string, but no ids end the process, an unknown
id becomes a special token, text is cut at NUL, and the half characters that streaming meets are no valid string.

Both ship only where they equal the original tokenizer on an adversarial corpus.
"""

import json
import random
import shutil
from collections import Counter
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from onnxruntime_extensions import default_opset_domain, get_library_path
from tokenizers import Tokenizer

from exporters.settings import TokenizerSettings
from exporters.tokenizer_corpus import adversarial_corpus, nul_documents
from exporters.tokenizer_definition import bytes_of_symbols, fixed_special_ids
from exporters.tokenizer_parity import DECODE_FILE, ENCODE_FILE, Parity, Request, check_parity
from models.errors import UserError
from models.progress import track
from models.provenance import library_versions, settings_record, sha256_of, write_json

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json")
# Ways of reading tokenizer.json that onnxruntime-extensions knows; which one fits is found by trying.
CLASSES = ("GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast", "CodeGenTokenizer", "LlamaTokenizer")
EXTENSIONS_DOMAIN = default_opset_domain()
STANDARD_OPSET = 20  # the first with StringConcat
IR_VERSION = 9
NUL_LIMIT = "text is cut at the first NUL (U+0000): take it out before encoding"


def run(settings: TokenizerSettings, out: Path, *, checkpoint: Path, text: Path) -> None:
    """Write the tokenizer's files, and the graphs where they equal it.

    Raises UserError when the checkpoint has no ``tokenizer.json``. A graph that differs is no error: ``tokenizer_graph.json``
    says why it does not ship.
    """
    for name in TOKENIZER_FILES:
        if not (checkpoint / name).is_file():
            raise UserError(f"{checkpoint.name}: no {name}; save the tokenizer with transformers' save_pretrained and run again")
        shutil.copyfile(checkpoint / name, out / name)
    definition = json.loads((out / "tokenizer.json").read_text(encoding="utf-8"))
    config = json.loads((out / "tokenizer_config.json").read_text(encoding="utf-8"))
    model_config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    original = Tokenizer.from_file(str(out / "tokenizer.json"))
    request = parity_request(original, settings, text)

    refusal = unsupported(definition)
    if refusal:
        findings = {}
    else:
        decode_graph(token_bytes(original, model_config.get("vocab_size", 0)), out / DECODE_FILE)
        findings = try_classes(definition, config, out, request)
    chosen = next((name for name, parity in findings.items() if parity.reason is None), None)
    if chosen is None:
        for name in (ENCODE_FILE, DECODE_FILE):
            (out / name).unlink(missing_ok=True)
    write_json(out / "tokenizer_graph.json", record(out, settings, request, findings, refusal))


def unsupported(definition: dict) -> str | None:
    """Why no graph is tried at all, or None. Only byte-level BPE has a fixed table of bytes per id."""
    kind = (definition.get("model") or {}).get("type")
    decoder = (definition.get("decoder") or {}).get("type")
    if kind != "BPE" or decoder != "ByteLevel":
        return f"the tokenizer is {kind} with decoder {decoder}; graphs are made for byte-level BPE only"
    return None


def parity_request(original: Tokenizer, settings: TokenizerSettings, text: Path) -> Request:
    """The whole corpus: adversarial and random texts, the model's own text windows, every id alone, random ids."""
    special = [token.content for token in original.get_added_tokens_decoder().values()]
    documents = adversarial_corpus(special, settings.random_documents, settings.seed)
    for name in ("calibration.npy", "evaluation.npy"):
        documents += [window.replace("\0", " ") for window in original.decode_batch(np.load(text / name).tolist())]
    known = sorted(original.get_vocab(with_added_tokens=True).values())
    source = random.Random(settings.seed)
    sequences = [[], known, *([token] for token in known[:: max(1, len(known) // 512)])]
    sequences += [source.choices(known, k=source.randint(1, 64)) for _ in range(settings.random_documents)]
    return Request(get_library_path(), documents, nul_documents(), sequences)


def try_classes(definition: dict, config: dict, out: Path, request: Request) -> dict[str, Parity]:
    """Build and check one encode graph per class until one is right in everything; it stays in ``out``.

    After a class failed, the next one must first be right where that one was wrong.
    """
    own = str(config.get("tokenizer_class", "")).removesuffix("Fast")
    order = sorted(CLASSES, key=lambda name: name.removesuffix("Fast") != own)
    findings, hard = {}, []
    for name in track(order, "tokenizer graph"):
        encode_graph(definition, {**config, "tokenizer_class": name}, out / ENCODE_FILE)
        if hard:
            findings[name] = check_parity(out, replace(request, documents=hard, nul_documents=[], id_sequences=[]))
        if not hard or findings[name].reason is None:
            findings[name] = check_parity(out, request)
            hard = [request.documents[place] for place in findings[name].wrong_documents]
        if findings[name].reason is None:
            break
    return findings


def record(out: Path, settings: TokenizerSettings, request: Request, findings: dict[str, Parity], refusal: str | None) -> dict:
    """What ``tokenizer_graph.json`` says: the verdict first, then how it was reached."""
    best_class, best = min(findings.items(), key=lambda item: item[1].mismatches / item[1].documents, default=(None, None))
    parity = best is not None and best.reason is None
    files = [out / name for name in (*TOKENIZER_FILES, ENCODE_FILE, DECODE_FILE) if (out / name).exists()]
    return {
        "parity": parity,
        "documents": best.documents if best else 0,
        "mismatches": best.mismatches if best else 0,
        "example": best.example if best else None,
        "reason": refusal or (None if parity else f"{best_class}: {best.reason}"),
        "tokenizer_class": best_class,
        "limits": [NUL_LIMIT] if parity and best.nul_mismatches else [],
        "tried": {name: tried(finding) for name, finding in findings.items()},
        "nul_documents": len(request.nul_documents),
        "files": [{"path": path.name, "sha256": sha256_of(path), "bytes": path.stat().st_size} for path in files],
        "settings": settings_record(settings),
        "versions": library_versions("onnx", "onnxruntime", "onnxruntime-extensions", "tokenizers"),
    }


def tried(finding: Parity) -> dict:
    """A finding without what only the search for the next class needs."""
    return {key: value for key, value in asdict(finding).items() if key != "wrong_documents"}


def encode_graph(definition: dict, config: dict, path: Path) -> None:
    """Write ``text`` string [1] to ``input_ids`` int64 [1, tokens].

    The post-processor stays out of the operator, which would add its tokens twice: Concat puts them before and after.
    """
    before, after = fixed_special_ids(definition)
    closing = closing_token(definition)
    attributes = {
        "tokenizer_vocab": json.dumps({**definition, "post_processor": None}, ensure_ascii=False),
        "tokenizer_config": json.dumps({**config, "add_bos_token": False, "add_eos_token": False}, ensure_ascii=False),
    }
    close, open_again, constants = close_text(closing) if closing else ([], [], {})
    feed, result = ("closed_text", "closed_ids") if closing else ("text", "plain_ids")
    nodes = [
        *close,
        helper.make_node("HfJsonTokenizer", [feed], [result], name="encode", domain=EXTENSIONS_DOMAIN, **attributes),
        *open_again,
        helper.make_node("Concat", ["before", "plain_ids", "after"], ["input_ids"], axis=1),
    ]
    constants |= {"before": np.array([before], dtype=np.int64), "after": np.array([after], dtype=np.int64)}  # [1, 0 or more]
    text = helper.make_tensor_value_info("text", TensorProto.STRING, [1])
    ids = helper.make_tensor_value_info("input_ids", TensorProto.INT64, [1, "tokens"])
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    save(helper.make_graph(nodes, "tokenizer_encode", [text], [ids], initializers), path)


def closing_token(definition: dict) -> dict | None:
    """The first added token that stands for itself alone, whatever is before it; None where there is none."""
    tokens = definition.get("added_tokens") or []
    return next((token for token in tokens if token["special"] and not (token["lstrip"] or token["single_word"])), None)


def close_text(closing: dict) -> tuple[list[onnx.NodeProto], list[onnx.NodeProto], dict[str, np.ndarray]]:
    """Nodes that put the closing token behind ``text``, nodes that take its id off, and their constants.

    The id is taken off only where it stands at the end: a text cut at NUL never reached it.
    """
    constants = {
        "closing_text": np.array([closing["content"]], dtype=object),
        "closing_id": np.array([closing["id"]], dtype=np.int64),
        "first": np.array([0], dtype=np.int64),
        "last": np.array([-1], dtype=np.int64),
        "token_axis": np.array([1], dtype=np.int64),
    }
    after = [
        helper.make_node("Slice", ["closed_ids", "last", "end", "token_axis"], ["last_id"]),  # [1, 0 or 1]
        helper.make_node("Equal", ["last_id", "closing_id"], ["is_closing"]),
        helper.make_node("Cast", ["is_closing"], ["closing_count"], to=TensorProto.INT64),
        helper.make_node("ReduceSum", ["closing_count"], ["surplus"], keepdims=0),
        helper.make_node("Shape", ["closed_ids"], ["closed_tokens"], start=1),  # [1]
        helper.make_node("Sub", ["closed_tokens", "surplus"], ["tokens"]),
        helper.make_node("Slice", ["closed_ids", "first", "tokens", "token_axis"], ["plain_ids"]),
    ]
    constants["end"] = np.array([np.iinfo(np.int64).max], dtype=np.int64)
    return [helper.make_node("StringConcat", ["text", "closing_text"], ["closed_text"])], after, constants


def token_bytes(original: Tokenizer, vocab_size: int) -> list[bytes]:
    """Bytes of every id, empty for ids without a token. At least ``vocab_size`` ids: a model's head may be padded.

    An added token that is not written in the 256 symbols stands for its own UTF-8, as in the tokenizers library.
    """
    symbols = bytes_of_symbols()
    tokens = {index: token for token, index in original.get_vocab(with_added_tokens=True).items()}
    table = [b""] * max(vocab_size, max(tokens) + 1)
    for index, token in tokens.items():
        written = all(symbol in symbols for symbol in token)
        table[index] = bytes(symbols[symbol] for symbol in token) if written else token.encode("utf-8")
    return table


def decode_graph(table: list[bytes], path: Path) -> None:
    """Write ``ids`` int64 [tokens] to ``utf8`` uint8 [bytes]: for each id its slice of one flat table of bytes."""
    lengths = np.array([len(entry) for entry in table], dtype=np.int32)
    starts = (np.cumsum(lengths) - lengths).astype(np.int32)
    longest = np.arange(lengths.max(), dtype=np.int32)[None, :]  # [1, longest]
    constants = {
        "flat": np.frombuffer(b"".join(table), dtype=np.uint8),
        "starts": starts,
        "lengths": lengths,
        "offsets": longest,
        "last_axis": np.array([1], dtype=np.int64),
        "everything": np.array([-1], dtype=np.int64),
    }
    nodes = [
        helper.make_node("Gather", ["starts", "ids"], ["start"]),  # [tokens]
        helper.make_node("Gather", ["lengths", "ids"], ["length"]),
        helper.make_node("Unsqueeze", ["start", "last_axis"], ["start_column"]),  # [tokens, 1]
        helper.make_node("Unsqueeze", ["length", "last_axis"], ["length_column"]),
        helper.make_node("Add", ["start_column", "offsets"], ["places"]),  # [tokens, longest]
        helper.make_node("Less", ["offsets", "length_column"], ["inside"]),
        helper.make_node("Reshape", ["places", "everything"], ["places_flat"]),
        helper.make_node("Reshape", ["inside", "everything"], ["inside_flat"]),
        helper.make_node("Compress", ["places_flat", "inside_flat"], ["wanted"], axis=0),
        helper.make_node("Gather", ["flat", "wanted"], ["utf8"]),
    ]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["tokens"])
    utf8 = helper.make_tensor_value_info("utf8", TensorProto.UINT8, ["bytes"])
    initializers = [numpy_helper.from_array(value, name) for name, value in constants.items()]
    save(helper.make_graph(nodes, "tokenizer_decode", [ids], [utf8], initializers), path)


def save(graph: onnx.GraphProto, path: Path) -> None:
    """Serialise with the opsets that the graph really uses; protobuf's deterministic order, so same input, same bytes."""
    domains = Counter(node.domain for node in graph.node)
    opsets = [helper.make_opsetid("", STANDARD_OPSET)]
    if EXTENSIONS_DOMAIN in domains:
        opsets.append(helper.make_opsetid(EXTENSIONS_DOMAIN, 1))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="pocketlm")
    path.write_bytes(model.SerializeToString(deterministic=True))
