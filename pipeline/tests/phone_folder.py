"""A bundle's folder as it lies on a phone, of a tiny Llama by the real exporters, for tests that open it."""

import json
import shutil
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from conftest import VOCABULARY, tiny_model, tiny_tokenizer
from exporters import onnx_export, onnx_hybrid_int4, onnx_hybrid_int8, tflite_export
from exporters.settings import OnnxHybridInt4Settings, OnnxHybridInt8Settings, OnnxSettings, TfliteSettings
from models.provenance import sha256_of
from pipeline.text_rules import text_rules_json

WINDOW, PROMPT, SCORED, GREEDY = 40, 21, 12, 10  # tokens
WINDOWS = np.random.default_rng(0).integers(0, VOCABULARY, (8, WINDOW)).astype(np.int32)
CONTEXT = 320  # longer than what a host feeds in one call
PREFILL_TOKENS = 16
FOLDER, INT8_CACHE, BEST = "onnx", "int8_cache", "onnx_hybrid_int8"
GATES = {"perplexity_change": None, "top1": 0.9, "kl": 0.01, "max_abs_diff": None}


def write_onnx_phone(root: Path) -> Path:
    """fp32 and every hybrid of a tiny Llama."""
    decoder, text = prepared(root)
    onnx, int8, int8_cache, int4 = (made(root / name) for name in ("onnx", "int8", "int8_cache", "int4"))
    onnx_export.run(OnnxSettings(greedy_tokens=1), onnx, model=root / "model", text=text)
    onnx_hybrid_int8.run(OnnxHybridInt8Settings(block=32), int8, onnx=onnx, text=text)
    onnx_hybrid_int8.run(OnnxHybridInt8Settings(block=32, kv_cache="int8"), int8_cache, onnx=onnx, text=text)
    onnx_hybrid_int4.run(OnnxHybridInt4Settings(block=16), int4, onnx=onnx, text=text)
    phone = root / "phone"
    sidecars = [placed(phone / FOLDER, stage) for stage in (onnx, int8, int4)]
    sidecars.append(placed(phone / INT8_CACHE, int8_cache))  # apart, because its files have the names of the other's
    return completed(phone, sidecars, decoder)


def write_tflite_phone(root: Path) -> Path:
    """fp32 of a tiny Llama."""
    decoder, text = prepared(root)
    tflite = made(root / "tflite")
    tflite_export.run(TfliteSettings(prefill_tokens=PREFILL_TOKENS, context_tokens=64), tflite, model=root / "model", text=text)
    phone = root / "phone"
    return completed(phone, [placed(phone / "litert", tflite)], decoder)


def prepared(root: Path) -> tuple[PreTrainedModel, Path]:
    """The model, saved as ``root/model``, and a folder with random windows as the text stage writes them."""
    decoder = tiny_model("llama")
    decoder.config.max_position_embeddings = CONTEXT  # rotations know no end
    decoder.save_pretrained(root / "model")
    text = made(root / "text")
    for name, windows in (("calibration", WINDOWS[:6]), ("validation", WINDOWS[6:])):
        np.save(text / f"{name}.npy", windows)
    return decoder, text


def made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


def completed(phone: Path, sidecars: list[Path], decoder: PreTrainedModel) -> Path:
    """Tokenizer, golden vectors of PyTorch, and a manifest over all."""
    write_tokenizer(phone / "tokenizer")
    write_golden(phone / "golden", decoder, WINDOWS[:3])
    write_manifest(phone, [artifact_of(phone, sidecar) for sidecar in sidecars])
    return phone


def placed(target: Path, stage: Path) -> Path:
    """A stage's files where the phone has them; the sidecar's path there."""
    shutil.copytree(stage, target, dirs_exist_ok=True)
    return target / next(path.name for path in stage.glob("*.json") if path.stem != "genai_config")


def artifact_of(phone: Path, sidecar: Path) -> dict:
    """The manifest's entry of an artifact."""
    record = json.loads(sidecar.read_text())
    folder = sidecar.parent.relative_to(phone).as_posix()
    apart = folder == INT8_CACHE
    return {
        "name": INT8_CACHE if apart else record["name"], "format": record["format"], "recommended": record["name"] == BEST and not apart,
        "file": f"{folder}/{record['file']}", "sidecar": f"{folder}/{sidecar.name}",
        "files": [f"{folder}/{file['path']}" for file in record["files"]],
        "interface": record["interface"], "tensors": record["tensors"], "gates": GATES,
    }  # fmt: skip


def write_tokenizer(folder: Path) -> None:
    folder.mkdir(parents=True)
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "text_rules.json").write_text(text_rules_json(tokenizer.to_str()), encoding="utf-8")


@torch.inference_mode()
def write_golden(folder: Path, decoder: PreTrainedModel, windows: np.ndarray) -> None:
    """golden.npz by its description in ``pipeline.golden``."""
    folder.mkdir(parents=True)
    rows = decoder(torch.from_numpy(windows).long()).logits.numpy()  # [windows, WINDOW, vocab]
    prompts = windows[:2, : PROMPT - 5]
    continued = decoder.generate(torch.from_numpy(prompts).long(), max_new_tokens=GREEDY, min_new_tokens=GREEDY, do_sample=False)
    np.savez(
        folder / "golden.npz",
        windows=windows,
        prompt_tokens=np.int32(PROMPT),
        logits=rows[:, PROMPT - 1 : PROMPT - 1 + SCORED].copy(),
        greedy_prompts=prompts,
        greedy_tokens=continued[:, prompts.shape[1] :].numpy().astype(np.int32),
    )


def write_manifest(phone: Path, artifacts: list[dict]) -> None:
    """``manifest.json`` over every file that lies there."""
    paths = sorted(path for path in phone.rglob("*") if path.is_file() and path.name != "manifest.json")
    files = [
        {"path": path.relative_to(phone).as_posix(), "sha256": sha256_of(path), "bytes": path.stat().st_size, "role": "artifact"}
        for path in paths
    ]
    tokenizer = {"file": "tokenizer/tokenizer.json"}
    record = {"format_version": 2, "name": "tiny", "artifacts": artifacts, "tokenizer": tokenizer, "files": files}
    (phone / "manifest.json").write_text(json.dumps(record), encoding="utf-8")
