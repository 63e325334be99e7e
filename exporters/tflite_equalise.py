"""Makes a float TFLite graph easy for int8 with one scale per tensor, without changing its function.

tflite-runtime 2.14 gets scales per channel wrong, so what they give is spelled out with operators:
- Rows. Row c of every weight is divided by ``s_c`` and the result multiplied by ``s`` in float: ``W x = s * ((W / s) x)``.
  ``s_c`` is the row's largest magnitude, or more where its output reaches so far that the other outputs would lose their steps.
  A tied embedding reads the same table and multiplies by its row's scale: still stored once.
- Columns. An input with outlier channels and one reader, as the second projection of an FFN has, is scaled before:
  ``W x = (W t)(x / t)``, ``t_j = max|x_j|^alpha / max|W_j|^(1-alpha)``, SmoothQuant (Xiao et al. 2022, arXiv:2211.10438).
- Outliers. An input with one reader is cut in two where that pays, ``W x = W clip(x) + W (x - clip(x))``: the first part is
  finely quantised, the second is zero, and so exact, nearly everywhere. Both read one stored weight. (LLM.int8(),
  arXiv:2208.07339, splits by channel; here it goes by value.)
"""

import copy
from dataclasses import dataclass

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from exporters.tflite_calibration import Calibration
from exporters.tflite_coverage import is_named
from exporters.tflite_edit import (
    BIAS,
    User,
    add_constant,
    add_like,
    add_tensor,
    bias_buffers,
    is_linear,
    name_of,
    new_operator,
    place_of,
    readers,
    set_weight,
    weight_of,
    weight_users,
)
from exporters.tflite_logit_range import fake_quantised

HOMOGENEOUS = (schema.ActivationFunctionType.NONE, schema.ActivationFunctionType.RELU)  # f(s * y) == s * f(y) for s > 0
HEAD_OUTPUT = "_logits_output"  # how the converter names the tensor behind the signature's output ``logits``
TRIED_SHARES = np.linspace(0.02, 1, 50)  # of the rows, those whose output is left to reach as far as it does
OUTPUT_STEPS, WEIGHT_STEPS = 255, 127
OUTLIER_RATIO = 2.0  # largest channel over the median one, from which on scaling an input is worth an operator
SPLIT_GAIN = 4.0  # how many times smaller a split must make the squared error of an input
TRIED_RATIOS = 50  # of output range to row range, from which on a row is scaled by its output
STEPS, WEIGHT_STEPS = 255, 127
CLIP_SHARES = (0.03, 0.05, 0.07, 0.1, 0.15, 0.2, 0.3, 0.5)  # tried shares of the range that the finely quantised part keeps


@dataclass(frozen=True)
class Equalised:
    """``row_scales`` [rows] by the name of the linear operator's output; ``split_layers`` is how many layers run in two parts."""

    row_scales: dict[str, np.ndarray]
    smoothed_layers: int
    split_layers: int


def equalise(model: schema.ModelT, seen: Calibration, alpha: float, dynamic: tuple[str, ...] = ()) -> Equalised:
    """Rewrite ``model`` in place, from what the calibration saw in it. ``dynamic`` are patterns of layers that will not be static."""
    row_scales: dict[str, np.ndarray] = {}
    smoothed = split = 0
    for users in weight_users(model).values():
        if not may_scale_rows(model, users):
            continue
        alone = reads_alone(model, users)
        columns = column_scale(model, users, seen, alpha) if alone else None
        rows = inputs = None
        if all(is_linear(model, user) for user in users):
            factors = np.float32(1) if columns is None else columns
            inputs = sampled_inputs(users, seen) / factors
            if HEAD_OUTPUT not in name_of(users[0][0], users[0][1].outputs[0]):  # few of its outputs are ever large
                outputs = np.max([seen.ranges[name_of(subgraph, operator.outputs[0])].largest for subgraph, operator in users], 0)
                rows = balanced_rows(weight_of(model, users[0]) * factors, outputs, float(np.square(inputs).sum(1).mean()))
        row_scales |= scale_rows_and_columns(model, users, columns, rows)
        smoothed += columns is not None
        if alone:
            split += split_outliers(model, users, inputs, is_named(name_of(users[0][0], users[0][1].outputs[0]), dynamic))
    return Equalised(row_scales, smoothed, split)


def equalise_rows(model: schema.ModelT) -> None:
    """Rewrite ``model`` in place, the rows alone: this needs no calibration."""
    for users in weight_users(model).values():
        if may_scale_rows(model, users):
            scale_rows_and_columns(model, users)


def may_scale_rows(model: schema.ModelT, users: list[User]) -> bool:
    """Whether no user of a weight puts its result through a function that scaling would change."""
    return not any(is_linear(model, user) and user[1].builtinOptions.fusedActivationFunction not in HOMOGENEOUS for user in users)


def reads_alone(model: schema.ModelT, users: list[User]) -> bool:
    """Whether a weight belongs to linear layers without activation whose input nobody else reads."""
    plain = schema.ActivationFunctionType.NONE
    return all(
        is_linear(model, user) and user[1].builtinOptions.fusedActivationFunction == plain and readers(user[0], user[1].inputs[0]) == 1
        for user in users
    )


def column_scale(model: schema.ModelT, users: list[User], seen: Calibration, alpha: float) -> np.ndarray | None:
    """The divisors [columns] of an input that has outlier channels; None where its channels are even."""
    largest = np.max([seen.ranges[name_of(subgraph, operator.inputs[0])].largest for subgraph, operator in users], 0)
    if largest.max() < OUTLIER_RATIO * np.median(largest):
        return None
    columns = np.abs(weight_of(model, users[0])).max(0)
    live = (largest > 0) & (columns > 0)
    scale = np.ones_like(largest)
    scale[live] = largest[live] ** alpha / columns[live] ** (1 - alpha)
    return scale


def balanced_rows(weight: np.ndarray, outputs: np.ndarray, power: float) -> np.ndarray:
    """The row scales [rows] with the least rounding error of weights and outputs together, all outputs counted alike.

    ``weight`` [rows, columns]; ``outputs`` [rows], how far each reaches; ``power``, the mean squared length of an input.
    """
    largest = np.abs(weight).max(1)
    rows = np.where(largest > 0, largest, 1).astype(np.float32)
    tried = []
    for limit in np.quantile(outputs / rows, TRIED_SHARES):
        scale = np.maximum(rows, outputs / limit) if limit > 0 else rows
        weight_step, output_step = (rows / scale).max() / WEIGHT_STEPS, 2 * (outputs / scale).max() / OUTPUT_STEPS
        tried.append((float(np.square(scale).sum() * (power * weight_step**2 + output_step**2)), limit, scale))
    return min(tried, key=lambda one: one[:2])[2].astype(np.float32)


def sampled_inputs(users: list[User], seen: Calibration) -> np.ndarray:
    """Sampled rows [n, columns] of the input, from all signatures that were fed."""
    names = dict.fromkeys(name_of(subgraph, operator.inputs[0]) for subgraph, operator in users)
    return np.concatenate([seen.inputs[name] for name in names if name in seen.inputs])


def scale_rows_and_columns(
    model: schema.ModelT, users: list[User], columns: np.ndarray | None = None, rows: np.ndarray | None = None
) -> dict[str, np.ndarray]:
    """Scale one weight in place and insert the operators that undo it; the row scales by the name of each linear output.

    ``rows`` [rows] is what they are divided by, None: their largest magnitudes.
    """
    weight = weight_of(model, users[0])
    if columns is not None:
        weight = weight * columns
        divide_input(model, users, columns)
    if rows is None:
        largest = np.abs(weight).max(1)
        rows = np.where(largest > 0, largest, 1).astype(np.float32)
    set_weight(model, users[0], weight / rows[:, None])
    for bias in bias_buffers([user for user in users if is_linear(model, user)]):
        model.buffers[bias].data = (model.buffers[bias].data.view(np.float32) / rows).view(np.uint8)
    stored = add_constant(model, rows)
    outputs = {}
    for user in users:
        if is_linear(model, user):
            outputs[multiply_output(model, user, stored, len(rows))] = rows
        else:
            multiply_embedding(model, user, stored, len(rows))
    return outputs


def divide_input(model: schema.ModelT, users: list[User], columns: np.ndarray) -> None:
    """Put the division by ``columns`` before each of the users."""
    stored = add_constant(model, 1 / columns)
    for subgraph, operator in users:
        source = int(operator.inputs[0])
        scaled = add_like(subgraph, source, "/smoothed")
        factor = add_tensor(subgraph, f"{name_of(subgraph, scaled)}/factor", [len(columns)], stored)
        subgraph.operators.insert(place_of((subgraph, operator)), new_operator(model, "MUL", [source, factor], scaled))
        operator.inputs = [scaled, *map(int, operator.inputs[1:])]


def multiply_output(model: schema.ModelT, user: User, stored: int, rows: int) -> str:
    """Undo the scaling of the rows after a linear layer; the name of its output before that."""
    subgraph, operator = user
    result = int(operator.outputs[0])
    raw = add_like(subgraph, result, "/unscaled")
    operator.outputs = [raw]
    factor = add_tensor(subgraph, f"{name_of(subgraph, raw)}/factor", [rows], stored)
    subgraph.operators.insert(place_of(user) + 1, new_operator(model, "MUL", [raw, factor], result))
    return name_of(subgraph, raw)


def multiply_embedding(model: schema.ModelT, user: User, stored: int, rows: int) -> None:
    """Undo the scaling of the rows after a lookup: each token's vector times the scale of its row."""
    subgraph, operator = user
    result = int(operator.outputs[0])
    raw = add_like(subgraph, result, "/unscaled")
    operator.outputs = [raw]
    table = add_tensor(subgraph, f"{name_of(subgraph, raw)}/factors", [rows, 1], stored)
    factor = add_tensor(subgraph, f"{name_of(subgraph, raw)}/factor", [int(subgraph.tensors[result].shape[0]), 1])
    place = place_of(user) + 1
    subgraph.operators[place:place] = [
        new_operator(model, "GATHER", [table, int(operator.inputs[0])], factor),
        new_operator(model, "MUL", [raw, factor], result),
    ]


def split_outliers(model: schema.ModelT, users: list[User], rows: np.ndarray, dynamic: bool) -> bool:
    """Cut the input of a linear layer in two, where the sampled ``rows`` [n, columns] show that it pays; whether it did.

    A static layer's second part gets a bias of its own, zeros: LiteRT's weight cache knows a weight with its scales by weight and
    bias alone. A ``dynamic`` one has no scale but the weight's, so both parts may be packed as one.
    """
    bounds = clip_bounds(rows, dynamic)
    if bounds is None:
        return False
    biased = any(len(operator.inputs) > BIAS and operator.inputs[BIAS] >= 0 for _, operator in users)
    size = len(weight_of(model, users[0]))
    nothing = None if dynamic or biased else add_constant(model, np.zeros(size))
    low, high = (add_constant(model, np.array([bound])) for bound in bounds)
    for subgraph, operator in users:
        source, raw = int(operator.inputs[0]), int(operator.outputs[0])
        lifted, inner, outer = (add_like(subgraph, source, suffix) for suffix in ("/lifted", "/inner", "/outer"))
        inner_result, outer_result = (add_like(subgraph, raw, suffix) for suffix in ("/inner", "/outer"))
        ends = [add_tensor(subgraph, f"{name_of(subgraph, source)}/{end}", [1], b) for end, b in (("low", low), ("high", high))]
        twin = copy.copy(operator)
        operator.inputs, operator.outputs = [inner, *map(int, operator.inputs[1:])], [inner_result]
        bias = -1 if nothing is None else add_tensor(subgraph, f"{name_of(subgraph, raw)}/no_bias", [size], nothing)
        twin.inputs, twin.outputs = [outer, int(operator.inputs[1]), bias], [outer_result]
        place = place_of((subgraph, operator))
        subgraph.operators[place : place + 1] = [
            new_operator(model, "MAXIMUM", [source, ends[0]], lifted),
            new_operator(model, "MINIMUM", [lifted, ends[1]], inner),
            new_operator(model, "SUB", [source, inner], outer),
            operator,
            twin,
            new_operator(model, "ADD", [inner_result, outer_result], raw),
        ]
    return True


def clip_bounds(rows: np.ndarray, dynamic: bool = False) -> tuple[float, float] | None:
    """The bounds of the inner part that give the least squared error, or None where a split gains too little.

    A ``dynamic`` layer has a range of its own for each row. On the demo model all six down projections are split: KL to fp32 is
    1.19e-3 where it is 1.33e-3 without, and a layer's product is done twice.
    """
    low, high = min(float(rows.min()), 0.0), max(float(rows.max()), 0.0)
    if high <= low:
        return None
    whole = float(np.square(rounded(rows, dynamic) - rows).mean())
    tried = []
    for share in CLIP_SHARES:
        inner = np.clip(rows, low * share, high * share)
        both = rounded(inner, dynamic) + rounded(rows - inner, dynamic)
        tried.append((float(np.square(both - rows).mean()), low * share, high * share))
    error, inner_low, inner_high = min(tried)
    return (inner_low, inner_high) if error * SPLIT_GAIN < whole else None


def rounded(rows: np.ndarray, by_row: bool) -> np.ndarray:
    """``rows`` [n, columns] after a round trip through int8, with the range of all of them or of each."""
    low, high = (np.minimum(rows.min(1), 0), np.maximum(rows.max(1), 0)) if by_row else (min(rows.min(), 0), max(rows.max(), 0))
    low, high = (np.broadcast_to(end, len(rows))[:, None] for end in (low, high))
    high = np.where(high > low, high, low + 1)  # zeros stay what they are
    return fake_quantised(rows, low, high)
