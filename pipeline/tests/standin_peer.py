"""A peer for tests: its model is a count in a file, its logits name the next number. It notes every conversion."""

import os
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from pipeline.bench_child import Order
from pipeline.peers.commands import Converted, serve


def convert(checkpoint: Path, out: Path, options: dict) -> Converted:
    """Fails where it is told to; else copies the weights' length."""
    with (checkpoint / "conversions").open("a") as file:
        file.write("x")
    if options["fails"]:
        sys.exit("no such operator")
    (out / "model.bin").write_bytes(b"0" * options["bytes"])
    return Converted("model.bin", ("model.bin",), options["bytes"], ("a stand-in",))


class Counting:
    """After token n comes n + 1."""

    def __init__(self, order: Order) -> None:
        self.interface, self.position, self.notes = order.sizes, 0, [f"{order.threads} threads"]

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self.position += len(tokens)
        logits = np.zeros(self.interface.vocab_size, np.float32)
        logits[(int(tokens[-1]) + 1) % len(logits)] = 1
        return logits

    def step(self, token: int) -> np.ndarray:
        return self.prefill(np.array([token]))

    def reset(self) -> None:
        self.position = 0


def prepare(order: Order) -> Callable[[], Counting]:
    """``order.model`` may ask for misbehaviour by its name; every run is noted where the environment says."""
    with Path(os.environ["STANDIN_LOG"]).open("a") as file:
        file.write(f"{Path(order.model).name} {order.threads}{' scored' if order.golden else ''}\n")
    if "hangs" in order.model:
        time.sleep(60)
    if "breaks" in order.model:
        raise RuntimeError("it broke")
    return lambda: Counting(order)


if __name__ == "__main__":
    serve(convert, prepare)
