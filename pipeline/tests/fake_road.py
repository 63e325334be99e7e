"""Stage results of the right shape with tiny files in them, so that report and bundle are tested without running a model."""

import json
from pathlib import Path

import numpy as np
import onnx
from ai_edge_litert import schema_py_generated as schema
from onnx import TensorProto, helper
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

from device_tests.devices.campaign import Outcome
from device_tests.tests.toy import VOCABULARY, ToyModel, write_onnx, write_vectors
from exporters.tflite_structure import write_model
from models.provenance import sha256_of
from pipeline.bundle_files import BundleOptions
from pipeline.recipe import Recipe, load_recipe
from pipeline.report import RECORDS
from pipeline.stages import stages_of

RUNTIMES = {"onnx": ("onnxruntime",), "tflite": ("litert", "tflite")}
ARTIFACT_OF_STAGE = stages_of(load_recipe(None, []).artifacts)
STAGES = (*RECORDS, *ARTIFACT_OF_STAGE, "tokenizer")


ARTIFACTS = ("onnx_fp32", "onnx_static_int8", "tflite_fp32", "tflite_static_int8")  # whatever the default recipe has
BEST = ("onnx_static_int8", "tflite_static_int8")  # a quarter of the bytes and half as fast: what a bundle takes unless it is asked
EVERYTHING = BundleOptions(variants=("all",))
PADDING = {"fp32": 120_000, "int8": 20_000}  # bytes that no compression makes fewer


def fake_recipe(name: str = "tiny") -> Recipe:
    return load_recipe(None, [f'name="{name}"', f"artifacts={json.dumps(ARTIFACTS)}"])


def fake_road(root: Path, parity: bool = True, sampled: bool = False) -> dict[str, Path]:
    """A folder per stage."""
    folders = {stage: root / stage for stage in STAGES}
    for folder in folders.values():
        folder.mkdir(parents=True)
        (folder / "stage.json").write_text('{"seconds": 1}')  # the runner's note, which no bundle may carry
    (folders["checkpoint"] / "LICENSE").write_text("Do what you like.\n")
    for stage, record in records(sampled).items():
        write(folders[stage] / f"{stage}.json", record)
    np.savez(folders["golden"] / "golden.npz", windows=np.arange(12, dtype=np.int32).reshape(2, 6), prompt_tokens=np.int32(2))
    np.savez(folders["golden"] / "evaluation.npz", windows=np.zeros((1, 2), np.int32))
    for stage, name in ARTIFACT_OF_STAGE.items():
        write(folders[stage] / f"{name}.json", fake_sidecar(folders[stage], name, name.split("_")[0]))
    write(folders["onnx"] / "genai_config.json", {"model": {"type": "llama", "decoder": {"filename": "onnx_fp32.onnx"}}})
    write(folders["cluster"] / "config.json", {"model_type": "llama", "hidden_size": 64, "num_attention_heads": 4})
    fake_tokenizer(folders["tokenizer"], parity)
    return folders


def with_toy(folders: dict[str, Path]) -> dict[str, Path]:
    """The same folders with a model that really runs: both ONNX artifacts, golden vectors of it, one letter per token."""
    model = ToyModel(0)
    for stage in ("onnx", "onnx_int8"):
        name = ARTIFACT_OF_STAGE[stage]
        written = json.loads((folders[stage] / f"{name}.json").read_text())
        toy = json.loads(write_onnx(model, folders[stage] / f"{name}.onnx").read_text())
        write(folders[stage] / f"{name}.json", {**written, **toy})
    write_vectors(folders["golden"], model, ToyModel(1))
    alphabet = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:()=\u00e9"[:VOCABULARY]
    letters = Tokenizer(models.WordLevel({letter: index for index, letter in enumerate(alphabet)}, unk_token="\n"))
    letters.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    letters.decoder = decoders.Fuse()
    letters.save(str(folders["tokenizer"] / "tokenizer.json"))
    return folders


def records(sampled: bool) -> dict[str, dict]:
    shape = {
        "family": "llama", "vocab_size": 384, "layers": 2, "hidden_size": 64, "heads": 4, "kv_heads": 2, "head_dim": 16,
        "ffn_size": 128, "context_tokens": 128, "tied": True, "bos_token_id": 0, "eos_token_id": 0, "parameters": 100_000,
    }  # fmt: skip
    kind = {"kind": "sampled from the dense model"} if sampled else {"kind": "file", "name": "text.txt"}
    kind["tokens"] = 900
    weights = [{"file": "model.safetensors", "sha256": "ab" * 32, "bytes": 200_000}]
    pruned = {"perplexity": 31.25, "perplexity_stderr": 0.4, "perplexity_change": 0.04, "kl": 0.02, "top1": 0.91}
    return {
        "checkpoint": {
            "source": "models/tiny", "commit": None, "licence": "apache-2.0", "shape": shape, "weights": weights,
            "versions": {"torch": "2.13.0"},
        },
        "text": {"calibration": kind, "evaluation": kind, "versions": {"tokenizers": "0.23.3"}},
        "prune": {"sparsity": 0.0},
        "recover": {"kept": "before", "diverged": False, "stopped_early": False},
        "smooth": {"max_function_difference": 1e-6},
        "cluster": {"bytes": None},
        "golden": {
            "reference": {"perplexity": 30.0, "perplexity_stderr": 0.5, "tokens": 5120},
            "pruned": {**pruned, "parameters": 90_000, "sparsity": 0.125},
        },
    }  # fmt: skip


def fake_sidecar(folder: Path, name: str, form: str) -> dict:
    """An ONNX artifact is a toy that runs, a TFLite artifact is a file without a graph."""
    path = folder / f"{name}.{form}"
    noise = np.random.default_rng(len(name)).bytes(PADDING["int8" if "int8" in name else "fp32"])
    if form == "onnx":
        write_onnx(ToyModel(0), path)
        model = onnx.load(path)
        model.metadata_props.append(onnx.StringStringEntryProto(key="noise", value=noise.hex()))
        onnx.save(model, path)
    else:
        data = [schema.BufferT(data=np.frombuffer(part, np.uint8)) for part in (name.encode(), noise)]
        write_model(schema.ModelT(version=3, operatorCodes=[], subgraphs=[], signatureDefs=[], buffers=data), path)
    file = {"path": path.name, "sha256": sha256_of(path), "bytes": path.stat().st_size}
    cache = [{"name": "past_key_values.0.key", "dtype": "float32", "shape": ["batch", 2, "past", 16]}]
    tensors = {"inputs": [{"name": "input_ids", "dtype": "int64", "shape": ["batch", "seq"]}, *cache], "outputs": []}
    sizes = {"vocab_size": 384, "layers": 1, "kv_heads": 2, "head_dim": 16, "context_tokens": 128}
    sizes |= {"bos_token_id": 0, "eos_token_id": 0}
    return {
        "name": name, "format": form, "file": path.name, "files": [file], "sha256": file["sha256"], "bytes": file["bytes"],
        "interface": {**sizes, "prefill_tokens": [8] if form == "tflite" else None},
        "tensors": tensors if form == "onnx" else {"decode": tensors, "prefill_8": tensors},
        "parent": "cd" * 32, "settings": {}, "versions": {form: "1.0"}, "measured": fake_measured(name),
    }  # fmt: skip


def fake_measured(name: str) -> dict:
    """What the exporters count: coverage in their two shapes, and of one artifact what each layer costs."""
    counted = {"linear_layers": 15, "int8_linear_layers": 14, "embedding_int8": True}
    layers = [{"name": f"layers.{place}.down_proj", "kl": 1e-4 / (place + 1), "top1": 0.99} for place in range(14)]
    costs = {"layers": layers, "operators": [{"name": "down_proj", "kl": 2e-4, "top1": 0.98}], "tokens": 128}
    return {
        "onnx_static_int8": {**counted, "bits_per_weight": 8.25, "sensitivity": costs},
        "tflite_static_int8": {"coverage": {**counted, "dynamic_linear_layers": ["lm_head"]}},
    }.get(name, {})


def fake_tokenizer(folder: Path, parity: bool) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_text(json.dumps({"of": name, "tokenizer_class": "TokenizersBackend"}))
    for name in ("tokenizer_encode.onnx", "tokenizer_decode.onnx") if parity else ():
        text = [helper.make_tensor_value_info(each, TensorProto.STRING, [1]) for each in ("text", "same")]
        graph = helper.make_graph([helper.make_node("Identity", ["text"], ["same"])], name, [text[0]], [text[1]])
        onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / name)
    reason = None if parity else "7 of 900 texts and 0 of 800 id sequences differ"
    limits = ["text is cut at the first NUL"] if parity else []
    found = {
        "tokenizer_class": "GPT2Tokenizer",
        "parity": parity,
        "documents": 1700,
        "mismatches": 0 if parity else 7,
        "reason": reason,
        "limits": limits,
    }
    write(folder / "tokenizer_graph.json", {**found, "versions": {}})


def fake_outcome(folders: dict[str, Path], worse: str | None = None) -> Outcome:
    """Passing results of this machine and of an emulated one, and a board that could not be reached."""
    here = fake_results(folders, worse)
    boards = {"local": {"isa": "x86_64", "model": "A machine"}, "arm64": {"isa": "aarch64", "model": "emulated"}}
    return Outcome(
        here + [emulated(result) for result in here], boards, [{"device": "ssh://pi", "runtime": None, "reason": "no route to host"}]
    )


def emulated(result: dict) -> dict:
    """The same result from a machine where nothing is timed."""
    timed = ("load_ms", "first_token_ms", "decode_ms_p50", "decode_ms_p90", "decode_ms_p99", "prefill_tokens_per_s")
    timed += ("decode_tokens_per_s", "peak_rss_mb")
    against = {
        "local_isa": "x86_64", "max_abs_diff": 2e-5, "bit_equal": 0.75, "golden_tokens": 96, "top1": 0.998, "perplexity": 31.5,
        "perplexity_change": 0.0002, "perplexity_change_stderr": 0.0001, "tokens": 512, "windows": 4,
    }  # fmt: skip
    device = {**result["device"], **dict.fromkeys(timed), "decode_ms": [], "device": "arm64", "isa": "aarch64", "emulated": True}
    return {**result, "device": {**device, "against_local": against, "passed": True, "failures": []}, "quality": None}


def fake_results(folders: dict[str, Path], worse: str | None = None) -> list[dict]:
    """One passing result per artifact and runtime; ``worse`` names an artifact that fails in its last runtime."""
    results = []
    for place, (stage, name) in enumerate(ARTIFACT_OF_STAGE.items()):
        sidecar = json.loads((folders[stage] / f"{name}.json").read_text())
        for index, runtime in enumerate(RUNTIMES[sidecar["format"]]):
            failed = name == worse and runtime == RUNTIMES[sidecar["format"]][-1]
            results.append(fake_result(sidecar, runtime, 1 + place + index / 4, failed))
    return results


def fake_result(sidecar: dict, runtime: str, scale: float, failed: bool) -> dict:
    device = {
        "device": "local", "isa": "x86_64", "runtime": runtime, "runtime_version": "2.3.0", "threads": 2, "load_ms": 12.5 * scale,
        "first_token_ms": 7.25 * scale, "decode_ms_p50": 1.5 * scale, "decode_ms_p90": 1.75 * scale, "decode_ms_p99": 2.5 * scale,
        "prefill_tokens_per_s": 9000 / scale, "decode_tokens_per_s": 650 / scale, "peak_rss_mb": 80 * scale,
        "max_abs_diff": 1e-5 * scale,
        "kl": 2e-4 * scale, "top1": 1 - 0.004 * scale, "decode_ms": [1.4 * scale, 1.5 * scale, 1.6 * scale, 2.6 * scale],
        "load_rss_mb": 70 * scale, "prompts": [{"tokens": 16, "cold_ms": 3.0, "ms": 2.5 * scale, "tokens_per_s": 6400.0 / scale}],
        "rounds": [{"first_token_ms": 7.25 * scale, "decode_tokens_per_s": rate / scale} for rate in (640, 650, 670)],
        "conditions": {when: {"temperature_c": degrees} for when, degrees in (("before", 41.5), ("during", 55.5), ("after", None))},
        "greedy_prefix": 30, "passed": not failed,
        "failures": [f"{sidecar['name']} in {runtime} on local: top1 0.5000 is below 0.9900"] if failed else [],
    }  # fmt: skip
    quality = {
        "perplexity": 31.25 + scale / 100, "perplexity_stderr": 0.4, "perplexity_change": scale / 3125,
        "perplexity_change_dense": 0.04 + scale / 3000, "kl": 3e-4 * scale, "top1": 1 - 0.003 * scale, "tokens": 5120,
        "worst_token": {"window": 3},
    }  # fmt: skip
    return {"artifact": sidecar["name"], "sha256": sidecar["sha256"], "device": device, "quality": quality}


def fake_stages() -> list[dict]:
    return [{"stage": stage, "seconds": 1.5, "peak_rss_mb": 210.0, "cached": stage == "text"} for stage in STAGES]


def write(path: Path, record: dict) -> None:
    path.write_text(json.dumps(record, indent=2) + "\n")
