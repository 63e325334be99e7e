"""The exported model in eager PyTorch, timed by the same loop as the artifacts: ``python -m pipeline.torch_session <order>``.

A process of its own, so that the peak memory is PyTorch's. ``Order`` of `pipeline.bench_child` names the model's folder.
"""

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from transformers import DynamicCache

from device_tests.artifact import Interface
from models.checkpoint import load_model, shape_of
from pipeline.bench_child import Order, main


class TorchSession:
    """A Hugging Face model with its own cache behind the interface of the device tests' sessions."""

    def __init__(self, folder: Path) -> None:
        self.model = load_model(folder)
        self.notes: list[str] = []
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


def prepare(order: Order) -> Callable[[], TorchSession]:
    """Set the number of threads."""
    torch.set_num_threads(order.threads)
    return lambda: TorchSession(Path(order.model))


if __name__ == "__main__":
    main(prepare, sys.argv[1])
