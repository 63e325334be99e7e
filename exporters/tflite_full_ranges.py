"""Ranges that are right for the model, written into a calibrated TFLite file before it is quantised.

The converter calibrates each tensor alone. Three things need more:
- The same tensor in all signatures, and everything that is only moved (reshaped, sliced, joined), shares one range.
  A cache and the new keys or values that go into it are joined in the graph, so host and graph agree on their scale.
- Masked scores. A mask that hides well has a range in which scores vanish. The range is that of the visible scores, cut below
  where nothing counts: hidden slots saturate there, and all of them together weigh less than the softmax can express.
- Logits: the range that costs the least KL (tflite_logit_range).
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from ai_edge_litert import interpreter as litert
from ai_edge_litert import schema_py_generated as schema

from exporters.tflite_calibration import SAMPLED_LOGITS, RowSample
from exporters.tflite_full_convert import Sample
from exporters.tflite_logit_range import LogitRange, choose_logit_range
from exporters.tflite_replay import Replay
from exporters.tflite_structure import OPERATOR_NAMES
from models.errors import GateError

MOVING = ("RESHAPE", "TRANSPOSE", "CONCATENATION", "SLICE", "STRIDED_SLICE", "SPLIT", "GATHER_ND", "SQUEEZE", "EXPAND_DIMS")
SOFTMAX_STEPS = 256  # an int8 softmax answers in this many steps
Key = tuple[int, int]  # subgraph, tensor


@dataclass
class RowRange:
    """Of the visible scores of one layer: the least of the largest of each row, and the largest of all."""

    least_top: float
    top: float


class SampledReplay(Replay):
    """Runs the float file over text: yields what it feeds, and watches the rows that go into each softmax, and the logits."""

    def __init__(self, content: bytes):
        interpreter = litert.Interpreter(
            model_content=content,
            num_threads=1,
            experimental_op_resolver_type=litert.OpResolverType.BUILTIN,
            experimental_preserve_all_tensors=True,
        )
        super().__init__(interpreter)
        self.interpreter = interpreter
        self.logits = RowSample(SAMPLED_LOGITS)
        self.scores: dict[int, RowRange] = {}  # by number of the softmax
        self.watched = {name: softmax_inputs(graph_of(content, name)) for name in self.signatures}
        self.subgraphs = {name: subgraph_of(model_of(content), name) for name in self.signatures}

    def call(self, name: str, tokens: np.ndarray) -> np.ndarray:
        """As ``Replay.call``; rows of padding are left out."""
        logits = super().call(name, tokens)
        self.logits.offer(logits)
        for number, tensor in enumerate(self.watched[name]):
            rows = self.interpreter.get_tensor(tensor, self.subgraphs[name])  # [..., chunk or 1, context + chunk]
            tops = rows[..., : len(tokens), :].max(-1)
            seen = self.scores.setdefault(number, RowRange(np.inf, -np.inf))
            seen.least_top, seen.top = min(seen.least_top, float(tops.min())), max(seen.top, float(tops.max()))
        return logits

    def samples(self, windows: Iterable[np.ndarray], decode_steps: int) -> Iterator[Sample]:
        """Each window as a prompt in whole chunks (padding would widen ranges), then tokens one by one on the filled cache."""
        for window in windows:
            self.reset()
            prompt = max(0, len(window) - decode_steps) // self.chunk * self.chunk
            for start in range(0, prompt, self.chunk):
                yield self.fed(self.prefill, window[start : start + self.chunk])
            for token in window[prompt : prompt + decode_steps]:
                yield self.fed("decode", np.array([token]))

    def fed(self, name: str, tokens: np.ndarray) -> Sample:
        """What one call gets, after that call was made."""
        feeds = {key: value.copy() for key, value in self.feeds(name, tokens).items()}
        self.call(name, tokens)
        return name, feeds


def model_of(content: bytes) -> schema.ModelT:
    return schema.ModelT.InitFromObj(schema.Model.GetRootAs(content, 0))


def subgraph_of(model: schema.ModelT, signature: str) -> int:
    """Index of a signature's subgraph."""
    return next(entry.subgraphIndex for entry in model.signatureDefs if entry.signatureKey.decode() == signature)


def graph_of(content: bytes, signature: str) -> tuple[schema.ModelT, schema.SubGraphT]:
    model = model_of(content)
    return model, model.subgraphs[subgraph_of(model, signature)]


def operator_name(model: schema.ModelT, operator: schema.OperatorT) -> str:
    return OPERATOR_NAMES[model.operatorCodes[operator.opcodeIndex].builtinCode]


def softmax_inputs(graph: tuple[schema.ModelT, schema.SubGraphT]) -> list[int]:
    """The tensor that goes into each softmax, in order."""
    model, subgraph = graph
    return [int(operator.inputs[0]) for operator in subgraph.operators if operator_name(model, operator) == "SOFTMAX"]


class Shared:
    """Tensors that must have one range, as sets that grow together."""

    def __init__(self):
        self.parent: dict[Key, Key] = {}

    def root(self, key: Key) -> Key:
        """The tensor that stands for all that share with ``key``."""
        while (above := self.parent.get(key, key)) != key:
            key = above
        return key

    def join(self, one: Key, other: Key) -> None:
        """Let both, and all that share with them, share."""
        self.parent[self.root(one)] = self.root(other)


@dataclass(frozen=True)
class Edited:
    """What was decided: the shared ranges, the masked scores' ranges [low, high] per layer, the logits' range."""

    shared_ranges: int
    scores: list[tuple[float, float]]
    logits: LogitRange


def edit_ranges(model: schema.ModelT, seen: SampledReplay, hidden_by: float) -> Edited:
    """Rewrite the ranges of the calibrated ``model`` in place. ``hidden_by`` is how much the mask subtracts."""
    shared = shared_tensors(model)
    members: dict[Key, list[schema.QuantizationParametersT]] = defaultdict(list)
    for number, subgraph in enumerate(model.subgraphs):
        for index, tensor in enumerate(subgraph.tensors):
            if calibrated(tensor):
                members[shared.root((number, index))].append(tensor.quantization)
    ranges = {key: (min(float(each.min[0]) for each in found), max(float(each.max[0]) for each in found)) for key, found in members.items()}
    scores = [score_range(seen.scores[number], seen.context, hidden_by) for number in sorted(seen.scores)]
    chosen = choose_logit_range(np.array(seen.logits.rows), np.ones(1, np.float32))
    for name in seen.signatures:
        number = subgraph_of(model, name)
        subgraph = model.subgraphs[number]
        for tensor, score in zip(softmax_inputs((model, subgraph)), scores, strict=True):
            for part in masked_and_unmasked(model, subgraph, tensor):
                ranges[shared.root((number, part))] = score
        ranges[shared.root((number, signature_tensor(model, name, "logits")))] = (chosen.low, chosen.high)
    for key, found in members.items():
        for each in found:
            each.min, each.max = (np.array([end], np.float32) for end in ranges[key])
    return Edited(len(ranges), scores, chosen)


def score_range(seen: RowRange, context_tokens: int, hidden_by: float) -> tuple[float, float]:
    """From where a whole context of hidden slots weighs less than half a step of the softmax in every row, to the largest score."""
    low, high = min(seen.least_top - float(np.log(2 * SOFTMAX_STEPS * context_tokens)), 0.0), max(seen.top, 0.0)
    if high - hidden_by > low:
        raise GateError(
            f"attention scores reach {high:.0f}, which a mask of -{hidden_by:.0f} does not hide; this model's keys are too large for"
            " full-integer int8, leave tflite_full_int8 out of the recipe's artifacts"
        )
    return low, high


def masked_and_unmasked(model: schema.ModelT, subgraph: schema.SubGraphT, softmax_input: int) -> list[int]:
    """The masked scores and the raw ones that the mask is added to."""
    made_by = {int(output): operator for operator in subgraph.operators for output in operator.outputs}
    operator = made_by.get(softmax_input)
    while operator is not None and operator_name(model, operator) in MOVING:
        operator = made_by.get(int(operator.inputs[0]))
    if operator is None or operator_name(model, operator) != "ADD":
        raise GateError("the converted attention adds no mask before its softmax; this model cannot be full-integer int8")
    mask_like = from_mask(model, subgraph)
    raw = [int(tensor) for tensor in operator.inputs if int(tensor) not in mask_like]
    return [int(operator.outputs[0]), *raw]


def from_mask(model: schema.ModelT, subgraph: schema.SubGraphT) -> set[int]:
    """Tensors computed from the mask and constants alone."""
    signature = next(entry for entry in model.signatureDefs if model.subgraphs[entry.subgraphIndex] is subgraph)
    found = {entry.tensorIndex for entry in signature.inputs if entry.name == b"mask"}
    for operator in subgraph.operators:
        sources = {int(tensor) for tensor in operator.inputs if tensor >= 0 and not is_constant(model, subgraph.tensors[tensor])}
        if sources and sources <= found:
            found |= {int(tensor) for tensor in operator.outputs}
    return found


def signature_tensor(model: schema.ModelT, signature: str, name: str) -> int:
    """Index of a signature's input or output of that name."""
    entry = next(entry for entry in model.signatureDefs if entry.signatureKey.decode() == signature)
    return next(each.tensorIndex for each in (*entry.inputs, *entry.outputs) if each.name.decode() == name)


def calibrated(tensor: schema.TensorT) -> bool:
    """Whether the converter wrote a range to this tensor."""
    parameters = tensor.quantization
    return parameters is not None and parameters.min is not None and len(parameters.min) == 1


def is_constant(model: schema.ModelT, tensor: schema.TensorT) -> bool:
    buffer = model.buffers[tensor.buffer]
    return (buffer.data is not None and len(buffer.data) > 0) or buffer.size > 0


def shared_tensors(model: schema.ModelT) -> Shared:
    """Which activations must have one range: what is only moved, twins in both signatures, caches and what goes into them."""
    shared = Shared()
    twins: dict[tuple[str, int], Key] = {}
    counts = [Counter(operator_name(model, operator) for operator in subgraph.operators) for subgraph in model.subgraphs]
    for number, subgraph in enumerate(model.subgraphs):
        met: Counter = Counter()
        for operator in subgraph.operators:
            name = operator_name(model, operator)
            outputs = [(number, int(tensor)) for tensor in operator.outputs]
            if name in MOVING:
                sources = [tensor for tensor in operator.inputs if tensor >= 0 and calibrated(subgraph.tensors[tensor])]
                for source in sources:
                    for output in outputs:
                        shared.join((number, int(source)), output)
            elif len({count[name] for count in counts}) == 1:  # the same operators in the same order, as one module gives them
                shared.join(outputs[0], twins.setdefault((name, met[name]), outputs[0]))
            met[name] += 1
    keys = [(entry.subgraphIndex, each) for entry in model.signatureDefs for each in (*entry.inputs, *entry.outputs)]
    named: dict[str, Key] = {}
    for number, each in keys:
        if calibrated(model.subgraphs[number].tensors[each.tensorIndex]):
            tensor = (number, each.tensorIndex)
            shared.join(tensor, named.setdefault(each.name.decode().removeprefix("new_"), tensor))
    return shared
