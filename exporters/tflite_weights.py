"""TFLite files whose weights alone are stored as int8, with AI Edge Quantizer's recipes dynamic_wi8_afp32 and weight_only_wi8_afp32.

Shared by the stages tflite_dynamic_int8 and tflite_weight_only_int8, which say why they differ. A file is claimed for those
runtimes in which its logits were found right; what was found in the others stands in the sidecar.
"""

import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from ai_edge_quantizer import qtyping, quantizer

from exporters.artifact import read_sidecar, sha256_of, write_sidecar
from exporters.tflite_equalise import equalise_rows
from exporters.tflite_parity import Feeds, check_all_lengths, replay
from exporters.tflite_replay import RUNTIMES
from exporters.tflite_structure import check_loadable, operator_counts, operators, read_model, tensor_contract, write_model
from exporters.tflite_weight_coverage import check_weights
from models.errors import GateError
from models.settings import StageSettings

PARENT = "tflite_fp32"
CHECKED_SEQUENCES, CHECKED_STEPS = 4, 64  # of the validation text: prompts, and tokens after each
LIBRARIES = ("ai-edge-quantizer", "ai-edge-litert", "tflite-runtime", "flatbuffers", "numpy")


@dataclass(frozen=True)
class Kind:
    """``dequantised``: weights are made float again and computing is float; otherwise the runtime quantises activations too."""

    name: str
    dequantised: bool


def export(kind: Kind, settings: StageSettings, out: Path, tflite: Path, text: Path) -> None:
    """Write the int8 file made from the float one in ``tflite``, prove it on the validation text, and describe it."""
    parent_path, path = tflite / f"{PARENT}.tflite", out / f"{kind.name}.tflite"
    parent = read_sidecar(tflite / f"{PARENT}.json")
    quantise(kind, parent_path, path)
    graph = read_model(path)
    found = operators(graph)
    check_loadable(found, kind.name)
    coverage = check_weights(found, operators(read_model(parent_path)), kind.name, kind.dequantised)
    compared = compare(path, parent_path, np.load(text / "validation.npy"), parent["interface"])
    write_sidecar(
        out,
        kind.name,
        "tflite",
        files=[path],
        interface=parent["interface"],
        tensors=tensor_contract(graph),
        parent=sha256_of(parent_path),
        settings=settings,
        runtimes=compared.runtimes,
        measured={
            "coverage": asdict(coverage),
            "not_int8": [],  # check_weights lets nothing else through
            "bits_per_weight": 8 * path.stat().st_size / coverage.weights,
            "bytes_of_parent": path.stat().st_size / parent["bytes"],
            "agreement_with_parent": compared.agreement,
            "left_out": compared.left_out,
            "operators": operator_counts(found),
        },
        libraries=LIBRARIES,
    )


def quantise(kind: Kind, parent: Path, path: Path) -> None:
    """Write ``path``: linear layers and embeddings of ``parent`` with int8 weights."""
    if kind.dequantised:
        path.write_bytes(quantised_bytes(parent, kind, qtyping.QuantGranularity.CHANNELWISE))
        return
    graph = read_model(parent)
    equalise_rows(graph)
    with tempfile.TemporaryDirectory() as folder:
        rewritten = Path(folder) / "equalised.tflite"
        write_model(graph, rewritten)
        path.write_bytes(quantised_bytes(rewritten, kind, qtyping.QuantGranularity.TENSORWISE))


def quantised_bytes(model: Path, kind: Kind, granularity: qtyping.QuantGranularity) -> bytes:
    """The same granularity for products and lookups, or a tied table would be stored twice."""
    process = quantizer.Quantizer(str(model))
    add = process.add_weight_only_config if kind.dequantised else process.add_dynamic_config
    for operation in (qtyping.TFLOperationName.FULLY_CONNECTED, qtyping.TFLOperationName.EMBEDDING_LOOKUP):
        add(".*", operation, 8, granularity)
    return bytes(process.quantize(None, enable_progress_bar=False, enable_progress_report=False).quantized_model)


@dataclass(frozen=True)
class Compared:
    """``runtimes`` in which the file is right, its agreement there, and for the others why they are left out."""

    runtimes: tuple[str, ...]
    agreement: dict[str, dict]
    left_out: dict[str, str]


def compare(path: Path, parent: Path, windows: np.ndarray, interface: dict) -> Compared:
    """Replay ``windows`` int [n, tokens] in each runtime; GateError where the file is right in none."""
    length = min(windows.shape[1], interface["context_tokens"])
    tokens = windows[:CHECKED_SEQUENCES, :length]
    feeds = Feeds(tokens, np.full(len(tokens), length - min(CHECKED_STEPS, length - 1), np.int32))
    expected = replay(parent, "litert", feeds).logits
    agreement, left_out = {}, {}
    for runtime in RUNTIMES:
        try:
            agreement[runtime] = asdict(check_all_lengths(path, runtime, feeds, expected))
        except GateError as error:
            left_out[runtime] = str(error)
    if not agreement:
        raise GateError("; ".join(left_out.values()))
    return Compared(tuple(agreement), agreement, left_out)
