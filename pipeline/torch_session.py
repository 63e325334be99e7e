"""The exported model in eager PyTorch, timed by the same loop as the artifacts: ``python -m pipeline.torch_session``.

A process of its own, so that the peak memory is PyTorch's.
"""

import json
import sys
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from device_tests.artifact import Interface
from device_tests.result import timing_fields
from device_tests.timing import measure
from models.checkpoint import load_model, shape_of


class TorchSession:
    """A Hugging Face model with its own cache behind the interface of the device tests' sessions."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder)
        shape = shape_of(self.model)
        self.interface = Interface(
            vocab_size=shape.vocab_size, layers=shape.layers, kv_heads=shape.kv_heads, head_dim=shape.head_dim,
            context_tokens=shape.context_tokens, prefill_tokens=None, bos_token_id=shape.bos_token_id, eos_token_id=shape.eos_token_id,
        )  # fmt: skip
        self.reset()

    @property
    def position(self) -> int:
        return self.cache.get_seq_length()

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits ``[vocab]`` after the last of ``tokens`` int ``[n]``."""
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None]
        with torch.inference_mode():
            return self.model(input_ids=ids, past_key_values=self.cache, logits_to_keep=1).logits[0, -1].numpy()

    def step(self, token: int) -> np.ndarray:
        """Logits ``[vocab]`` after one more token."""
        return self.prefill(np.array([token]))

    def reset(self) -> None:
        """Forget the cache."""
        self.cache = DynamicCache(config=self.model.config)


def main() -> None:
    """Print the timing of a model as JSON: ``<model folder> <tokens .npy [n]> <decode tokens> <threads>``."""
    folder, prompt, decode_tokens, threads = sys.argv[1:]
    torch.set_num_threads(int(threads))
    _, timing = measure(lambda: TorchSession(Path(folder)), np.load(prompt, allow_pickle=False), int(decode_tokens))
    print(json.dumps({**timing_fields(timing), "timing": asdict(timing)}))


if __name__ == "__main__":
    main()
