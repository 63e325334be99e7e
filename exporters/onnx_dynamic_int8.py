"""Dynamic int8 from the fp32 graph: signed weights, activations quantised anew in every call; embedding int8 per token.

No calibration, and so nothing that could be calibrated wrongly; but every product first looks for its input's smallest and
largest value, and one outlier in a call coarsens the steps for all of it. ONNX Runtime's quantiser writes MatMulInteger, and its
optimiser makes DynamicQuantizeMatMul or MatMulIntegerToFloat of it, which is checked.
"""

from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx as onnx_format
from onnxruntime.quantization import QuantType
from onnxruntime.quantization.onnx_quantizer import ONNXQuantizer
from onnxruntime.quantization.quant_utils import QuantizationMode

from exporters.artifact import read_sidecar, write_sidecar
from exporters.onnx_agreement import COMPARED_WINDOWS, compare
from exporters.onnx_files import compact, save_one_file
from exporters.onnx_qdq import INT7_MAX, INT8_MAX, bits_per_weight, drop_unused_initializers, linear_layers, numbers_in, quantise_embeddings
from exporters.onnx_structure import Structure, require_int8, structure_of
from exporters.settings import OnnxDynamicInt8Settings

NAME = "onnx_dynamic_int8"
PARENT = "onnx_fp32"
LIBRARIES = ("onnx", "onnxruntime", "numpy")


def run(settings: OnnxDynamicInt8Settings, out: Path, onnx: Path, text: Path) -> None:
    """Write onnx_dynamic_int8.onnx and its sidecar. GateError unless every linear layer and the embedding run as int8."""
    parent = read_sidecar(onnx / f"{PARENT}.json")
    source, path = onnx / parent["file"], out / f"{NAME}.onnx"
    model = onnx_format.load(source)
    layers, numbers = linear_layers(model), numbers_in(model.graph)
    quantised = quantise(model, settings)
    del model  # a message as large as the weights
    save_one_file(quantised, path, NAME)
    structure = structure_of(path)
    require_int8(structure, len(layers), NAME)
    agreement = compare(source, path, np.load(text / "validation.npy")[:COMPARED_WINDOWS], NAME)
    write_sidecar(
        out,
        NAME,
        "onnx",
        files=[path],
        interface=parent["interface"],
        tensors=parent["tensors"],
        parent=parent["sha256"],
        settings=settings,
        measured={
            **describe(structure),
            "bits_per_weight": bits_per_weight(quantised.graph, numbers),
            "against_fp32": asdict(agreement),
        },
        libraries=LIBRARIES,
    )


def quantise(model: onnx_format.ModelProto, settings: OnnxDynamicInt8Settings) -> onnx_format.ModelProto:
    """The graph with int8 products in place of every linear layer, and an int8 embedding. ``model`` is used up."""
    quantizer = ONNXQuantizer(
        model,
        per_channel=settings.per_channel,
        reduce_range=settings.reduce_range,
        mode=QuantizationMode.IntegerOps,
        static=False,
        weight_qType=QuantType.QInt8,
        activation_qType=QuantType.QUInt8,  # the operator has no other
        tensors_range=None,
        nodes_to_quantize=list(linear_layers(model)),
        nodes_to_exclude=[],
        op_types_to_quantize=["MatMul"],
        extra_options={"MatMulConstBOnly": True},
    )
    quantizer.quantize_model()
    quantised = quantizer.model.model
    quantise_embeddings(quantised.graph, INT7_MAX if settings.reduce_range else INT8_MAX)
    drop_unused_initializers(quantised.graph)
    return compact(quantised)


def describe(structure: Structure) -> dict:
    """int8 coverage as found on the optimised graph."""
    return {
        "linear_layers": len(structure.int8_linear),
        "int8_linear_layers": len(structure.int8_linear),
        "embedding_int8": not structure.float_embeddings,
        "not_int8": [{"name": name, "why": "position table: looked up, not multiplied"} for name in structure.float_tables],
    }
