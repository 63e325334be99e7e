"""What ONNX Runtime's small builds need: the list of operators for a reduced build, and the model in ORT format for a minimal one.

Both come out of onnxruntime's own tools. ORT format has two styles. Fixed holds the graph as it will run and answers as the ONNX file
does, to the bit. Runtime holds notes from which the graph might be optimised later: without a session option that nobody sets,
an int8 graph then computes with dequantised weights, many times slower and otherwise rounded, and nothing says so. Only Fixed ships.
"""

import importlib
import logging
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from types import ModuleType

import numpy as np
import onnxruntime

from exporters.onnx_session import empty_past, run_tokens
from models.errors import GateError

FLATBUFFER_LIMIT_BYTES = 2**31 - 2**20  # offsets are signed 32-bit numbers
LEVELS = {
    "plain": onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "optimised": onnxruntime.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
OTHER_MACHINES = ["NchwcTransformer"]  # its layout suits the processor that saves, and may not that which loads
PROBE_TOKENS = 24


@dataclass(frozen=True)
class Graph:
    """An ONNX file: ``given`` are weights that the host hands over by name, ``library`` has operators that it needs."""

    path: Path
    given: dict[str, np.ndarray] = field(default_factory=dict)
    library: str | None = None


def write_required_operators(graphs: Iterable[Graph], target: Path) -> None:
    """Write ``target``, for ``build.sh --include_ops_by_config``: the operators of the graphs before and after optimisation.

    A reduced build that opens the ONNX files meets both: what stands in them, and what it fuses that to.
    """
    graphs = sorted(graphs, key=lambda graph: graph.path.name)
    with tempfile.TemporaryDirectory(prefix="operators-") as scratch:
        saved = []
        for place, graph in enumerate(graphs):
            for name, level in LEVELS.items():
                saved.append(Path(scratch) / f"{place}-{name}.ort")
                save(graph, saved[-1], level)
        made = Path(scratch) / "made.config"
        tool("").create_config_from_models(saved, made, enable_type_reduction=False)
        lines = [line for line in made.read_text(encoding="utf-8").splitlines() if line and not line.startswith("#")]
    header = [f"# Operators of {', '.join(graph.path.name for graph in graphs)}, before and after optimisation."]
    header += [f"# Written by the tools of onnxruntime {onnxruntime.__version__}, for: build.sh --include_ops_by_config {target.name}"]
    target.write_text("\n".join([*header, *lines]) + "\n", encoding="utf-8")


@cache
def tool(part: str) -> ModuleType:
    """A part of onnxruntime's tools for ORT format. Importing them sets up the logging of the whole process: that is taken back."""
    kept = logging.root.handlers[:]
    module = importlib.import_module(f"onnxruntime.tools.ort_format_model{part}")
    logging.root.handlers[:] = kept
    logging.getLogger("ort_format_model").setLevel(logging.WARNING)
    logging.getLogger("ort_format_model.utils").setLevel(logging.NOTSET)
    return module


def save(graph: Graph, path: Path, level: onnxruntime.GraphOptimizationLevel) -> None:
    """Save a graph in ORT format, Fixed style, as it is after optimising at ``level``."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # it warns of every saved graph that it might not fit another machine
    options.intra_op_num_threads = 1
    options.graph_optimization_level = level
    options.optimized_model_filepath = str(path)
    options.add_session_config_entry("session.save_model_format", "ORT")
    if graph.library:
        options.register_custom_ops_library(graph.library)
    if graph.given:
        values = [onnxruntime.OrtValue.ortvalue_from_numpy(array) for array in graph.given.values()]
        options.add_external_initializers(list(graph.given), values)
    onnxruntime.InferenceSession(str(graph.path), options, providers=["CPUExecutionProvider"], disabled_optimizers=OTHER_MACHINES)


def write_ort(model: Path, interface: dict) -> Path:
    """Write ``model`` beside itself in ORT format. GateError unless it is of Fixed style and answers as the ONNX file does, to the bit.

    Its bytes are not the same twice: onnxruntime writes one of its tables in the order of a hash that changes.
    """
    target = model.with_suffix(".ort")
    save(Graph(model), target, LEVELS["optimised"])
    check_fixed_style(target)
    expected, found = (probe(path, interface) for path in (model, target))
    difference = max(float(np.abs(one - other).max(initial=0)) for one, other in zip(expected, found, strict=True))
    if difference != 0:
        raise GateError(f"{target.name}: its outputs differ by up to {difference:.2g} from those of {model.name}; 0 is allowed")
    return target


def check_fixed_style(path: Path) -> None:
    """GateError for a file in ORT format's Runtime style, by either of its marks: saved notes, or int8 weights that are dequantised."""
    data, fbs = bytearray(path.read_bytes()), tool(".ort_flatbuffers_py.fbs")
    if not fbs.InferenceSession.InferenceSession.InferenceSessionBufferHasIdentifier(data, 0):
        raise GateError(f"{path.name}: not in ORT format")
    graph = fbs.InferenceSession.InferenceSession.GetRootAsInferenceSession(data, 0).Model().Graph()
    notes = graph.RuntimeOptimizations()
    if notes is not None and notes.RecordsLength():
        raise GateError(f"{path.name}: ORT format of Runtime style ({notes.RecordsLength()} kinds of saved optimisations); use Fixed")
    large = {tensor.Name() for tensor in map(graph.Initializers, range(graph.InitializersLength())) if tensor.DimsLength() > 1}
    for node in map(graph.Nodes, range(graph.NodesLength())):
        if node.OpType() == b"DequantizeLinear" and node.Inputs(0) in large:
            name = node.Inputs(0).decode()
            raise GateError(f"{path.name}: {name} is dequantised in every call, as in ORT format of Runtime style; use Fixed")


def probe(path: Path, interface: dict) -> list[np.ndarray]:
    """All outputs after a prompt of fixed ids, and after one more token."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    prompt = min(PROBE_TOKENS, interface["context_tokens"] - 1)
    ids = np.arange(1, prompt + 2)[None] % interface["vocab_size"]
    found, past = [], empty_past(session, 1)
    for tokens in (ids[:, :prompt], ids[:, prompt:]):
        logits, past = run_tokens(session, tokens, past)
        found += [logits, *past.values()]
    return [np.asarray(each, np.float32) for each in found]
