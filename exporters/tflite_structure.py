"""What stands in a TFLite file: its operators read from the flatbuffer, and the checks that use them.

Reading the file is the only proof of what was quantised: a recipe that matches nothing is ignored without a word.
"""

import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import flatbuffers
from ai_edge_litert import schema_py_generated as schema

from models.errors import GateError

FILE_IDENTIFIER = b"TFL3"
GRAPH_BYTES = 2**24  # of a file, beside its constants, that are expected; more than that only takes longer
# Highest version of each operator that tflite-runtime 2.14.0 registers, found by asking it for them one by one. Operators that
# decoders do not use are left out; an operator that is missing here fails the export by name instead of failing on the device.
TFLITE_RUNTIME_2_14 = {
    "ABS": 5, "ADD": 5, "BATCH_MATMUL": 4, "CAST": 5, "CONCATENATION": 4, "COS": 1, "CUMSUM": 1, "DEQUANTIZE": 5, "DIV": 2,
    "DYNAMIC_UPDATE_SLICE": 1, "EMBEDDING_LOOKUP": 3, "EQUAL": 4, "EXP": 2, "EXPAND_DIMS": 1, "FILL": 4, "FULLY_CONNECTED": 10,
    "GATHER": 6, "GATHER_ND": 4, "GELU": 2, "GREATER": 2, "GREATER_EQUAL": 3, "HARD_SWISH": 1, "LEAKY_RELU": 2, "LESS": 3,
    "LESS_EQUAL": 2, "LOG": 1, "LOGICAL_AND": 1, "LOGICAL_NOT": 1, "LOGICAL_OR": 1, "LOGISTIC": 3, "MAXIMUM": 4, "MEAN": 3,
    "MINIMUM": 4, "MUL": 7, "NEG": 1, "NOT_EQUAL": 3, "PACK": 4, "PAD": 4, "PADV2": 4, "POW": 1, "QUANTIZE": 3, "RANGE": 2,
    "RELU": 3, "RELU6": 3, "RESHAPE": 1, "REVERSE_V2": 3, "ROUND": 1, "RSQRT": 2, "SELECT": 4, "SELECT_V2": 2, "SIN": 1,
    "SLICE": 6, "SOFTMAX": 3, "SPLIT": 4, "SPLIT_V": 2, "SQRT": 1, "SQUARE": 1, "SQUARED_DIFFERENCE": 2, "SQUEEZE": 2,
    "STRIDED_SLICE": 8, "SUB": 5, "SUM": 2, "TANH": 3, "TILE": 3, "TRANSPOSE": 6, "UNPACK": 4,
}  # fmt: skip
OPERATOR_NAMES = {code: name for name, code in vars(schema.BuiltinOperator).items() if isinstance(code, int)}
TYPE_NAMES = {code: name.lower() for name, code in vars(schema.TensorType).items() if isinstance(code, int)}


@dataclass(frozen=True)
class Tensor:
    """One tensor of a subgraph. ``buffer`` tells which tensors share their bytes; ``scales`` is how many scales it has.

    ``scale`` is that of a tensor with one, with its zero point; None of others.
    """

    index: int
    name: str
    shape: tuple[int, ...]
    dtype: str
    buffer: int
    constant: bool
    scales: int
    scale: tuple[float, int] | None = None


@dataclass(frozen=True)
class Operator:
    """One operator of a signature; an absent optional input is None."""

    signature: str
    name: str
    version: int
    inputs: tuple[Tensor | None, ...]
    outputs: tuple[Tensor, ...]

    @property
    def where(self) -> str:
        """Name for a person: the operator and its weight, or where it has none with a name, the tensor that it makes."""
        weights = [tensor.name for tensor in self.inputs[1:2] if tensor is not None and tensor.constant]
        named = weights[0] if weights and "arith.constant" not in weights[0] else self.outputs[0].name
        return f"{self.name} {named}"


def read_model(path: Path) -> schema.ModelT:
    """The flatbuffer as objects; buffers that AI Edge Quantizer appends after it are left where they are."""
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(path.read_bytes(), 0))


def write_model(model: schema.ModelT, path: Path) -> None:
    """Serialise; the same objects give the same bytes."""
    constants = sum(len(buffer.data) for buffer in model.buffers if buffer.data is not None)
    builder = flatbuffers.Builder(min(constants + GRAPH_BYTES, flatbuffers.Builder.MAX_BUFFER_SIZE))  # one that grows is copied
    builder.Finish(model.Pack(builder), FILE_IDENTIFIER)
    with path.open("wb") as file:
        file.write(memoryview(builder.Bytes)[builder.Head() :])  # Output() would be a copy


def operators(model: schema.ModelT) -> list[Operator]:
    """Every operator of every signature, in the order in which they run."""
    found = []
    for signature in model.signatureDefs:
        subgraph = model.subgraphs[signature.subgraphIndex]
        tensors = [_tensor(model, index, tensor) for index, tensor in enumerate(subgraph.tensors)]
        for operator in subgraph.operators:
            code = model.operatorCodes[operator.opcodeIndex]
            found.append(
                Operator(
                    signature.signatureKey.decode(),
                    OPERATOR_NAMES.get(code.builtinCode, f"operator {code.builtinCode}"),
                    code.version,
                    tuple(tensors[index] if index >= 0 else None for index in operator.inputs),
                    tuple(tensors[index] for index in operator.outputs),
                )
            )
    return found


def input_indices(model: schema.ModelT) -> dict[str, dict[str, int]]:
    """Index of each input's tensor, by signature and name."""
    return {
        signature.signatureKey.decode(): {entry.name.decode(): int(entry.tensorIndex) for entry in signature.inputs}
        for signature in model.signatureDefs
    }


def _tensor(model: schema.ModelT, index: int, tensor: schema.TensorT) -> Tensor:
    buffer = model.buffers[tensor.buffer]
    constant = (buffer.data is not None and len(buffer.data) > 0) or buffer.size > 0
    scales = tensor.quantization.scale if tensor.quantization is not None else None
    return Tensor(
        index,
        tensor.name.decode(),
        tuple(int(size) for size in tensor.shape) if tensor.shape is not None else (),
        TYPE_NAMES[tensor.type],
        tensor.buffer,
        constant,
        0 if scales is None else len(scales),
        (float(scales[0]), int(tensor.quantization.zeroPoint[0])) if scales is not None and len(scales) == 1 else None,
    )


def tensor_contract(model: schema.ModelT) -> dict[str, dict[str, list[dict]]]:
    """Names, types and shapes of every signature's inputs and outputs, for the sidecar."""
    contract = {}
    for signature in model.signatureDefs:
        tensors = model.subgraphs[signature.subgraphIndex].tensors
        contract[signature.signatureKey.decode()] = {
            side: [
                {
                    "name": entry.name.decode(),
                    "dtype": TYPE_NAMES[tensors[entry.tensorIndex].type],
                    "shape": [int(size) for size in tensors[entry.tensorIndex].shape],
                }
                for entry in entries
            ]
            for side, entries in (("inputs", signature.inputs), ("outputs", signature.outputs))
        }
    return contract


def check_loadable(found: list[Operator], artifact: str) -> None:
    """GateError naming the first operator that tflite-runtime 2.14 would refuse to load."""
    for operator in found:
        limit = TFLITE_RUNTIME_2_14.get(operator.name)
        if limit is None:
            raise GateError(f"{artifact}: {operator.where} is not an operator that tflite-runtime 2.14 is known to load")
        if operator.version > limit:
            raise GateError(f"{artifact}: {operator.where} has version {operator.version}; tflite-runtime 2.14 loads up to version {limit}")


def operator_counts(found: list[Operator]) -> dict[str, dict[str, int]]:
    """Operators per signature, for the sidecar."""
    signatures = sorted({operator.signature for operator in found})
    return {name: dict(sorted(Counter(op.name for op in found if op.signature == name).items())) for name in signatures}


def constant_bytes(model: schema.ModelT) -> int:
    """Bytes of all constants; each buffer once, however many signatures and operators read it."""
    return sum(len(buffer.data) for buffer in model.buffers if buffer.data is not None) + sum(buf.size for buf in model.buffers)


def shorten_names(model: schema.ModelT) -> None:
    """Give tensors short names that still tell the module: ``layers.3.mlp.down_proj`` plus the tensor's number.

    The converter writes the class path of every enclosing module, hundreds of bytes per tensor, and names collide between
    signatures: AI Edge Quantizer knows calibration results by name alone.
    """
    for signature in model.signatureDefs:
        key = signature.signatureKey.decode()
        subgraph = model.subgraphs[signature.subgraphIndex]
        for index, tensor in enumerate(subgraph.tensors):
            tensor.name = f"{key}/{index}/{_module_of(tensor.name.decode())}".encode()


def _module_of(name: str) -> str:
    """``a.b.Linear_down_proj`` parts of the last module path in a converter's name, joined as PyTorch writes them."""
    last = name.split(";;")[-1].split(";")[0]
    parts = [re.sub(r"^(?:\w+\.)+\w*?_(?=[a-z0-9])", "", part) for part in last.split("/")]
    return ".".join(part for part in parts[1:] if part) or last
