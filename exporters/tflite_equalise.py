"""Per-channel quantisation spelled out with per-tensor operators, because tflite-runtime 2.14 gets the real one wrong.

Row c of every weight is divided by its largest magnitude ``s_c``, and the result is multiplied by ``s`` again in float:
``W x = s * ((W / s) x)``. The function does not change, while every row comes to use the whole int8 range under one scale per
tensor. A tied embedding reads the same scaled table and multiplies by the scale of its row, so the table is still stored once.

Where an input has outlier channels and one reader, as the input of an FFN's second projection has, its channels are scaled
too before the rows: ``W x = (W t)(x / t)`` with ``t_j = max|x_j|^alpha / max|W_j|^(1-alpha)``, SmoothQuant (Xiao et al. 2022,
arXiv:2211.10438) with a larger alpha than the pipeline's fold may use, since rows no longer share their range.
"""

import copy

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from exporters.tflite_calibration import ChannelRange

LINEAR = schema.BuiltinOperator.FULLY_CONNECTED
LOOKUP = schema.BuiltinOperator.EMBEDDING_LOOKUP
HOMOGENEOUS = (schema.ActivationFunctionType.NONE, schema.ActivationFunctionType.RELU)  # f(s * y) == s * f(y) for s > 0
WEIGHT = 1  # position of the weight among the inputs of both operators
OUTLIER_RATIO = 4.0  # largest channel over the median one, from which on scaling an input is worth a multiplication
User = tuple[schema.SubGraphT, schema.OperatorT]


def equalise(model: schema.ModelT, ranges: dict[str, ChannelRange], alpha: float) -> dict[str, np.ndarray]:
    """Rewrite ``model`` in place and add to ``ranges``; the row scales [rows] by the name of the operator's unscaled output."""
    scales = {}
    for buffer, users in weights(model).items():
        if any(is_linear(model, user) and user[1].builtinOptions.fusedActivationFunction not in HOMOGENEOUS for user in users):
            continue
        smooth_input(model, ranges, users, alpha)
        row_scale = scale_rows(model, buffer, users)
        stored = add_constant(model, row_scale)
        for user in users:
            if is_linear(model, user):
                scales[multiply_output(model, ranges, user, stored)] = row_scale
            else:
                multiply_embedding(model, user, stored, len(row_scale))
    return scales


def weights(model: schema.ModelT) -> dict[int, list[User]]:
    """Users of every constant weight of a linear layer or an embedding, by buffer."""
    found: dict[int, list[User]] = {}
    for subgraph in model.subgraphs:
        for operator in subgraph.operators:
            if model.operatorCodes[operator.opcodeIndex].builtinCode in (LINEAR, LOOKUP):
                found.setdefault(subgraph.tensors[operator.inputs[WEIGHT]].buffer, []).append((subgraph, operator))
    return {buffer: users for buffer, users in found.items() if model.buffers[buffer].data is not None}


def is_linear(model: schema.ModelT, user: User) -> bool:
    return model.operatorCodes[user[1].opcodeIndex].builtinCode == LINEAR


def weight_of(model: schema.ModelT, user: User) -> np.ndarray:
    """View [rows, columns] of the weight's bytes."""
    tensor = user[0].tensors[user[1].inputs[WEIGHT]]
    return model.buffers[tensor.buffer].data.view(np.float32).reshape(tensor.shape)


def smooth_input(model: schema.ModelT, ranges: dict[str, ChannelRange], users: list[User], alpha: float) -> None:
    """Scale the input channels of a weight, if nobody else reads them and outliers make it worthwhile."""
    if not all(is_linear(model, user) and readers(user[0], user[1].inputs[0]) == 1 for user in users):
        return
    largest = np.max([ranges[name_of(subgraph, operator.inputs[0])].largest for subgraph, operator in users], 0)
    if largest.max() < OUTLIER_RATIO * np.median(largest):
        return
    weight = weight_of(model, users[0])
    columns = np.abs(weight).max(0)
    live = (largest > 0) & (columns > 0)
    scale = np.ones_like(largest)
    scale[live] = largest[live] ** alpha / columns[live] ** (1 - alpha)
    set_data(model, users[0], weight * scale)
    stored = add_constant(model, (1 / scale).astype(np.float32))
    for subgraph, operator in users:
        source = operator.inputs[0]
        scaled = copy.copy(subgraph.tensors[source])
        scaled.name = scaled.name + b"/smoothed"
        seen = ranges[name_of(subgraph, source)]
        ranges[scaled.name.decode()] = ChannelRange(seen.low / scale, seen.high / scale)
        factor = float_tensor(scaled.name + b"/factor", [len(scale)], stored)
        operator.inputs = [add_tensor(subgraph, scaled), *map(int, operator.inputs[1:])]
        insert(model, subgraph, operator, 0, "MUL", [source, add_tensor(subgraph, factor)], operator.inputs[0])


def scale_rows(model: schema.ModelT, buffer: int, users: list[User]) -> np.ndarray:
    """Divide the rows of a weight, and the biases added to them, in place; the divisors [rows]."""
    weight = weight_of(model, users[0])
    largest = np.abs(weight).max(1)
    scale = np.where(largest > 0, largest, 1).astype(np.float32)
    set_data(model, users[0], weight / scale[:, None])
    linear = [user for user in users if is_linear(model, user)]
    biases = {subgraph.tensors[op.inputs[2]].buffer for subgraph, op in linear if len(op.inputs) > 2 and op.inputs[2] >= 0}
    for bias in biases:
        model.buffers[bias].data = (model.buffers[bias].data.view(np.float32) / scale).view(np.uint8)
    return scale


def multiply_output(model: schema.ModelT, ranges: dict[str, ChannelRange], user: User, stored: int) -> str:
    """Undo the scaling of the rows after a linear layer; the name of its output before that."""
    subgraph, operator = user
    scale = model.buffers[stored].data.view(np.float32)
    result, seen = operator.outputs[0], ranges[name_of(subgraph, operator.outputs[0])]
    raw = unscaled(user)
    ranges[raw] = ChannelRange(seen.low / scale, seen.high / scale)
    factor = add_tensor(subgraph, float_tensor(raw.encode() + b"/factor", [len(scale)], stored))
    insert(model, subgraph, operator, 1, "MUL", [operator.outputs[0], factor], result)
    return raw


def multiply_embedding(model: schema.ModelT, user: User, stored: int, rows: int) -> None:
    """Undo the scaling of the rows after a lookup: each token's vector times the scale of its row."""
    subgraph, operator = user
    result = operator.outputs[0]
    raw = unscaled(user).encode()
    table = add_tensor(subgraph, float_tensor(raw + b"/factors", [rows, 1], stored))
    factor = add_tensor(subgraph, float_tensor(raw + b"/factor", [int(subgraph.tensors[result].shape[0]), 1], 0))
    insert(model, subgraph, operator, 1, "MUL", [operator.outputs[0], factor], result)
    insert(model, subgraph, operator, 1, "GATHER", [table, operator.inputs[0]], factor)


def unscaled(user: User) -> str:
    """Give the operator a fresh output tensor; its name."""
    subgraph, operator = user
    raw = copy.copy(subgraph.tensors[operator.outputs[0]])
    raw.name = raw.name + b"/unscaled"
    operator.outputs = [add_tensor(subgraph, raw)]
    return raw.name.decode()


def readers(subgraph: schema.SubGraphT, tensor: int) -> int:
    """How many operators read a tensor."""
    return sum(tensor in operator.inputs for operator in subgraph.operators)


def name_of(subgraph: schema.SubGraphT, tensor: int) -> str:
    return subgraph.tensors[tensor].name.decode()


def set_data(model: schema.ModelT, user: User, weight: np.ndarray) -> None:
    buffer = user[0].tensors[user[1].inputs[WEIGHT]].buffer
    model.buffers[buffer].data = np.ascontiguousarray(weight, np.float32).reshape(-1).view(np.uint8)


def add_constant(model: schema.ModelT, values: np.ndarray) -> int:
    """Index of a new buffer with ``values``."""
    buffer = schema.BufferT()
    buffer.data = values.view(np.uint8)
    model.buffers.append(buffer)
    return len(model.buffers) - 1


def add_tensor(subgraph: schema.SubGraphT, tensor: schema.TensorT) -> int:
    subgraph.tensors.append(tensor)
    return len(subgraph.tensors) - 1


def float_tensor(name: bytes, shape: list[int], buffer: int) -> schema.TensorT:
    """A tensor of the constant in ``buffer``, or of an activation where that is 0."""
    tensor = schema.TensorT()
    tensor.name, tensor.shape, tensor.type, tensor.buffer = name, shape, schema.TensorType.FLOAT32, buffer
    tensor.hasRank = True
    return tensor


def insert(model: schema.ModelT, subgraph: schema.SubGraphT, anchor: schema.OperatorT, offset: int, *what) -> None:
    """Put operator ``what = (name, inputs, output)`` before (offset 0) or after (offset 1) ``anchor``."""
    name, inputs, output = what
    operator = schema.OperatorT()
    operator.inputs, operator.outputs = inputs, [output]
    operator.opcodeIndex = operator_code(model, getattr(schema.BuiltinOperator, name))
    kind = {"MUL": "MulOptions", "GATHER": "GatherOptions"}[name]
    operator.builtinOptions = getattr(schema, f"{kind}T")()
    operator.builtinOptionsType = getattr(schema.BuiltinOptions, kind)
    place = next(index for index, other in enumerate(subgraph.operators) if other is anchor)
    subgraph.operators.insert(place + offset, operator)


def operator_code(model: schema.ModelT, code: int) -> int:
    """Index of version 1 of a builtin operator among the model's operator codes; added where it is missing."""
    for index, known in enumerate(model.operatorCodes):
        if known.builtinCode == code and known.version == 1:
            return index
    added = schema.OperatorCodeT()
    added.builtinCode, added.deprecatedBuiltinCode, added.version = code, code, 1
    model.operatorCodes.append(added)
    return len(model.operatorCodes) - 1
