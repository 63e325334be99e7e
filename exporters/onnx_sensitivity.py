"""What quantising each layer alone costs: KL divergence from the fp32 graph, layer by layer and operator by operator.

One graph holds every layer twice, as float and as int8, with a switch for each: ``float + switch * (int8 - float)``. One
session of it answers every question of the kind "what if only these were int8", without quantising anything again. Used also
to find which layers have to leave int8, because that is the same question.

One run of the whole model for every layer is too much where both are large. There the layers are ranked by what one run tells of all
of them: how far each layer's int8 output is from its float output, given the same float input.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import NodeProto, TensorProto, helper

from exporters.onnx_agreement import Agreement, agreement_of, logprob
from exporters.onnx_files import compact
from exporters.onnx_qdq import linear_layers
from exporters.onnx_session import empty_past, feed, open_session_of
from exporters.onnx_structure import is_token_gather
from models.progress import track

EMBEDDING = "embedding"
EXPECTED_BYTES = 256 * 2**20  # of fp32 logits that are held
ON, OFF = np.array(1, np.float32), np.array(0, np.float32)


@dataclass(frozen=True)
class Cost:
    """What is lost when only ``name`` is int8: mean KL in nats per token, and share of equal first choices."""

    name: str
    kl: float
    top1: float


@dataclass(frozen=True)
class LocalError:
    """The squared error of a layer's own int8 output over the squared output: one over its signal-to-noise ratio."""

    name: str
    share: float


@dataclass(frozen=True)
class Sensitivity:
    """Costs of single layers and of all layers of one kind together, each dearest first; ``tokens`` were measured."""

    layers: tuple[Cost, ...]
    operators: tuple[Cost, ...]
    tokens: int


class Switched:
    """A session in which every linear layer, and the embedding, is int8 or float as each call says."""

    def __init__(self, model: onnx.ModelProto, quantised: onnx.ModelProto, windows: np.ndarray):
        """``model`` is the fp32 parent of ``quantised``; ``windows`` int ``[n, tokens]``: as many are used as fit the memory."""
        switched = compact(quantised)
        self.names = add_switches(switched.graph, model.graph)
        self.session = open_session_of(switched)
        first = self._logits(windows[0], frozenset())
        self.windows = windows[: max(1, EXPECTED_BYTES // first.nbytes)]
        self.expected = [first, *(self._logits(window, frozenset()) for window in self.windows[1:])]

    def agreement(self, int8: Iterable[str], count: int | None = None) -> Agreement:
        """Against all in float, when the layers ``int8`` are int8; on the first ``count`` windows, or on all."""
        chosen, windows = frozenset(int8), self.windows[:count]
        pairs = (
            (logprob(expected), logprob(self._logits(window, chosen)))
            for expected, window in zip(self.expected[:count], windows, strict=True)
        )
        return agreement_of(pairs, windows)

    def local_errors(self) -> tuple[LocalError, ...]:
        """Every layer's own error over all windows, largest first, while all run in float."""
        wanted = [part(name) for name in self.names for part in (noise_of, signal_of)]
        switches = {switch_of(name): OFF for name in self.names}
        sums = np.zeros(len(wanted))
        for window in self.windows:
            sums += self.session.run(wanted, feed(window[None], empty_past(self.session, 1)) | switches)
        noise, signal = sums.reshape(-1, 2).T
        shares = np.divide(noise, signal, out=np.zeros_like(noise), where=signal > 0)
        errors = (LocalError(name, float(share)) for name, share in zip(self.names, shares, strict=True))
        return tuple(sorted(errors, key=lambda error: (-error.share, error.name)))

    def _logits(self, window: np.ndarray, int8: frozenset[str]) -> np.ndarray:
        """float32 ``[tokens - 1, vocab]``, of what follows each token but the last."""
        switches = {switch_of(name): ON if name in int8 else OFF for name in self.names}
        return self.session.run(["logits"], feed(window[None], empty_past(self.session, 1)) | switches)[0][0, :-1]


def sensitivity(switched: Switched, windows: int) -> Sensitivity:
    """Every layer alone, then every kind of layer (``down_proj`` of all layers, say), on the first ``windows`` windows."""
    kinds: dict[str, list[str]] = {}
    for name in switched.names:
        kinds.setdefault(name.rsplit(".", 1)[-1], []).append(name)
    groups = [(name, [name]) for name in switched.names] + list(kinds.items())
    costs = []
    for name, members in track(groups, "measuring sensitivity", total=len(groups)):
        found = switched.agreement(members, windows)
        costs.append(Cost(name, found.kl, found.top1))
    single, together = costs[: len(switched.names)], costs[len(switched.names) :]
    return Sensitivity(dearest_first(single), dearest_first(together), switched.windows[:windows, 1:].size)


def dearest_first(costs: list[Cost]) -> tuple[Cost, ...]:
    return tuple(sorted(costs, key=lambda cost: (-cost.kl, cost.name)))


def switch_of(name: str) -> str:
    """The graph input, a float32 scalar, that turns ``name`` to int8 (1) or float (0)."""
    return f"int8.{name}"


def noise_of(name: str) -> str:
    """The graph output, a float32 scalar, with the sum of squares of the layer's int8 output less its float output."""
    return f"noise.{name}"


def signal_of(name: str) -> str:
    """The graph output, a float32 scalar, with the sum of squares of the layer's float output."""
    return f"signal.{name}"


def add_switches(quantised: onnx.GraphProto, model: onnx.GraphProto) -> tuple[str, ...]:
    """Put the float layers of ``model`` beside their int8 forms in ``quantised``. Returns what can be switched."""
    originals = {node.name: node for node in model.node}
    layers = linear_layers(onnx.helper.make_model(model))
    for name in layers:
        _switch(quantised, [originals[name]], name)
    embeddings = embedding_nodes(model)
    for nodes in embeddings:
        _switch(quantised, nodes, EMBEDDING)
    names = (*layers, *([EMBEDDING] if embeddings else []))
    quantised.input.extend(helper.make_tensor_value_info(switch_of(name), TensorProto.FLOAT, []) for name in names)
    sums = [part(name) for name in names for part in (noise_of, signal_of)]
    quantised.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, []) for name in sums)
    constants = {tensor.name: tensor for tensor in model.initializer}
    present = {tensor.name for tensor in quantised.initializer}
    wanted = {value for node in quantised.node for value in node.input} & constants.keys() - present
    quantised.initializer.extend(constants[name] for name in sorted(wanted))
    return names


def embedding_nodes(graph: onnx.GraphProto) -> list[list[NodeProto]]:
    """Each look-up of token ids in a constant table; after a table by columns the Transpose that turns it belongs to it."""
    producers = {output: node for node in graph.node for output in node.output}
    constants = {tensor.name for tensor in graph.initializer}
    found = []
    for node in graph.node:
        if is_token_gather(node, producers) and node.input[0] in constants:
            axis = next((attribute.i for attribute in node.attribute if attribute.name == "axis"), 0)
            found.append([node] if axis == 0 else [node, next(other for other in graph.node if node.output[0] in other.input)])
    return found


def _switch(graph: onnx.GraphProto, float_nodes: list[NodeProto], name: str) -> None:
    """Blend the output that ``float_nodes`` had in the fp32 graph with what ``graph`` computes under the same name."""
    output = float_nodes[-1].output[0]
    stem = f"{output}.switched"
    int8_node = next(node for node in graph.node if output in node.output)
    position = list(graph.node).index(int8_node) + 1
    int8_node.output[list(int8_node.output).index(output)] = f"{stem}.int8"
    copies = []
    renamed = {node.output[0]: f"{stem}.float{index}" for index, node in enumerate(float_nodes)}
    for node in float_nodes:
        copy = NodeProto()
        copy.CopyFrom(node)
        copy.name = f"{node.name}.float"
        copy.input[:] = [renamed.get(value, value) for value in node.input]
        copy.output[:] = [renamed[node.output[0]]]
        copies.append(copy)
    kept = renamed[output]
    nodes = [
        *copies,
        helper.make_node("Sub", [f"{stem}.int8", kept], [f"{stem}.error"], f"{stem}.error"),
        helper.make_node("Mul", [f"{stem}.error", switch_of(name)], [f"{stem}.chosen"], f"{stem}.chosen"),
        helper.make_node("Add", [kept, f"{stem}.chosen"], [output], f"{stem}.sum"),
        helper.make_node("ReduceSumSquare", [f"{stem}.error"], [noise_of(name)], f"{stem}.noise", keepdims=0),
        helper.make_node("ReduceSumSquare", [kept], [signal_of(name)], f"{stem}.signal", keepdims=0),
    ]
    for offset, node in enumerate(nodes):
        graph.node.insert(position + offset, node)
