"""llama.cpp through llama-cpp-python, built on this machine; converter and quantiser come with its source package."""

import ctypes
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np

from pipeline.bench_child import Order
from pipeline.peers.commands import Converted, as_of_transformers_4, run_module, serve

SOURCE = Path(sys.prefix).parent / "source" / "vendor" / "llama.cpp"
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
BATCH_TOKENS = 512  # llama.cpp's own default for n_ubatch
UNKNOWN_SPLITTER = "gpt-2"


def convert(checkpoint: Path, out: Path, options: dict) -> Converted:
    """``options``: ``type``, a file type as llama.cpp names it, such as Q8_0. An fp32 file is made on the way and removed."""
    path = out / f"{options['type']}.gguf"
    with tempfile.TemporaryDirectory(dir=out) as folder:
        plain, prepared = Path(folder) / "f32.gguf", Path(folder) / "checkpoint"
        prepared.mkdir()
        to_gguf(as_of_transformers_4(checkpoint, prepared), plain)
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{options['type']}")
        llama_cpp.llama_backend_init()
        if code := llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), ctypes.byref(params)):
            raise RuntimeError(f"llama_model_quantize ended with {code}")
    bytes_read, types = described(path)
    return Converted(path.name, (path.name,), bytes_read, (f"matrices: {types}",))


def to_gguf(checkpoint: Path, path: Path) -> None:
    """Run the converter. It knows tokenizers by a hash and refuses others; here tokens go in as ids, so any splitter will do."""
    sys.path[:0] = [str(SOURCE), str(SOURCE / "gguf-py")]
    from conversion.base import TextModel

    known = TextModel.get_vocab_base_pre

    def known_or_any(self, tokenizer) -> str:
        try:
            return known(self, tokenizer)
        except NotImplementedError:
            return UNKNOWN_SPLITTER

    TextModel.get_vocab_base_pre = known_or_any
    run_module("convert_hf_to_gguf", [str(checkpoint), "--outfile", str(path), "--outtype", "f32"])


def described(path: Path) -> tuple[int, str]:
    """Bytes that a token reads (all tensors, but an embedding that is no head), and how many matrices have which type."""
    from gguf import GGUFReader

    tensors = GGUFReader(path).tensors
    names = {tensor.name for tensor in tensors}
    read = sum(int(tensor.n_bytes) for tensor in tensors if tensor.name != EMBEDDING or HEAD not in names)
    types = Counter(tensor.tensor_type.name for tensor in tensors if len(tensor.shape) > 1)
    return read, ", ".join(f"{count} {name}" for name, count in types.most_common())


class LlamaSession:
    """A model and a context of llama.cpp's C interface."""

    def __init__(self, path: Path, order: Order) -> None:
        self.interface = order.sizes
        self.notes: list[str] = []
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if not self.model:
            raise RuntimeError(f"llama.cpp cannot open {path.name}")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = self.interface.context_tokens
        params.n_batch = params.n_ubatch = BATCH_TOKENS
        params.n_threads = params.n_threads_batch = order.threads
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if not self.context:
            raise RuntimeError(f"llama.cpp cannot make a context of {self.interface.context_tokens} tokens")
        self.position = 0

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        """Logits ``[vocab]`` after the last of ``tokens`` int ``[n]``; a view that the next call overwrites."""
        ids = np.array(tokens, dtype=np.int32)
        for start in range(0, len(ids), BATCH_TOKENS):
            self._decode(ids[start : start + BATCH_TOKENS])
        logits = llama_cpp.llama_get_logits_ith(self.context, -1)
        return np.ctypeslib.as_array(logits, shape=(self.interface.vocab_size,))

    def step(self, token: int) -> np.ndarray:
        """Logits ``[vocab]`` after one more token."""
        return self.prefill(np.array([token]))

    def reset(self) -> None:
        """Forget the cache."""
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self.context), True)
        self.position = 0

    def _decode(self, ids: np.ndarray) -> None:
        pointer = ids.ctypes.data_as(ctypes.POINTER(llama_cpp.llama_token))
        if code := llama_cpp.llama_decode(self.context, llama_cpp.llama_batch_get_one(pointer, len(ids))):
            raise RuntimeError(f"llama_decode ended with {code} at token {self.position}")
        self.position += len(ids)


def prepare(order: Order) -> Callable[[], LlamaSession]:
    """Start the library; ``order.model`` is a .gguf file."""
    llama_cpp.llama_backend_init()
    return lambda: LlamaSession(Path(order.model), order)


if __name__ == "__main__":
    serve(convert, prepare)
