"""Small edits of a TFLite graph held as flatbuffer objects: new tensors, new constants, new operators in the right place."""

import copy

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from exporters.tflite_structure import OPERATOR_NAMES

LINEAR = schema.BuiltinOperator.FULLY_CONNECTED
LOOKUP = schema.BuiltinOperator.EMBEDDING_LOOKUP
WEIGHT, BIAS = 1, 2  # positions among the inputs; a lookup has its table where a linear layer has its weight
OPTIONS = {
    "ADD": "AddOptions",
    "GATHER": "GatherOptions",
    "MAXIMUM": "MaximumMinimumOptions",
    "MINIMUM": "MaximumMinimumOptions",
    "MUL": "MulOptions",
    "SUB": "SubOptions",
}
User = tuple[schema.SubGraphT, schema.OperatorT]


def weight_users(model: schema.ModelT) -> dict[int, list[User]]:
    """Users of every constant weight of a linear layer or an embedding, by buffer."""
    found: dict[int, list[User]] = {}
    for subgraph in model.subgraphs:
        for operator in subgraph.operators:
            if model.operatorCodes[operator.opcodeIndex].builtinCode in (LINEAR, LOOKUP):
                found.setdefault(subgraph.tensors[operator.inputs[WEIGHT]].buffer, []).append((subgraph, operator))
    return {buffer: users for buffer, users in found.items() if model.buffers[buffer].data is not None}


def is_linear(model: schema.ModelT, user: User) -> bool:
    return model.operatorCodes[user[1].opcodeIndex].builtinCode == LINEAR


def operator_name(model: schema.ModelT, operator: schema.OperatorT) -> str:
    """What schema.fbs calls the operator."""
    return OPERATOR_NAMES[model.operatorCodes[operator.opcodeIndex].builtinCode]


def name_of(subgraph: schema.SubGraphT, tensor: int) -> str:
    return subgraph.tensors[tensor].name.decode()


def readers(subgraph: schema.SubGraphT, tensor: int) -> int:
    """How many operators read a tensor."""
    return sum(tensor in operator.inputs for operator in subgraph.operators)


def weight_of(model: schema.ModelT, user: User) -> np.ndarray:
    """View [rows, columns] of the weight's bytes."""
    tensor = user[0].tensors[user[1].inputs[WEIGHT]]
    return model.buffers[tensor.buffer].data.view(np.float32).reshape(tensor.shape)


def set_weight(model: schema.ModelT, user: User, weight: np.ndarray) -> None:
    """Replace the weight's bytes, for all its users."""
    buffer = user[0].tensors[user[1].inputs[WEIGHT]].buffer
    model.buffers[buffer].data = np.ascontiguousarray(weight, np.float32).reshape(-1).view(np.uint8)


def bias_buffers(users: list[User]) -> set[int]:
    """Buffers of the biases that linear layers add."""
    return {subgraph.tensors[op.inputs[BIAS]].buffer for subgraph, op in users if len(op.inputs) > BIAS and op.inputs[BIAS] >= 0}


def add_constant(model: schema.ModelT, values: np.ndarray) -> int:
    """Index of a new buffer with float ``values``."""
    buffer = schema.BufferT()
    buffer.data = np.ascontiguousarray(values, np.float32).reshape(-1).view(np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def add_integers(model: schema.ModelT, subgraph: schema.SubGraphT, values: list[int]) -> int:
    """Index of a new constant tensor with ``values``, int32 [n]: a shape, an order of dimensions."""
    buffer, tensor = schema.BufferT(), schema.TensorT()
    buffer.data = np.array(values, np.int32).view(np.uint8)
    model.buffers.append(buffer)
    tensor.name, tensor.shape, tensor.type = b"arith.constant", [len(values)], schema.TensorType.INT32
    tensor.buffer, tensor.hasRank = len(model.buffers) - 1, True
    subgraph.tensors.append(tensor)
    return len(subgraph.tensors) - 1


def add_tensor(subgraph: schema.SubGraphT, name: str, shape: list[int], buffer: int = 0) -> int:
    """Index of a new float tensor: the constant in ``buffer``, or an activation where that is 0."""
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name.encode(), shape, schema.TensorType.FLOAT32, buffer
    tensor.hasRank = True
    subgraph.tensors.append(tensor)
    return len(subgraph.tensors) - 1


def add_like(subgraph: schema.SubGraphT, tensor: int, suffix: str) -> int:
    """Index of a new activation of the same shape, named after ``tensor``."""
    twin = copy.copy(subgraph.tensors[tensor])
    twin.name = twin.name + suffix.encode()
    subgraph.tensors.append(twin)
    return len(subgraph.tensors) - 1


def place_of(user: User) -> int:
    """Position of the operator among those of its subgraph, which run in order."""
    return next(index for index, other in enumerate(user[0].operators) if other is user[1])


def new_operator(model: schema.ModelT, name: str, inputs: list[int], output: int) -> schema.OperatorT:
    """An operator with default options, no fused activation."""
    operator = schema.OperatorT()
    operator.inputs, operator.outputs = inputs, [output]
    operator.opcodeIndex = operator_code(model, getattr(schema.BuiltinOperator, name))
    operator.builtinOptions = getattr(schema, f"{OPTIONS[name]}T")()
    operator.builtinOptionsType = getattr(schema.BuiltinOptions, OPTIONS[name])
    return operator


def operator_code(model: schema.ModelT, code: int) -> int:
    """Index of version 1 of a builtin operator among the model's operator codes; added where it is missing."""
    for index, known in enumerate(model.operatorCodes):
        if known.builtinCode == code and known.version == 1:
            return index
    added = schema.OperatorCodeT()
    added.builtinCode, added.deprecatedBuiltinCode, added.version = code, code, 1
    model.operatorCodes.append(added)
    return len(model.operatorCodes) - 1
