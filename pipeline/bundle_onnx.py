"""Completes a bundle's ``onnx/`` folder, so that onnxruntime-genai and optimum open it unchanged and small builds find what they need."""

import json
import shutil
from pathlib import Path

from onnxruntime_extensions import get_library_path

from device_tests.artifact import read_artifact
from device_tests.onnx_hybrid import given_matrices
from models.provenance import write_json
from pipeline.manifest import Artifact, OtherRuntime, Tokenizer
from pipeline.ort_format import FLATBUFFER_LIMIT_BYTES, Graph, write_ort, write_required_operators
from pipeline.report import read_json

GENAI_CONFIG, OPERATORS = "genai_config.json", "required_operators.config"
SMALLER = "ONNX Runtime built smaller"
CONFIGS = ("config.json", "generation_config.json")
UNKNOWN_CLASS, KNOWN_CLASS = "TokenizersBackend", "PreTrainedTokenizerFast"  # of transformers 5 only; of all that read tokenizer.json


def complete_onnx(bundle: Path, folders: dict[str, Path], entries: list[Artifact], tokenizer: Tokenizer) -> list[OtherRuntime]:
    """Write configurations and the list of operators for the ONNX artifacts ``entries``. Returns what other runtimes can do with them."""
    main = next(entry for entry in entries if entry.recommended)
    write_genai_config(folders["onnx"] / GENAI_CONFIG, bundle / main.file)
    for name in CONFIGS:
        if (folders["cluster"] / name).is_file():
            shutil.copyfile(folders["cluster"] / name, bundle / "onnx" / name)
    found = [genai(main, tokenizer), optimum(main, read_json(bundle / "onnx" / CONFIGS[0]))]
    if max(entry.bytes for entry in entries) > FLATBUFFER_LIMIT_BYTES:
        reason = f"no {OPERATORS}: onnxruntime's tools make it from files in ORT format, which hold 2 GB at most"
        return [*found, OtherRuntime(name=SMALLER, opens=None, note=reason)]
    write_required_operators(graphs_of(bundle, entries, tokenizer), bundle / "onnx" / OPERATORS)
    return [*found, OtherRuntime(name=SMALLER, opens=f"onnx/{OPERATORS}", note="for --include_ops_by_config; not built here")]


def write_genai_config(source: Path, model: Path) -> None:
    """The export's own configuration, naming the file that the bundle has."""
    config = read_json(source)
    config["model"].setdefault("decoder", {})["filename"] = model.name
    write_json(model.parent / GENAI_CONFIG, config)


def graphs_of(bundle: Path, entries: list[Artifact], tokenizer: Tokenizer) -> list[Graph]:
    """Every graph of the bundle that an app may open in ONNX Runtime."""
    graphs = []
    for entry in entries:
        artifact = read_artifact(bundle / entry.sidecar)
        graphs.append(Graph(artifact.path))
        if artifact.prompt:
            graphs.append(Graph(artifact.prompt.path, given_matrices(artifact.prompt)))
    library = get_library_path()
    return graphs + [Graph(bundle / path, library=library) for path in (tokenizer.encode_graph, tokenizer.decode_graph) if path]


def add_ort_file(bundle: Path, entry: Artifact) -> Artifact:
    """The same entry with a file in ORT format, proved equal to the ONNX file."""
    target = write_ort(bundle / entry.file, entry.interface.model_dump())
    return entry.model_copy(update={"ort_file": f"{target.parent.name}/{target.name}"})


def write_tokenizer_config(source: Path, target: Path, fitting_class: str | None) -> None:
    """The tokenizer's configuration under a class that other readers know.

    ``fitting_class`` is the one under which onnxruntime-extensions, which onnxruntime-genai reads it with, was proved to equal the
    tokenizer: under another one it may split texts otherwise without a word. None: there is no such proof, and the class stays.
    """
    config = read_json(source)
    own = config.get("tokenizer_class")
    config["tokenizer_class"] = fitting_class or (KNOWN_CLASS if own in (None, UNKNOWN_CLASS) else own)
    target.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def other_cache(main: Artifact) -> str | None:
    """Why hosts that make the first cache themselves may not know this one, or None."""
    kinds = {tensor["dtype"] for tensor in main.tensors["inputs"] if tensor["name"].startswith("past_key_values.")} - {"float32"}
    return f"not tried with a KV cache of {', '.join(sorted(kinds))}" if kinds else None


def genai(main: Artifact, tokenizer: Tokenizer) -> OtherRuntime:
    """onnxruntime-genai reads ``genai_config.json``; a hybrid is one graph to it."""
    if other := other_cache(main):
        return OtherRuntime(name="onnxruntime-genai", opens=None, note=other)
    notes = []
    if main.prompt_file:
        notes.append(f"it knows one graph, so prompts go through {main.file} too: the first token comes later")
    if not tokenizer.encode_graph:
        notes.append(f"its tokenizer is not proved here, encode by {tokenizer.file}")
    return OtherRuntime(name="onnxruntime-genai", opens="onnx", note="; ".join(notes) or None)


def optimum(main: Artifact, config: dict) -> OtherRuntime:
    """``ORTModelForCausalLM`` makes the first cache by the sizes that it finds in config.json."""
    name, sizes = "optimum-onnx (ORTModelForCausalLM)", main.interface
    if other := other_cache(main):
        return OtherRuntime(name=name, opens=None, note=other)
    heads, hidden = config.get("num_attention_heads", config.get("n_head")), config.get("hidden_size", config.get("n_embd"))
    if heads and hidden and hidden // heads != sizes.head_dim:
        note = f"it takes a head to be {hidden} / {heads} wide, which is {hidden // heads}; the heads here are {sizes.head_dim} wide"
        return OtherRuntime(name=name, opens=None, note=note)
    return OtherRuntime(name=name, opens="onnx", note=None)
