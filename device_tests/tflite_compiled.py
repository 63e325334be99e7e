"""LiteRT's CompiledModel: one packed copy of the weights for all signatures, one cache that all of them read where it lies.

The Interpreter API packs the weights anew for each signature, and copies the whole cache in at each call. Here XNNPACK's weight
cache, kept in memory, finds what another signature has packed; and signatures share tensor buffers. Python has no public way to
write to a part of a buffer, so its address is asked from the C API of the same package, and proved before it is used.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import tempfile
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np

from device_tests.tflite_calls import DECODE, Details, input_shape, is_cache, resized, rows_of

WEIGHT_CACHE = ":memory"  # XNNPACK's name for one that is no file: a file would have to be thrown away whenever the model changes
WEIGHT_CACHE_MAP = "XNNPack in-memory weight cache"
CAPSULE = b"LiteRtTensorBuffer"


class CompiledUnavailable(Exception):
    """This package has no CompiledModel that can be used as this module does; the reason in one line."""


class CompiledCalls:
    """The signatures of a file in LiteRT's CompiledModel; see ``Calls``. Float caches alone: it tells no scales of int8 tensors."""

    resizable = True

    def __init__(self, path: Path, signatures: list[str], threads: int, library: ModuleType) -> None:
        """``library`` is the module ``ai_edge_litert.compiled_model``. CompiledUnavailable, or what the runtime says of the file."""
        options = library.Options(cpu_options=library.CpuOptions(num_threads=threads, xnnpack_weight_cache_path=WEIGHT_CACHE))
        self._address = address_of(Path(library.__file__).parent)
        with unheard():
            model = library.CompiledModel.from_file(str(path), environment=environment(library), options=options)
        self._model, self._buffers = model, {}
        listed = model.get_signature_list()
        if missing := [name for name in signatures if name not in listed]:
            raise ValueError(f"it has no signature {missing[0]}; export the artifact again")
        self._order = {name: listed[name] for name in signatures}
        self._index = {name: model.get_signature_index(name) for name in signatures}
        self.inputs = {name: described(model.get_input_tensor_details(name)) for name in signatures}
        self.outputs = {name: described(model.get_output_tensor_details(name)) for name in signatures}
        if any(tensor["dtype"] != np.float32 for name, tensor in self.inputs[DECODE].items() if is_cache(name)):
            raise CompiledUnavailable("its cache is not float32, and CompiledModel tells no scales")
        self._rows = {name: int(self.inputs[name]["mask"]["shape"][3] - self.inputs[name]["mask"]["shape"][2]) for name in signatures}
        self._results = {name: self._made(name, "output") for name in signatures}
        self._feeds: dict[str, dict[str, np.ndarray]] = {}
        self.caches = self._made(DECODE, "input", caches=True)
        self._prove()

    def hold(self, rows: int) -> None:
        """See ``Calls``."""
        if rows == rows_of(self.caches):
            return
        old, kept = self.caches, dict(self._buffers)  # the arrays lie in the buffers, and do not keep them
        self._resize(DECODE, rows)
        made = self._made(DECODE, "input", caches=True)
        for name, slots in made.items():
            slots[:] = resized(old[name], rows, np.float32(0))
        kept.clear()
        self.caches = made
        self._feeds.clear()

    def feeds(self, signature: str) -> dict[str, np.ndarray]:
        """See ``Calls``."""
        if signature not in self._feeds:
            self._resize(signature, rows_of(self.caches))
            self._feeds[signature] = self._made(signature, "input")
        return self._feeds[signature]

    def run(self, signature: str) -> dict[str, np.ndarray]:
        """See ``Calls``."""
        listed = self._order[signature]
        inputs = [self._buffers[DECODE if is_cache(name) else signature, "input", name] for name in listed["inputs"]]
        outputs = [self._buffers[signature, "output", name] for name in listed["outputs"]]
        self._model.run_by_index(self._index[signature], inputs, outputs)
        return self._results[signature]

    def _resize(self, signature: str, rows: int) -> None:
        """Let a signature read caches of ``rows`` slots."""
        if self._rows[signature] == rows:
            return
        for place, name in enumerate(self._order[signature]["inputs"]):
            if is_cache(name) or name == "mask":
                shape = input_shape(name, self.inputs[signature][name], rows)
                self._model.resize_input_tensor(place, list(shape), self._index[signature], strict=False)
        self._rows[signature] = rows

    def _made(self, signature: str, side: str, caches: bool = False) -> dict[str, np.ndarray]:
        """New zero-filled buffers of a signature's inputs, the caches or all others, or of its outputs; what is written there by name."""
        found = {}
        create = getattr(self._model, f"create_{side}_buffer_by_name")
        for name in self._order[signature][f"{side}s"]:
            if side == "output" or is_cache(name) == caches:
                buffer = create(signature, name)
                self._buffers[signature, side, name] = buffer
                tensor = (self.inputs if side == "input" else self.outputs)[signature][name]
                found[name] = self._view(buffer, input_shape(name, tensor, self._rows[signature]), np.dtype(tensor["dtype"]))
        return found

    def _view(self, buffer, shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
        """The buffer's memory as an array filled with zeros; valid as long as the buffer is kept."""
        memory = (ctypes.c_uint8 * (int(np.prod(shape)) * dtype.itemsize)).from_address(self._address(buffer.capsule))
        array = np.frombuffer(memory, dtype).reshape(shape)
        array[:] = 0
        return array

    def _prove(self) -> None:
        """CompiledUnavailable unless an address is that of what the runtime itself writes to."""
        self.feeds(DECODE)
        for array in self._results[DECODE].values():
            array[:] = np.nan
        try:
            with unheard():  # the first call makes an environment of its own
                found = self.run(DECODE)
        except RuntimeError as error:
            raise CompiledUnavailable(str(error)) from error
        if any(np.isnan(array).any() for array in found.values()):
            raise CompiledUnavailable("its tensor buffers do not lie where its C API says")


def weights_are_packed() -> bool | None:
    """Whether XNNPACK has packed weights in this process, as the memory map tells; None where there is none to read.

    It is the only sign of XNNPACK that a CompiledModel gives: embeddings are never delegated, so it is never fully accelerated.
    """
    try:
        return WEIGHT_CACHE_MAP in Path("/proc/self/maps").read_text(encoding="ascii", errors="replace")
    except OSError:  # not Linux
        return None


def described(details: dict[str, Details]) -> dict[str, Details]:
    """A signature's tensors as an interpreter describes them; float ones have no scale."""
    return {name: {**tensor, "dtype": np.dtype(tensor["dtype"]).type, "quantization": (0.0, 0)} for name, tensor in details.items()}


def address_of(package: Path):
    """A function that gives the address of a tensor buffer's memory, by its capsule. CompiledUnavailable without the C API."""
    try:
        library = ctypes.CDLL(str(package / "libLiteRt.so"))
        ask = library.LiteRtGetTensorBufferHostMemory
    except (OSError, AttributeError) as error:
        raise CompiledUnavailable(f"its package has no C API ({error})") from error
    ask.argtypes, ask.restype = [ctypes.c_void_p, ctypes.c_void_p], ctypes.c_int
    pointer = ctypes.pythonapi.PyCapsule_GetPointer
    pointer.argtypes, pointer.restype = [ctypes.py_object, ctypes.c_char_p], ctypes.c_void_p

    def address(capsule) -> int:
        found = ctypes.c_void_p()
        if ask(pointer(capsule, CAPSULE), ctypes.byref(found)) or not found.value:
            raise CompiledUnavailable("its tensor buffers are not in host memory")
        return found.value

    return address


@cache
def environment(library: ModuleType):
    """LiteRT's environment of this process, kept until it ends.

    Then it is let go, and so is one that the first call makes for itself, and both say so on the error stream: below what the
    program said last, where its parent looks for the reason of a failure. So the stream is closed before.
    """
    atexit.register(lambda: os.dup2(os.open(os.devnull, os.O_WRONLY), 2))
    return library.Environment.create()


@contextlib.contextmanager
def unheard() -> Iterator[None]:
    """Nothing that native code writes to the error stream is seen; where it fails, its last error goes into the RuntimeError.

    LiteRT tells of every accelerator that it looks for, and Python cannot turn that off.
    """
    try:
        kept = os.dup(2)
    except OSError:  # closed, so nothing is seen anyway
        yield
        return
    with tempfile.TemporaryFile() as heard:
        os.dup2(heard.fileno(), 2)
        try:
            yield
        except RuntimeError as error:
            heard.seek(0)
            lines = [line for line in heard.read().decode(errors="replace").splitlines() if "ERROR" in line]
            raise RuntimeError("; ".join([str(error), *lines[-1:]])) from error
        finally:
            os.dup2(kept, 2)
            os.close(kept)
