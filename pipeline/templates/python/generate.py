"""Streams text from this bundle's model on a Raspberry Pi, or wherever Python runs: one file, to read and to copy from.

Needs numpy, tokenizers, and onnxruntime or ai-edge-litert. From the bundle's folder:

    python3 -m venv ../venv && ../venv/bin/pip install numpy tokenizers onnxruntime
    ../venv/bin/python python/generate.py "def fibonacci(" --temperature 0.8 --top-k 40

It opens a model only after its SHA-256 was compared with manifest.json. What the tensors are called, and how large they are, comes
from there too. The loops that were measured, with all that is faster, are in device_tests/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import time
from importlib.util import find_spec
from pathlib import Path

try:
    import numpy as np
    from tokenizers import Tokenizer
except ModuleNotFoundError as error:
    setup = "python3 -m venv ../venv && ../venv/bin/pip install numpy tokenizers onnxruntime"
    sys.exit(f"{error.name} is not installed; in the bundle's folder: {setup}")

BUNDLE = Path(__file__).resolve().parent.parent
LIBRARIES = {"onnx": "onnxruntime", "tflite": "ai_edge_litert"}
HIDDEN = np.float32(-30.0)  # in the mask of a TFLite model; a larger number would be too much for its int8
CHUNK_TOKENS = 128  # a prompt goes in parts, so that memory stays bounded
LOGITS_BYTES = 32 << 20  # an ONNX model gives logits for every token of a part: fewer tokens where the vocabulary is large


class OnnxModel:
    """ONNX Runtime. Past and present of every layer are one buffer of the whole context: the graph appends to it in place."""

    def __init__(self, artifact: dict, threads: int) -> None:
        import onnxruntime  # a board has one of the two runtimes

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # a hybrid's file is whole by itself: its second graph only makes long prompts faster (device_tests/onnx_hybrid.py)
        self.session = onnxruntime.InferenceSession(str(BUNDLE / artifact["file"]), options, providers=["CPUExecutionProvider"])
        self.sizes, self.position = artifact["interface"], 0
        self.binding = self.session.io_binding()
        shape = (1, self.sizes["kv_heads"], self.sizes["context_tokens"], self.sizes["head_dim"])
        types = {tensor["name"]: tensor["dtype"] for tensor in artifact["tensors"]["inputs"]}
        self.caches = []
        for layer in range(self.sizes["layers"]):
            for name in (f"{layer}.key", f"{layer}.value"):
                cache = onnxruntime.OrtValue.ortvalue_from_numpy(np.zeros(shape, types[f"past_key_values.{name}"]))
                self.binding.bind_ortvalue_input(f"past_key_values.{name}", cache)
                self.binding.bind_ortvalue_output(f"present.{name}", cache)
                self.caches.append(cache)
        self.ones = np.ones((1, self.sizes["context_tokens"]), np.int64)

    def feed(self, ids: list[int]) -> np.ndarray:
        """Append the ids; logits [vocab] after the last."""
        vocab = self.sizes["vocab_size"]
        chunk = min(CHUNK_TOKENS, max(1, LOGITS_BYTES // (4 * vocab)))
        for start in range(0, len(ids), chunk):
            part = np.array([ids[start : start + chunk]], np.int64)  # [1, n]
            logits = np.empty((1, part.shape[1], vocab), np.float32)
            self.position += part.shape[1]
            self.binding.bind_input("input_ids", "cpu", 0, np.int64, part.shape, part.ctypes.data)
            self.binding.bind_input("attention_mask", "cpu", 0, np.int64, (1, self.position), self.ones.ctypes.data)
            self.binding.bind_output("logits", "cpu", 0, np.float32, logits.shape, logits.ctypes.data)
            self.session.run_with_iobinding(self.binding)
        return logits[0, -1]


class TfliteModel:
    """LiteRT. All keys and values are views of one buffer; each call returns new slices, which are written into it."""

    def __init__(self, artifact: dict, threads: int) -> None:
        from ai_edge_litert.interpreter import Interpreter  # a board has one of the two runtimes

        self.interpreter = Interpreter(model_path=str(BUNDLE / artifact["file"]), num_threads=threads)
        self.interpreter.allocate_tensors()
        self.sizes, self.position = artifact["interface"], 0
        tokens = {
            name: next(tensor["shape"][1] for tensor in signature["inputs"] if tensor["name"] == "tokens")
            for name, signature in artifact["tensors"].items()
        }
        self.runners = {width: self.interpreter.get_signature_runner(name) for name, width in tokens.items()}  # decode has width 1
        self.prompts = sorted(width for name, width in tokens.items() if name != "decode")
        names = [f"{kind}_{layer}" for layer in range(self.sizes["layers"]) for kind in "kv"]
        buffer = np.zeros((len(names), 1, self.sizes["kv_heads"], self.sizes["context_tokens"], self.sizes["head_dim"]), np.float32)
        self.caches = {name: buffer[place] for place, name in enumerate(names)}

    def feed(self, ids: list[int]) -> np.ndarray:
        """Append the ids, one by `decode`, more by the shortest prompt signature that holds them; logits [vocab] after the last."""
        while ids:
            widths = [1] if len(ids) == 1 else self.prompts
            width = next((width for width in widths if width >= len(ids)), widths[-1])
            part, ids = ids[:width], ids[width:]
            logits = self.call(width, part)
        return logits

    def call(self, width: int, part: list[int]) -> np.ndarray:
        context, count = self.sizes["context_tokens"], len(part)
        mask = np.full((1, 1, width, context + width), HIDDEN)
        mask[..., : self.position] = 0
        mask[0, 0, :, context:] = np.where(np.tri(width, dtype=bool), np.float32(0), HIDDEN)
        feeds = {
            "tokens": np.array([part + [0] * (width - count)], np.int32),
            "positions": np.minimum(self.position + np.arange(width), context - 1).astype(np.int32)[None],
            "mask": mask,
        }
        if width > 1:
            feeds["last"] = np.array([count - 1], np.int32)
        results = self.runners[width](**feeds, **self.caches)
        for name, cache in self.caches.items():
            cache[:, :, self.position : self.position + count] = results[f"new_{name}"][:, :, :count]
        self.position += count
        return results["logits"].reshape(-1)


def next_token(logits: np.ndarray, temperature: float, top_k: int, top_p: float, generator: np.random.Generator) -> int:
    """Temperature, then the top_k likeliest, then the fewest that hold top_p together; temperature 0 takes the likeliest."""
    if temperature == 0:
        return int(logits.argmax())
    scaled = logits.astype(np.float64) / temperature
    cut = top_k > 0 or top_p < 1
    ids = np.argsort(-scaled, kind="stable")[: top_k or None] if cut else np.arange(len(scaled))  # device_tests/sampling.py sorts less
    shares = np.exp(scaled[ids] - scaled.max())
    kept = int(np.searchsorted(np.cumsum(shares), top_p * shares.sum())) + 1 if top_p < 1 else len(ids)
    held = np.cumsum(shares[:kept])
    place = int(np.searchsorted(held, generator.random() * held[-1], side="right"))
    return int(ids[min(place, len(held) - 1)])


def stream(model, tokenizer: Tokenizer, ids: list[int], options: argparse.Namespace) -> int:
    """Write the continuation as it comes; the number of new tokens."""
    generator, shown, new = np.random.default_rng(options.seed), 0, []
    logits = model.feed(ids)
    while len(new) < options.max_tokens and len(ids) + len(new) < model.sizes["context_tokens"]:
        token = next_token(logits, options.temperature, options.top_k, options.top_p, generator)
        if token == model.sizes["eos_token_id"]:
            break
        new.append(token)
        text = tokenizer.decode(new, skip_special_tokens=False)
        if not text.endswith("\ufffd"):  # else the last character is not whole yet
            print(text[shown:], end="", flush=True)
            shown = len(text)
        logits = model.feed([token])
    print(tokenizer.decode(new, skip_special_tokens=False)[shown:])
    return len(new)


def chosen(manifest: dict, name: str | None) -> dict:
    """The artifact called ``name``, else the recommended one of a runtime that is installed here."""
    fitting = [artifact for artifact in manifest["artifacts"] if find_spec(LIBRARIES[artifact["format"]])]
    fitting = [artifact for artifact in fitting if name in (None, artifact["name"])]
    if not fitting:
        sys.exit(f"nothing here opens {name or 'a model of this bundle'}; run: pip install onnxruntime, or ai-edge-litert")
    return next((artifact for artifact in fitting if artifact["recommended"]), fitting[0])


def verify(manifest: dict, paths: list[str]) -> None:
    """End with the file's name unless every file is the one that was proved."""
    proved = {file["path"]: file["sha256"] for file in manifest["files"]}
    for path in paths:
        digest = hashlib.sha256()
        with (BUNDLE / path).open("rb") as file:
            for block in iter(lambda: file.read(1 << 20), b""):
                digest.update(block)
        if digest.hexdigest() != proved.get(path):
            sys.exit(f"{path}: changed; its SHA-256 is not the one in manifest.json. Take the bundle again")


def main() -> None:
    parser = argparse.ArgumentParser(description="Streams the continuation of a prompt.")
    parser.add_argument("prompt")
    parser.add_argument("--artifact", help="a name from manifest.json (the recommended one of the installed runtime)")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the likeliest token")
    parser.add_argument("--top-k", type=int, default=0, help="0 cuts nothing off")
    parser.add_argument("--top-p", type=float, default=1.0, help="1 cuts nothing off")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=4)
    options = parser.parse_args()
    manifest = json.loads((BUNDLE / "manifest.json").read_text(encoding="utf-8"))
    artifact = chosen(manifest, options.artifact)
    verify(manifest, [*artifact["files"], manifest["tokenizer"]["file"]])
    tokenizer = Tokenizer.from_file(str(BUNDLE / manifest["tokenizer"]["file"]))
    ids = tokenizer.encode(options.prompt).ids or [artifact["interface"]["bos_token_id"] or 0]
    if len(ids) >= artifact["interface"]["context_tokens"]:
        sys.exit(f"the prompt has {len(ids)} tokens, the context holds {artifact['interface']['context_tokens']}; give a shorter one")
    model = (OnnxModel if artifact["format"] == "onnx" else TfliteModel)(artifact, options.threads)
    started = time.perf_counter()
    count = stream(model, tokenizer, ids, options)
    spent = time.perf_counter() - started
    print(f"{artifact['name']}: {len(ids)} + {count} tokens in {spent:.2f} s, {count / spent:.1f} tokens/s", file=sys.stderr)


if __name__ == "__main__":
    main()
