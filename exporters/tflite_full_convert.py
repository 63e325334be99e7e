"""PyTorch to TensorFlow to int8 TFLite: everything that is private to litert-torch and TensorFlow stands here, pinned in constraints.txt.

torch.export -> StableHLO (litert-torch, without its composites, which have no int8 form) -> an XlaCallModule in a SavedModel ->
TFLiteConverter with a representative dataset. The converter is stopped between calibration and quantisation, because ranges that
are right for each tensor alone are not right for the model (see tflite_full_ranges).
"""

import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import litert_torch  # noqa: F401  (before tensorflow: it loads the MLIR libraries that both use)
import numpy as np
import tensorflow as tf
import torch
from litert_torch import fx_infra
from litert_torch._convert import fx_passes
from litert_torch.backend import export as stablehlo
from litert_torch.backend import tf_integration
from litert_torch.generative import fx_passes as generative_passes
from tensorflow.lite.python.convert import mlir_quantize
from transformers import PreTrainedModel

from exporters.tflite_full_model import ATTENTION, RowsModule, Tables, module_inputs, take_tables_out
from exporters.tflite_model import SignatureShape
from models.errors import GateError

PASSES = (  # litert-torch's own, less BuildAtenCompositePass: a composite cannot be quantised
    fx_passes.EliminateDeadCodePass,
    fx_passes.OptimizeLayoutTransposesPass,
    fx_passes.CanonicalizePass,
    fx_passes.ReduceViewRankPass,
    fx_passes.RemoveNonUserOutputsPass,
)
Sample = tuple[str, dict[str, np.ndarray]]  # a signature and what is fed to it


class Variables:
    """One TensorFlow variable per PyTorch tensor, however many signatures and operators read it."""

    def __init__(self):
        self.by_storage: dict[tuple, tf.Variable] = {}

    def of(self, name: str, tensor: torch.Tensor) -> tf.Variable:
        key = (tensor.data_ptr(), tuple(tensor.shape), tensor.stride()) if tensor.numel() > 1 else name
        if key not in self.by_storage:
            self.by_storage[key] = tf.Variable(tensor.detach().numpy(), trainable=False, name=re.sub(r"\W", "_", name))
        return self.by_storage[key]


def save_as_tensorflow(model: PreTrainedModel, shapes: dict[str, SignatureShape], folder: Path) -> None:
    """Write a SavedModel with a signature for each of ``shapes``. Changes ``model``: its tables are taken out."""
    model.set_attn_implementation(ATTENTION)
    longest = max(shape.context_tokens for shape in shapes.values())
    tables = take_tables_out(model, longest)
    variables, module = Variables(), tf.Module()
    layers = next(iter(shapes.values())).layers
    traced = RowsModule(model, layers, tables).eval()
    module.functions = {name: signature_function(traced, tables, shape, variables) for name, shape in shapes.items()}
    module.kept = list(variables.by_storage.values())
    tf.saved_model.save(module, str(folder), signatures=module.functions)


def signature_function(module: RowsModule, tables: Tables, shape: SignatureShape, variables: Variables):
    """The concrete function of one signature: named tensors of the contract in and out."""
    lowered = lower(module, module_inputs(tables, shape))
    call = tf_integration._wrap_as_tf_func(lowered, {name: variables.of(name, tensor) for name, tensor in lowered.state_dict.items()})
    token_table, position_tables = variables.of("token_table", tables.tokens), [tf.constant(table) for table in tables.positions]
    caches = [f"{part}_{layer}" for layer in range(shape.layers) for part in "kv"]
    chunk, context = shape.chunk_tokens, shape.context_tokens
    specs = {name: tf.TensorSpec((1, chunk), tf.int32, name) for name in ("tokens", "positions")}
    specs["mask"] = tf.TensorSpec((1, 1, chunk, context + chunk), tf.float32, "mask")
    if chunk > 1:
        specs["last"] = tf.TensorSpec((1,), tf.int32, "last")
    specs |= {name: tf.TensorSpec((1, shape.kv_heads, context, shape.head_dim), tf.float32, name) for name in caches}

    def run(**given):
        rows = [tf.gather(table, given["positions"]) for table in position_tables]
        last = [given["last"]] if chunk > 1 else []
        outputs = call(tf.gather(token_table, given["tokens"]), given["mask"], *rows, *last, *(given[name] for name in caches))
        return {"logits": outputs[0]} | {f"new_{name}": value for name, value in zip(caches, outputs[1:], strict=True)}

    return tf.function(run).get_concrete_function(**specs)


def lower(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> stablehlo.MlirLowered:
    """StableHLO of ``module``, its weights left as arguments."""
    exported = torch.export.export(module, args=inputs, strict=False)
    exported = fx_infra.graph_utils.reset_from_node_meta(exported)
    exported = fx_infra.safe_run_decompositions(exported, fx_infra.decomp.pre_convert_decomp(), can_skip=False)
    exported = fx_infra.run_passes(generative_passes.run_generative_passes(exported), [each() for each in PASSES])
    return stablehlo.exported_program_to_mlir(exported, inline_constants=False)


def float_file(saved: Path, signatures: tuple[str, ...]) -> bytes:
    """The SavedModel as TFLite without quantisation."""
    return tf.lite.TFLiteConverter.from_saved_model(str(saved), signature_keys=list(signatures)).convert()


def calibrated_file(saved: Path, signatures: tuple[str, ...], samples: Callable[[], Iterator[Sample]]) -> bytes:
    """The float file with the range of every activation in it, from ``samples`` streamed once through the converter."""
    converter = tf.lite.TFLiteConverter.from_saved_model(str(saved), signature_keys=list(signatures))
    converter.optimizations = [tf.lite.Optimize.DEFAULT]
    converter.representative_dataset = samples
    converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    converter.inference_input_type = converter.inference_output_type = tf.int8
    if not hasattr(converter, "_experimental_calibrate_only"):
        raise GateError("this TensorFlow cannot stop after calibration; install the version that constraints.txt names")
    converter._experimental_calibrate_only = True
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r"\s*Warning: tf.lite.Interpreter is deprecated")  # the converter's own use of it
        return converter.convert()


def quantised_file(calibrated: bytes) -> bytes:
    """int8 throughout, inputs and outputs included, with one scale per weight: tflite-runtime 2.14 computes only that rightly."""
    return mlir_quantize(
        calibrated,
        disable_per_channel=True,
        fully_quantize=True,
        input_data_type=tf.int8,
        output_data_type=tf.int8,
        disable_per_channel_for_dense_layers=True,
    )
