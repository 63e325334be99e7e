"""onnxruntime-genai: its model builder makes the graph from the checkpoint, its own loop runs it."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime_genai as og

from pipeline.bench_child import Order
from pipeline.peers.commands import Converted, files_in, run_module, serve

FILE = "model.onnx"


def convert(checkpoint: Path, out: Path, options: dict) -> Converted:
    """``options``: ``precision`` as the builder names it, ``extra`` its extra options."""
    extra = [f"{key}={value}" for key, value in options["extra"].items()]
    words = ["-i", str(checkpoint), "-o", str(out), "-p", options["precision"], "-e", "cpu", "-c", str(out / "cache")]
    run_module("onnxruntime_genai.models.builder", [*words, *(["--extra_options", *extra] if extra else [])])
    return Converted(FILE, files_in(out), notes=(f"builder options: {' '.join(extra)}",) if extra else ())


class GenaiSession:
    """A generator of onnxruntime-genai, fed token by token; ``reset`` takes a new one, whose buffers are not timed."""

    def __init__(self, folder: Path, order: Order) -> None:
        config = og.Config(str(folder))
        session = {"intra_op_num_threads": order.threads, "inter_op_num_threads": 1}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        self.interface = order.sizes
        self.notes: list[str] = []
        self.model = og.Model(config)
        self.reset()

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits ``[vocab]`` after the last of ``tokens`` int ``[n]``."""
        self.generator.append_tokens(np.array(tokens, dtype=np.int32)[None])  # a copy: it takes writeable arrays only
        self.position += len(tokens)
        return self.generator.get_logits()[0, -1]

    def step(self, token: int) -> np.ndarray:
        """Logits ``[vocab]`` after one more token."""
        return self.prefill(np.array([token]))

    def reset(self) -> None:
        """Forget the cache."""
        params = og.GeneratorParams(self.model)
        params.set_search_options(max_length=self.interface.context_tokens, do_sample=False)
        self.generator = og.Generator(self.model, params)
        self.position = 0


def prepare(order: Order) -> Callable[[], GenaiSession]:
    """``order.model`` is the graph in the builder's folder."""
    return lambda: GenaiSession(Path(order.model).parent, order)


if __name__ == "__main__":
    serve(convert, prepare)
