"""transformers' own ONNX exporter and its own runner. Its environment is ours, which has the version that brings them."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime
import torch
from transformers import AutoModelForCausalLM
from transformers.exporters import ExportedModel, OnnxConfig, OnnxExporter, OnnxRuntimeDynamicConfig, OnnxRuntimeQuantizer

from device_tests.onnx_model import session_options
from pipeline.bench_child import Order
from pipeline.peers.commands import Converted, files_in, serve

PREFILL, DECODE = "prefill", "decode"  # the components that it makes of a decoder
SAMPLE = torch.arange(2, 10)[None]  # [1, 8]; any ids do


def convert(checkpoint: Path, out: Path, options: dict) -> Converted:
    """``options``: ``ort_fusions`` as its config names them, ``dynamic_int8`` whether its quantizer follows."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, local_files_only=True).eval()
    quantizer = OnnxRuntimeQuantizer(OnnxRuntimeDynamicConfig(per_channel=True)) if options["dynamic_int8"] else None
    config = OnnxConfig(dynamic=True, ort_fusions=options["ort_fusions"], quantizer=quantizer)
    inputs = {"input_ids": SAMPLE, "attention_mask": torch.ones_like(SAMPLE)}
    OnnxExporter().export_for_generation(model, inputs, config).save_pretrained(out)
    return Converted(f"{DECODE}.onnx", files_in(out), notes=("two graphs, each with all weights",))


class ExportedSession:
    """The two exported graphs in their runners; the cache is what they hand back."""

    def __init__(self, folder: Path, order: Order) -> None:
        options = session_options(onnxruntime, order.threads)
        self.interface = order.sizes
        self.notes: list[str] = []
        self.runners = ExportedModel.from_pretrained(folder, local_files_only=True, session_options=options).runners
        self.reset()

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits ``[vocab]`` after the last of ``tokens`` int ``[n]``; its graph takes them only where the cache is empty."""
        if self.position:
            raise ValueError(f"the prefill graph starts at an empty cache, this one has {self.position} tokens")
        return self._run(PREFILL, tokens, {})

    def step(self, token: int) -> np.ndarray:
        """Logits ``[vocab]`` after one more token."""
        return self._run(DECODE, np.array([token]), {"past_key_values": self.cache})

    def reset(self) -> None:
        """Forget the cache."""
        self.cache, self.position = None, 0

    def _run(self, component: str, tokens: np.ndarray, past: dict) -> np.ndarray:
        ids = torch.from_numpy(np.asarray(tokens, dtype=np.int64))[None]
        end = self.position + ids.shape[1]
        places = {"position_ids": torch.arange(self.position, end)[None], "attention_mask": torch.ones(1, end, dtype=torch.int64)}
        found = self.runners[component](input_ids=ids, **places, **past)
        self.cache, self.position = found["past_key_values"], end
        return found["logits"][0, -1].numpy()


def prepare(order: Order) -> Callable[[], ExportedSession]:
    """Set PyTorch's threads, which the host's side of the loop uses; ``order.model`` is the decode graph."""
    torch.set_num_threads(order.threads)
    return lambda: ExportedSession(Path(order.model).parent, order)


if __name__ == "__main__":
    serve(convert, prepare)
