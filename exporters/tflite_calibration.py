"""Ranges of the tensors that static int8 quantises, from real text fed as prompts and as decode steps.

AI Edge Quantizer's own calibrator keeps a moving average, which clips the rare large values that decode meets, wants all
feeds in memory and copies every tensor of the graph, weights included. Here windows stream through the interpreter one by
one and only the minimum and maximum of each channel are kept, and bounded samples of inputs and logits, so memory does not
depend on the number of windows.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from ai_edge_litert import interpreter as litert

from exporters.tflite_replay import Replay
from exporters.tflite_signatures import DECODE, copy_with, usual_prefill
from exporters.tflite_structure import Operator

QUANTISED = "FULLY_CONNECTED"
SAMPLED_LOGITS = 2**22  # numbers kept at most of the logits, from which their range is chosen
SAMPLED_INPUTS = 2**18  # numbers kept at most of the input of each quantised operator
ROWS_PER_CALL = 4  # rows of an input considered for the sample in one call


@dataclass(frozen=True)
class Calibration:
    """``ranges`` and sampled rows of ``inputs`` [n, channels] by tensor name; ``logits`` [n, vocab] from prompts and steps."""

    ranges: dict[str, "ChannelRange"]
    inputs: dict[str, np.ndarray]
    logits: np.ndarray


class RowSample:
    """Rows spread evenly over all that were offered, never more than ``limit`` numbers (but two rows at least)."""

    def __init__(self, limit: int):
        self.limit = limit
        self.rows: list[np.ndarray] = []
        self.offered, self.stride = 0, 1

    def offer(self, row: np.ndarray) -> None:
        """Keep every n-th row; when they get too many, forget every second one and double n."""
        if self.offered % self.stride == 0:
            self.rows.append(row.copy())
        self.offered += 1
        if len(self.rows) > max(2, self.limit // row.size):
            self.rows = self.rows[::2]
            self.stride *= 2


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
        """``found`` are the operators of the file in the interpreter, or of one with more signatures."""
        super().__init__(interpreter)
        self.interpreter = interpreter
        self.ranges: dict[str, ChannelRange] = {}
        self.logits = RowSample(SAMPLED_LOGITS)
        self.inputs = {operator.inputs[0].name: RowSample(SAMPLED_INPUTS) for operator in found if operator.name == QUANTISED}
        # The index of a subgraph is that of its signature: a file has one subgraph per signature, in order.
        fed = dict.fromkeys(operator.signature for operator in found if operator.signature in self.signatures)
        self.subgraphs = {name: index for index, name in enumerate(fed)}
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
        self.logits.offer(logits)
        for tensor in self.watched[name].values():
            values = self.interpreter.get_tensor(tensor.index, self.subgraphs[name])
            rows = values.reshape(-1, values.shape[-1])  # [chunk or 1, channels]
            rows = rows[: len(tokens)]
            seen = self.ranges.get(tensor.name)
            if seen is None:
                self.ranges[tensor.name] = ChannelRange(rows.min(0), rows.max(0))
            else:
                seen.include(rows)
            if tensor.name in self.inputs:
                for row in rows[:: max(1, len(rows) // ROWS_PER_CALL)]:
                    self.inputs[tensor.name].offer(row)
        return logits


def calibrate(path: Path, found: list[Operator], windows: Iterable[np.ndarray], decode_steps: int) -> Calibration:
    """Each window is fed as a prompt in chunks of usual length, its last ``decode_steps`` tokens one by one."""
    with tempfile.TemporaryDirectory() as folder:
        wanted = (DECODE, usual_prefill(operator.signature for operator in found))
        interpreter = litert.Interpreter(
            model_path=str(copy_with(path, wanted, Path(folder) / path.name)),
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
            replay.call(DECODE, np.array([token]))
    share_between_signatures(replay.ranges, found)
    return Calibration(
        replay.ranges,
        {name: np.array(sample.rows) for name, sample in replay.inputs.items() if sample.rows},
        np.array(replay.logits.rows),
    )


def share_between_signatures(ranges: dict[str, ChannelRange], found: list[Operator]) -> None:
    """Give the same layer one range in all signatures: decode steps are few, prompts are many, and not every length of call is fed."""
    first: dict[tuple[int, int], Operator] = {}
    met: Counter = Counter()
    linear = [operator for operator in found if operator.name == QUANTISED]
    for operator in sorted(linear, key=lambda operator: operator.inputs[0].name not in ranges):  # those that were fed come first
        weight = operator.inputs[1].buffer
        twin = first.setdefault((weight, met[operator.signature, weight]), operator)
        met[operator.signature, weight] += 1  # a layer that was split reads its weight twice
        for mine, other in ((operator.inputs[0], twin.inputs[0]), (operator.outputs[0], twin.outputs[0])):
            seen = ranges[other.name]
            if mine.name in ranges:
                seen.include(np.stack([ranges[mine.name].low, ranges[mine.name].high]))
            ranges[mine.name] = seen
