"""optimum-onnx: its exporter makes the graph, its ``ORTModelForCausalLM`` runs it."""

import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM

from device_tests.onnx_model import session_options
from pipeline.bench_child import Order
from pipeline.peers.commands import Converted, as_of_transformers_4, files_in, serve


def convert(checkpoint: Path, out: Path, options: dict) -> Converted:
    """``options``: ``optimize``, the exporter's level (O1 to O4), empty for none."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = as_of_transformers_4(checkpoint, Path(folder))
        main_export(str(prepared), out, task="text-generation-with-past", optimize=options["optimize"] or None, do_validation=False)
    files = files_in(out)
    graphs = [name for name in files if name.endswith(".onnx")]
    if len(graphs) != 1:
        raise ValueError(f"optimum wrote the graphs {graphs}, one was expected")
    return Converted(graphs[0], files)


class OptimumSession:
    """An ``ORTModelForCausalLM`` with the cache that it hands back."""

    def __init__(self, folder: Path, order: Order) -> None:
        options = session_options(onnxruntime, order.threads)
        self.interface = order.sizes
        self.notes: list[str] = []
        self.model = ORTModelForCausalLM.from_pretrained(folder, session_options=options, provider="CPUExecutionProvider")
        self.mask = torch.ones(1, self.interface.context_tokens, dtype=torch.int64)
        self.reset()

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits ``[vocab]`` after the last of ``tokens`` int ``[n]``."""
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None]
        end = self.position + ids.shape[1]
        positions = torch.arange(self.position, end)[None]
        with torch.inference_mode():
            found = self.model(
                input_ids=ids, attention_mask=self.mask[:, :end], position_ids=positions, past_key_values=self.cache, use_cache=True
            )
        self.cache, self.position = found.past_key_values, end
        return found.logits[0, -1].numpy()

    def step(self, token: int) -> np.ndarray:
        """Logits ``[vocab]`` after one more token."""
        return self.prefill(np.array([token]))

    def reset(self) -> None:
        """Forget the cache."""
        self.cache, self.position = None, 0


def prepare(order: Order) -> Callable[[], OptimumSession]:
    """Set PyTorch's threads, which the host's side of the loop uses; ``order.model`` is the graph."""
    torch.set_num_threads(order.threads)
    return lambda: OptimumSession(Path(order.model).parent, order)


if __name__ == "__main__":
    serve(convert, prepare)
