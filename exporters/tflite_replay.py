"""Run a TFLite decoder in a fresh process with numpy and one runtime: prompt in chunks, then given tokens one by one.

``python -m exporters.tflite_replay --runtime litert|tflite --model X.tflite --feeds feeds.npz --out logits.npz``

A process of its own because the two runtimes cannot live in one (whichever comes second fails to build an interpreter).
``feeds.npz``: ``tokens`` int32 [sequences, length] and ``prompt_tokens`` int32 [sequences].
``logits.npz``: ``logits`` float32 [sequences, steps + 1, vocab], after the prompt and after each further token, with
``steps = length - max(prompt_tokens)``; ``delegated``, how many pieces of the prefill graph XNNPACK took over (0: it is not
used); ``seconds`` float64 [2], the median time of one call of ``prefill`` and of ``decode``.
"""

import argparse
import importlib
import re
import time
from pathlib import Path

import numpy as np

RUNTIMES = {"litert": "ai_edge_litert.interpreter", "tflite": "tflite_runtime.interpreter"}
HIDDEN = np.float32(-30.0)  # what a masked position adds to its score; larger values destroy quantised attention


class Replay:
    """One sequence at a time through the signatures of a file; owns the key-value cache as the tensor contract says."""

    def __init__(self, interpreter):
        interpreter.allocate_tensors()  # before the signature runners, or tflite-runtime leaves XNNPACK out
        self.signatures = {name: interpreter.get_signature_runner(name) for name in ("prefill", "decode")}
        self.delegated = sum(operator["op_name"] == "DELEGATE" for operator in interpreter._get_ops_details())
        self.input_details = {name: runner.get_input_details() for name, runner in self.signatures.items()}
        self.logit_details = {name: runner.get_output_details()["logits"] for name, runner in self.signatures.items()}
        details = self.input_details["prefill"]
        self.chunk = int(details["tokens"]["shape"][1])
        self.cache = {name: np.zeros(detail["shape"], detail["dtype"]) for name, detail in details.items() if re.match(r"[kv]_\d", name)}
        self.context = next(iter(self.cache.values())).shape[2]
        self.seconds = {"prefill": [], "decode": []}
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.position = 0
        for name, part in self.cache.items():  # [1, kv_heads, context, head_dim]
            part[:] = quantised(np.float32(0), self.input_details["prefill"][name])

    def feeds(self, name: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Inputs of one call of signature ``name`` on at most a chunk of ``tokens`` [n]; right-padded, padding hidden."""
        size = self.chunk if name == "prefill" else 1
        padded, positions = np.zeros((1, size), np.int32), np.zeros((1, size), np.int32)
        padded[0, : len(tokens)] = tokens
        positions[0, : len(tokens)] = np.arange(self.position, self.position + len(tokens))
        mask = np.full((1, 1, size, self.context + size), HIDDEN, np.float32)
        mask[..., : self.position] = 0
        mask[0, 0, :, self.context :][np.tril_indices(size)] = 0
        named = {"tokens": padded, "positions": positions, "mask": quantised(mask, self.input_details[name]["mask"]), **self.cache}
        return named | ({"last": np.array([len(tokens) - 1], np.int32)} if name == "prefill" else {})

    def call(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """Logits [vocab] after the last of ``tokens`` [n]; the cache takes the new keys and values in."""
        feeds = self.feeds(name, tokens)
        start = time.perf_counter()
        outputs = self.signatures[name](**feeds)
        self.seconds[name].append(time.perf_counter() - start)
        end = self.position + len(tokens)
        for part, cached in self.cache.items():
            cached[:, :, self.position : end] = outputs[f"new_{part}"][:, :, : len(tokens)]
        self.position = end
        return dequantised(outputs["logits"][0], self.logit_details[name])

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [vocab] after the prompt ``tokens`` [n], fed in chunks."""
        for start in range(0, len(tokens), self.chunk):
            logits = self.call("prefill", tokens[start : start + self.chunk])
        return logits


def quantised(values: np.ndarray, tensor: dict) -> np.ndarray:
    """Float ``values`` as an input of the described tensor's type: int8 by its scale and zero point, float as they are."""
    if tensor["dtype"] == np.float32:
        return values
    scale, zero_point = tensor["quantization"]
    return np.clip(np.round(values / scale) + zero_point, -128, 127).astype(np.int8)


def dequantised(values: np.ndarray, tensor: dict) -> np.ndarray:
    """An output of the described tensor's type as float32."""
    scale, zero_point = tensor["quantization"]
    return values if values.dtype == np.float32 else (values.astype(np.float32) - zero_point) * np.float32(scale)


def replay_all(replay: Replay, tokens: np.ndarray, prompt_tokens: np.ndarray) -> np.ndarray:
    """Logits [sequences, steps + 1, vocab] of every sequence."""
    steps = tokens.shape[1] - int(prompt_tokens.max())
    rows = []
    for sequence, length in zip(tokens, prompt_tokens.tolist(), strict=True):
        replay.reset()
        row = [replay.prompt(sequence[:length])]
        row += [replay.call("decode", sequence[step : step + 1]) for step in range(length, length + steps)]
        rows.append(row)
    return np.array(rows, np.float32)


def main() -> None:
    parser = argparse.ArgumentParser(description="replay tokens through a TFLite decoder")
    parser.add_argument("--runtime", choices=RUNTIMES, required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--feeds", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    runtime = importlib.import_module(RUNTIMES[args.runtime])
    replay = Replay(runtime.Interpreter(str(args.model), num_threads=args.threads))
    with np.load(args.feeds) as feeds:
        logits = replay_all(replay, feeds["tokens"], feeds["prompt_tokens"])
    seconds = [float(np.median(replay.seconds[name] or [np.nan])) for name in ("prefill", "decode")]
    np.savez(args.out, logits=logits, delegated=replay.delegated, seconds=seconds)


if __name__ == "__main__":
    main()
