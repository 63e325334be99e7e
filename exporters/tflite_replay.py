"""Run a TFLite decoder in a fresh process with numpy and one runtime: prompt in chunks, then given tokens one by one.

``python -m exporters.tflite_replay --runtime litert|tflite --model X.tflite --feeds feeds.npz --out logits.npz``

A process of its own because the two runtimes cannot live in one (whichever comes second fails to build an interpreter).
``feeds.npz``: ``tokens`` int32 [sequences, length] and ``prompt_tokens`` int32 [sequences].
``logits.npz``: ``logits`` float32 [sequences, steps + 1, vocab], after the prompt and after each further token, with
``steps = length - max(prompt_tokens)``; ``delegated``, how many pieces of the decode graph XNNPACK took over (0: it is not
used). With ``--short-cache`` also ``short_cache``, the logits where no more of the cache is fed than holds tokens.
"""

import argparse
import importlib
import re
from pathlib import Path

import numpy as np

RUNTIMES = {"litert": "ai_edge_litert.interpreter", "tflite": "tflite_runtime.interpreter"}
HIDDEN = np.float32(-30.0)  # what a masked position adds to its score; larger values destroy quantised attention
SHORTEST_CACHE = 16  # slots of a short cache, which doubles until the tokens fit


class Replay:
    """One sequence at a time through the signatures ``decode`` and ``prefill`` of a file that has just these, or is told which.

    Owns the key-value cache as the tensor contract says.
    """

    def __init__(self, interpreter, prefill: str | None = None):
        interpreter.allocate_tensors()  # before the signature runners, or tflite-runtime leaves XNNPACK out
        self.prefill = prefill or next(name for name in interpreter.get_signature_list() if name.startswith("prefill_"))
        self.signatures = {name: interpreter.get_signature_runner(name) for name in (self.prefill, "decode")}
        self.delegated = delegated_pieces(interpreter)
        self.input_details = {name: runner.get_input_details() for name, runner in self.signatures.items()}
        self.logit_details = {name: runner.get_output_details()["logits"] for name, runner in self.signatures.items()}
        details = self.input_details["decode"]
        self.chunk = int(self.input_details[self.prefill]["tokens"]["shape"][1])
        self.cache = {name: np.zeros(detail["shape"], detail["dtype"]) for name, detail in details.items() if re.match(r"[kv]_\d", name)}
        self.context = next(iter(self.cache.values())).shape[2]
        self.short_cache = False
        self.reset()

    def reset(self) -> None:
        """Forget the sequence."""
        self.position = 0
        for name, part in self.cache.items():  # [1, kv_heads, context, head_dim]
            part[:] = quantised(np.float32(0), self.input_details["decode"][name])

    def rows(self) -> int:
        """How many slots of the cache are fed."""
        if not self.short_cache:
            return self.context
        rows = SHORTEST_CACHE
        while rows < self.position:
            rows *= 2
        return min(rows, self.context)

    def feeds(self, name: str, tokens: np.ndarray) -> dict[str, np.ndarray]:
        """Inputs of one call of signature ``name`` on at most a chunk of ``tokens`` [n]; right-padded, padding hidden."""
        size, rows = 1 if name == "decode" else self.chunk, self.rows()
        padded, positions = np.zeros((1, size), np.int32), np.zeros((1, size), np.int32)
        padded[0, : len(tokens)] = tokens
        positions[0, : len(tokens)] = np.arange(self.position, self.position + len(tokens))
        mask = np.full((1, 1, size, rows + size), HIDDEN, np.float32)
        mask[..., : self.position] = 0
        mask[0, 0, :, rows:][np.tril_indices(size)] = 0
        named = {"tokens": padded, "positions": positions, "mask": quantised(mask, self.input_details[name]["mask"])}
        named |= {part: cached[:, :, :rows] for part, cached in self.cache.items()}
        return named | ({"last": np.array([len(tokens) - 1], np.int32)} if name != "decode" else {})

    def call(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """Logits [vocab] after the last of ``tokens`` [n]; the cache takes the new keys and values in."""
        outputs = self.signatures[name](**self.feeds(name, tokens))
        end = self.position + len(tokens)
        for part, cached in self.cache.items():
            cached[:, :, self.position : end] = outputs[f"new_{part}"][:, :, : len(tokens)]
        self.position = end
        return dequantised(outputs["logits"][0], self.logit_details[name])

    def prompt(self, tokens: np.ndarray) -> np.ndarray:
        """Logits [vocab] after the prompt ``tokens`` [n], fed in chunks."""
        for start in range(0, len(tokens), self.chunk):
            logits = self.call(self.prefill, tokens[start : start + self.chunk])
        return logits


def delegated_pieces(interpreter) -> int:
    """How many pieces of the first signature's graph XNNPACK took over; nothing public tells."""
    return sum(operator["op_name"] == "DELEGATE" for operator in interpreter._get_ops_details())


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
    parser.add_argument("--short-cache", action="store_true")
    args = parser.parse_args()
    runtime = importlib.import_module(RUNTIMES[args.runtime])
    replay = Replay(runtime.Interpreter(str(args.model), num_threads=args.threads))
    with np.load(args.feeds) as feeds:
        tokens, prompt_tokens = feeds["tokens"], feeds["prompt_tokens"]
    found = {"logits": replay_all(replay, tokens, prompt_tokens), "delegated": replay.delegated}
    if args.short_cache:
        replay.short_cache = True
        found["short_cache"] = replay_all(replay, tokens, prompt_tokens)
    np.savez(args.out, **found)


if __name__ == "__main__":
    main()
