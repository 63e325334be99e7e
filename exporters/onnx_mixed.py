"""Static int8 in which some layers are something else: 8-bit weight-only, or float, because int8 cost too much there.

Which ones is read from what each layer alone costs (`exporters.onnx_sensitivity`): dearest first, as few as it takes for the
targets to hold on text that calibrated nothing.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from fnmatch import fnmatchcase
from typing import Literal

import onnx
from onnx import numpy_helper

from exporters.onnx_files import compact
from exporters.onnx_qdq import Scheme, linear_layers, quantise
from exporters.onnx_sensitivity import EMBEDDING, Switched
from exporters.onnx_structure import Structure, require_fast_operands
from exporters.onnx_weight_only import insert
from exporters.targets import Targets
from exporters.weight_blocks import Layout, covering_grid, quantise_matrix
from models.errors import GateError, UserError

Form = Literal["weight_only_int8", "float"]
FLOAT_ACTIVATIONS = 1  # MatMulNBits' accuracy level: fp32 inside, because these layers are here for their activations
LAYOUT = Layout(bits=8, block=128, symmetric=True)  # as the weight-only artifact's default


def named_layers(model: onnx.ModelProto, patterns: Sequence[str]) -> tuple[str, ...]:
    """Linear layers, and ``embedding``, that match a shell pattern. UserError for a pattern that matches none."""
    names = (*linear_layers(model), EMBEDDING)
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise UserError(f"onnx_int8.keep_float {pattern!r} names no layer; give some of {', '.join(names)}")
    return tuple(name for name in names if any(fnmatchcase(name, pattern) for pattern in patterns))


def layers_to_leave(switched: Switched, ranking: Sequence[str], targets: Targets) -> tuple[str, ...]:
    """The fewest layers of ``ranking``, dearest first, without which the targets hold when its others are int8."""
    fewest, most = 0, len(ranking)  # with all of them in float there is nothing to miss
    while fewest < most:
        tried = (fewest + most) // 2
        if targets.missed(switched.agreement(ranking[tried:])):
            fewest = tried + 1
        else:
            most = tried
    return tuple(ranking[:most])


def forms_to_try(left: Sequence[str], ranking: Sequence[str], kept_float: Sequence[str]) -> Iterator[dict[str, Form]]:
    """What layers may be where all int8 missed: ``left`` weight-only, then ever more of ``ranking``; and the same in float.

    Weight-only first, because it costs no bytes. The embedding has no such step: its int8 form is weight-only already.
    """
    base: dict[str, Form] = dict.fromkeys(kept_float, "float")
    counts = [max(1, len(left))]
    while counts[-1] < len(ranking):
        counts.append(min(2 * counts[-1], len(ranking)))
    for count in counts if ranking else ():
        yield base | {name: "weight_only_int8" for name in ranking[:count] if name != EMBEDDING}
    for count in counts if ranking else ():
        yield base | dict.fromkeys(ranking[:count], "float")


def mixed(model: onnx.ModelProto, quantised: onnx.ModelProto, scheme: Scheme, forms: dict[str, Form]) -> onnx.ModelProto:
    """``quantised`` with the layers of ``forms`` in that form. ``model`` is the fp32 parent and is left as it was.

    int8 weights are those of ``quantised``, as they were rounded there.
    """
    linear = tuple(name for name in linear_layers(model) if name in forms)
    two_step = tuple(name for name in scheme.two_step if name not in forms)
    made = quantise(compact(model), replace(scheme, two_step=two_step, exclude=linear, embedding=EMBEDDING not in forms))
    rounded = {tensor.name: tensor for tensor in quantised.graph.initializer}
    for tensor in made.graph.initializer:
        if tensor.name in rounded:
            tensor.CopyFrom(rounded[tensor.name])
    weights = {node.name: node.input[1] for node in model.graph.node if node.name in forms}
    tensors = {tensor.name: tensor for tensor in model.graph.initializer}
    blocks = [weights[name] for name in linear if forms[name] == "weight_only_int8"]
    matrices = {name: quantise_matrix(numpy_helper.to_array(tensors[name]), LAYOUT, covering_grid) for name in dict.fromkeys(blocks)}
    insert(made, matrices)
    for node in made.graph.node:
        if node.op_type == "MatMulNBits":
            next(attribute for attribute in node.attribute if attribute.name == "accuracy_level").i = FLOAT_ACTIVATIONS
    return made


def require_mixed(structure: Structure, linear_layers: int, forms: dict[str, Form], artifact: str) -> None:
    """GateError unless ONNX Runtime runs what was chosen. ``linear_layers`` counts a layer of two steps twice."""
    chosen = [form for name, form in forms.items() if name != EMBEDDING]
    expected = {
        "int8 linear layers": (structure.int8_linear, linear_layers - len(chosen)),
        "weight-only linear layers": (structure.block_linear, chosen.count("weight_only_int8")),
        "float products with a constant matrix": (structure.float_linear, chosen.count("float")),
        "weights dequantised at every step": (structure.dequantised_weights, 0),
        "embedding tables in float": (structure.float_embeddings, int(EMBEDDING in forms)),
    }
    for what, (names, count) in expected.items():
        if len(names) != count:
            found = ", ".join(names) or "none"
            raise GateError(f"{artifact}: {len(names)} {what}, expected {count}, after ONNX Runtime's optimisation; found: {found}")
    require_fast_operands(structure, artifact)
