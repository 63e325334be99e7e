"""Ranges of the tensors that static int8 quantises, from real text fed through ``prefill`` and ``decode``.

AI Edge Quantizer's own calibrator keeps a moving average, which clips the rare large values that decode meets, wants all
feeds in memory and copies every tensor of the graph, weights included. Here windows stream through the interpreter one by
one and only the minimum and maximum of each channel are kept, and a bounded sample of logits, so memory does not depend on
the number of windows.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ai_edge_litert import interpreter as litert

from exporters.tflite_replay import Replay
from exporters.tflite_structure import Operator

QUANTISED = "FULLY_CONNECTED"
SAMPLED_LOGITS = 2**22  # numbers kept at most of the logits, from which their range is chosen


@dataclass(frozen=True)
class Calibration:
    """``ranges`` by tensor name; ``logits`` [rows, vocab] is a sample from prompts and decode steps."""

    ranges: dict[str, "ChannelRange"]
    logits: np.ndarray


@dataclass
class ChannelRange:
    """Smallest and largest value seen in each channel (last axis) of an activation, each [channels]."""

    low: np.ndarray
    high: np.ndarray

    def include(self, rows: np.ndarray) -> None:
        """Widen by ``rows`` [n, channels]."""
        np.minimum(self.low, rows.min(0), out=self.low)
        np.maximum(self.high, rows.max(0), out=self.high)

    @property
    def largest(self) -> np.ndarray:
        """Largest magnitude of each channel [channels]."""
        return np.maximum(np.abs(self.low), np.abs(self.high))


class ObservedReplay(Replay):
    """A replay that looks at the inputs and outputs of the quantised operators after every call."""

    def __init__(self, interpreter: litert.Interpreter, found: list[Operator]):
        super().__init__(interpreter)
        self.interpreter = interpreter
        self.ranges: dict[str, ChannelRange] = {}
        self.logits: list[np.ndarray] = []
        self.calls, self.stride = 0, 1
        # The index of a subgraph is that of its signature: the converter writes one subgraph per signature, in order.
        self.subgraphs = {name: index for index, name in enumerate(dict.fromkeys(operator.signature for operator in found))}
        self.watched = {
            name: {
                tensor.index: tensor
                for operator in found
                if operator.signature == name and operator.name == QUANTISED
                for tensor in (operator.inputs[0], operator.outputs[0])
            }
            for name in self.subgraphs
        }

    def call(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """Logits [vocab], as ``Replay.call``; padding rows of a chunk are left out of the ranges."""
        logits = super().call(name, tokens)
        self.sample(logits)
        for tensor in self.watched[name].values():
            values = self.interpreter.get_tensor(tensor.index, self.subgraphs[name])
            rows = values.reshape(-1, values.shape[-1])  # [chunk or 1, channels]
            rows = rows[: len(tokens)]
            seen = self.ranges.get(tensor.name)
            if seen is None:
                self.ranges[tensor.name] = ChannelRange(rows.min(0), rows.max(0))
            else:
                seen.include(rows)
        return logits

    def sample(self, logits: np.ndarray) -> None:
        """Keep every n-th row of logits; when they get too many, forget half of them and double n."""
        if self.calls % self.stride == 0:
            self.logits.append(logits.copy())
        self.calls += 1
        if len(self.logits) > max(2, SAMPLED_LOGITS // logits.size):
            self.logits = self.logits[::2]
            self.stride *= 2


def calibrate(path: Path, found: list[Operator], windows: Iterable[np.ndarray], decode_steps: int) -> Calibration:
    """Each window is fed as a prompt in chunks, its last ``decode_steps`` tokens one by one."""
    interpreter = litert.Interpreter(
        model_path=str(path),
        num_threads=1,
        experimental_op_resolver_type=litert.OpResolverType.BUILTIN,
        experimental_preserve_all_tensors=True,
    )
    replay = ObservedReplay(interpreter, found)
    for window in windows:
        replay.reset()
        prompt = max(1, len(window) - decode_steps)
        replay.prompt(window[:prompt])
        for token in window[prompt:]:
            replay.call("decode", np.array([token]))
    share_between_signatures(replay.ranges, found)
    return Calibration(replay.ranges, np.array(replay.logits))


def share_between_signatures(ranges: dict[str, ChannelRange], found: list[Operator]) -> None:
    """Widen the ranges of tensors around the same weight to each other: decode steps are few, prompts are many."""
    first: dict[int, Operator] = {}
    for operator in found:
        if operator.name == QUANTISED:
            twin = first.setdefault(operator.inputs[1].buffer, operator)
            for mine, other in ((operator.inputs[0], twin.inputs[0]), (operator.outputs[0], twin.outputs[0])):
                for end in (ranges[mine.name], ranges[other.name]):
                    ranges[mine.name].include(np.stack([end.low, end.high]))
                ranges[other.name] = ranges[mine.name]
