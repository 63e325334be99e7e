"""Calibration windows through a decoder one layer at a time, each layer fed by the layers before it as they are by then.

Held are the residual stream at one layer boundary, in a file where it is large, and what the caller gathers from one group of
linear layers. So memory does not grow with the number of windows.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from tempfile import SpooledTemporaryFile
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

from models.families import LayerParts, decoder_layers, layer_parts, linear_layers
from models.progress import track
from pipeline.importance import watch_inputs

BATCH_WINDOWS = 4
STREAM_BYTES = 256 * 2**20  # of the residual stream kept in memory; a longer one is in a file

See = Callable[[torch.Tensor], None]  # takes inputs [tokens, channels]


@dataclass(frozen=True)
class InputGroup:
    """Linear layers that read the same input. ``run(see)`` calls ``see`` with that input, batch by batch."""

    names: tuple[str, ...]
    modules: tuple[nn.Module, ...]
    run: Callable[[See], None]


@dataclass(frozen=True)
class Call:
    """What a decoder layer is called with beside the residual stream."""

    positional: tuple
    named: dict

    def __call__(self, layer: nn.Module, stream: torch.Tensor) -> torch.Tensor:
        return layer(stream, *self.positional, **self.named)


@dataclass
class Stream:
    """The residual stream ``[windows, seq, hidden]`` before a layer, in batches; overwritten batch by batch after it."""

    file: SpooledTemporaryFile
    shapes: list[tuple[int, ...]] = field(default_factory=list)
    dtype: torch.dtype = torch.float32

    def __len__(self) -> int:
        return len(self.shapes)

    def append(self, batch: torch.Tensor) -> None:
        self.shapes.append(tuple(batch.shape))
        self.dtype = batch.dtype
        self.write(len(self) - 1, batch)

    def write(self, index: int, batch: torch.Tensor) -> None:
        self.file.seek(self._offset(index))
        self.file.write(batch.detach().contiguous().view(torch.uint8).numpy().data)

    def read(self, index: int) -> torch.Tensor:
        self.file.seek(self._offset(index))
        content = bytearray(self.file.read(prod(self.shapes[index]) * self.dtype.itemsize))
        return torch.frombuffer(content, dtype=self.dtype).reshape(self.shapes[index])

    def _offset(self, index: int) -> int:
        return index * prod(self.shapes[0]) * self.dtype.itemsize  # only the last batch may be smaller


def walk(model: PreTrainedModel, windows: torch.Tensor, description: str, scratch: Path | None = None) -> Iterator[InputGroup]:
    """Yield the groups of linear layers in the order in which data flows; what follows sees what was done to those before.

    ``windows`` int64 ``[count, seq]``; a large stream lies in a nameless file in ``scratch``.
    """
    names = {id(module): name for name, module in linear_layers(model).items()}
    with SpooledTemporaryFile(STREAM_BYTES, dir=scratch) as file:
        stream = Stream(file)
        calls = enter(model, windows, stream)
        layers = list(zip(decoder_layers(model), layer_parts(model), calls, strict=True))
        for layer, parts, by_rows in track(layers, description):
            for modules in input_groups(parts):
                group_names = tuple(names[id(module)] for module in modules)
                yield InputGroup(group_names, modules, _watcher(layer, by_rows, stream, modules[0]))
            for index, outputs in _outputs(layer, by_rows, stream):
                stream.write(index, outputs)


def input_groups(parts: LayerParts) -> list[tuple[nn.Module, ...]]:
    """The linear layers of a decoder layer by the input that they share, in the order in which data flows."""
    projections = ((parts.q, parts.k, parts.v), (parts.o,), parts.ffn_inputs, (parts.down,))
    return [tuple({id(each.module): each.module for each in group}.values()) for group in projections]


@torch.no_grad()
def enter(model: PreTrainedModel, windows: torch.Tensor, stream: Stream) -> list[dict[int, Call]]:
    """Fill ``stream`` with the input of the first layer; by layer and by batch size, what the model calls the layer with.

    The layers are told to do nothing for that long, so that this costs the embedding alone.
    """
    layers = decoder_layers(model)
    calls: list[dict[int, Call]] = [{} for _ in layers]

    def recorder(number: int) -> Callable:
        def record(hidden: torch.Tensor, *positional, **named) -> torch.Tensor:
            if number == 0:
                stream.append(hidden)
            calls[number][len(hidden)] = Call(positional, named)
            return hidden

        return record

    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            stack.enter_context(patch.object(layer, "forward", recorder(number)))
        for batch in windows.split(BATCH_WINDOWS):
            model.base_model(batch, use_cache=False)
    return calls


def _watcher(layer: nn.Module, calls: dict[int, Call], stream: Stream, module: nn.Module) -> Callable[[See], None]:
    def run(see: See) -> None:
        with watch_inputs([module], lambda _, inputs: see(inputs.flatten(0, -2))):
            for _ in _outputs(layer, calls, stream):
                pass

    return run


def _outputs(layer: nn.Module, calls: dict[int, Call], stream: Stream) -> Iterator[tuple[int, torch.Tensor]]:
    """The layer's output for every batch of the stream, by number."""
    for index in range(len(stream)):
        hidden = stream.read(index)
        with torch.no_grad():
            outputs = calls[len(hidden)](layer, hidden)
        yield index, outputs
