"""The signatures of a TFLite file, read without any runtime: what a program that runs one by itself has to be fed, in which order.

Source: schema.fbs of TensorFlow Lite. Fields are numbered by their place in a table there.
"""

from __future__ import annotations

import mmap
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from device_tests.errors import DeviceTestError

TYPES = {0: np.float32, 1: np.float16, 2: np.int32, 3: np.uint8, 4: np.int64, 7: np.int16, 9: np.int8}


@dataclass(frozen=True)
class Tensor:
    """``key`` is the signature's name of it, ``name`` the tensor's own; ``quantization`` (scale, zero point), scale 0 for none."""

    key: str
    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    quantization: tuple[float, int]

    @property
    def bytes(self) -> int:
        """Length of its values."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs in the order of the signature's graph."""

    inputs: list[Tensor]
    outputs: list[Tensor]


def read_signatures(path: Path) -> dict[str, Signature]:
    """Signatures by name. DeviceTestError when the file is no TFLite file or has a tensor of an unknown type."""
    try:
        with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            if data[4:8] != b"TFL3":
                raise ValueError("it does not begin as one")
            model = _Table(data, struct.unpack_from("<I", data, 0)[0])
            graphs = model.tables(2)
            return {definition.text(2): _signature(definition, graphs) for definition in model.tables(7)}
    except (OSError, ValueError, KeyError, IndexError, struct.error) as error:
        raise DeviceTestError(f"{path}: not a TFLite file that can be fed ({error}); export the artifact again") from error


def _signature(definition: _Table, graphs: list[_Table]) -> Signature:
    graph = graphs[definition.number(4, "I")]
    tensors = graph.tables(0)
    sides = []
    for side in (0, 1):  # inputs, outputs
        keys = {named.number(1, "I"): named.text(0) for named in definition.tables(side)}
        sides.append([_tensor(tensors[index], keys[index]) for index in graph.numbers(side + 1, "i")])
    return Signature(*sides)


def _tensor(table: _Table, key: str) -> Tensor:
    quantization = table.table(4)
    scales = quantization.numbers(2, "f") if quantization else []
    zero_points = quantization.numbers(3, "q") if quantization else []
    return Tensor(
        key=key,
        name=table.text(3),
        dtype=np.dtype(TYPES[table.number(1, "b")]),
        shape=tuple(table.numbers(0, "i")),
        quantization=(scales[0], zero_points[0] if zero_points else 0) if len(scales) == 1 else (0.0, 0),
    )


class _Table:
    """A flatbuffer table at ``start``. A field that is left out is 0 or empty."""

    def __init__(self, data: mmap.mmap, start: int) -> None:
        self._data = data
        self._start = start
        self._fields = start - struct.unpack_from("<i", data, start)[0]
        self._size = struct.unpack_from("<H", data, self._fields)[0]

    def _place(self, field: int) -> int:
        entry = 4 + 2 * field
        offset = struct.unpack_from("<H", self._data, self._fields + entry)[0] if entry < self._size else 0
        return self._start + offset if offset else 0

    def _follow(self, place: int) -> int:
        return place + struct.unpack_from("<I", self._data, place)[0]

    def number(self, field: int, kind: str) -> int:
        """A number stored in the table; ``kind`` is struct's letter."""
        place = self._place(field)
        return struct.unpack_from("<" + kind, self._data, place)[0] if place else 0

    def numbers(self, field: int, kind: str) -> list:
        """A vector of numbers."""
        place = self._place(field)
        if not place:
            return []
        start = self._follow(place)
        count = struct.unpack_from("<I", self._data, start)[0]
        return list(struct.unpack_from(f"<{count}{kind}", self._data, start + 4))

    def text(self, field: int) -> str:
        """A string."""
        return bytes(self.numbers(field, "B")).decode("utf-8")

    def table(self, field: int) -> _Table | None:
        """A table that this one points to."""
        place = self._place(field)
        return _Table(self._data, self._follow(place)) if place else None

    def tables(self, field: int) -> list[_Table]:
        """A vector of tables."""
        place = self._place(field)
        if not place:
            return []
        start = self._follow(place)
        count = struct.unpack_from("<I", self._data, start)[0]
        return [_Table(self._data, self._follow(start + 4 + 4 * index)) for index in range(count)]
