"""The TFLite artifact in the form that LiteRT-LM runs: the graph keeps its own cache, and nothing but tokens and positions goes in.

LiteRT-LM (runtime/executor of google-ai-edge/LiteRT-LM) finds tensors by name. It hands one buffer to ``kv_cache_k_0`` as input and as
output, fills ``tokens`` and ``positions``, sets those behind a short prompt to 0, and wants logits ``[1, 1, vocab]`` of ``decode`` alone.
So each signature is edited: the mask is computed from the first position, the new keys and values are written into the cache in place,
and what only served outputs that are gone goes too. Weights and arithmetic stay as they were proved.

LiteRT-LM keeps packed weights in a file. There two layers that share a weight, and whose inputs differ in scale and zero point, got each
other's without a word (0.18.1: perplexity up by 7 % on the demo model; LiteRT 2.3.0 keeps them apart). They get buffers of their own.

One buffer for both sides of the cache is safe: of it, attention looks only at slots before the first position, the others are hidden
from it, and writing begins at the first position.
"""

import copy
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema

from exporters.tflite_structure import read_model, write_model

KEPT_INPUTS = ("tokens", "positions")
HIDDEN = -30.0  # as hosts write it: what a quantised mask was calibrated with
TYPES = {np.dtype(np.float32): schema.TensorType.FLOAT32, np.dtype(np.int32): schema.TensorType.INT32}
OPTIONS = {
    "CONCATENATION": "ConcatenationOptions",
    "DYNAMIC_UPDATE_SLICE": "DynamicUpdateSliceOptions",
    "LESS": "LessOptions",
    "RESHAPE": "ReshapeOptions",
    "SELECT_V2": "SelectV2Options",
    "SLICE": "SliceOptions",
    "TILE": "TileOptions",
}


class Editor:
    """A subgraph with the means to put tensors and operators into it; ``before`` and ``after`` are put around what is there."""

    def __init__(self, model: schema.ModelT, signature: schema.SignatureDefT) -> None:
        self.model, self.signature = model, signature
        self.subgraph = model.subgraphs[signature.subgraphIndex]
        self.before: list[schema.OperatorT] = []
        self.after: list[schema.OperatorT] = []
        self.inputs = {entry.name.decode(): entry.tensorIndex for entry in signature.inputs}
        self.outputs = {entry.name.decode(): entry.tensorIndex for entry in signature.outputs}

    def shape(self, tensor: int) -> list[int]:
        return [int(size) for size in self.subgraph.tensors[tensor].shape]

    def constant(self, name: str, values: np.ndarray) -> int:
        """Index of a new constant."""
        self.model.buffers.append(schema.BufferT(data=np.ascontiguousarray(values).reshape(-1).view(np.uint8)))
        return self._tensor(name, list(values.shape), TYPES[values.dtype], len(self.model.buffers) - 1)

    def put(self, where: list[schema.OperatorT], kind: str, inputs: list[int], name: str, shape: list[int], element: int, **options) -> int:
        """Append an operator to ``before`` or ``after``; index of the tensor that it makes."""
        output = self._tensor(name, shape, element, 0)
        self.put_into(where, kind, inputs, output, **options)
        return output

    def put_into(self, where: list[schema.OperatorT], kind: str, inputs: list[int], output: int, **options) -> None:
        """Append an operator that makes the tensor ``output``."""
        operator = schema.OperatorT(opcodeIndex=self._code(getattr(schema.BuiltinOperator, kind)), inputs=inputs, outputs=[output])
        operator.builtinOptions = getattr(schema, f"{OPTIONS[kind]}T")(**options)
        operator.builtinOptionsType = getattr(schema.BuiltinOptions, OPTIONS[kind])
        where.append(operator)

    def finish(self, inputs: dict[str, int], outputs: dict[str, int]) -> None:
        """Give the signature these tensors and drop every operator that no output needs."""
        needed, kept = set(outputs.values()), []
        for operator in reversed([*self.before, *self.subgraph.operators, *self.after]):
            if needed & set(operator.outputs):
                kept.append(operator)
                needed.update(index for index in operator.inputs if index >= 0)
        self.subgraph.operators = kept[::-1]
        self.subgraph.inputs, self.subgraph.outputs = list(inputs.values()), list(outputs.values())
        self.signature.inputs = [schema.TensorMapT(name, index) for name, index in inputs.items()]
        self.signature.outputs = [schema.TensorMapT(name, index) for name, index in outputs.items()]

    def _tensor(self, name: str, shape: list[int], element: int, buffer: int) -> int:
        tensor = schema.TensorT(shape=shape, type=element, buffer=buffer, name=name.encode(), hasRank=True)
        self.subgraph.tensors.append(tensor)
        return len(self.subgraph.tensors) - 1

    def _code(self, code: int) -> int:
        for index, known in enumerate(self.model.operatorCodes):
            if known.builtinCode == code:
                return index
        self.model.operatorCodes.append(schema.OperatorCodeT(builtinCode=code, deprecatedBuiltinCode=min(code, 127), version=1))
        return len(self.model.operatorCodes) - 1


def write_self_caching(source: Path, target: Path, layers: int) -> None:
    """Write ``target``: the TFLite file ``source`` of ``layers`` layers, whose signatures keep their own cache."""
    model = with_buffers_inside(source)
    for signature in model.signatureDefs:
        edit(Editor(model, signature), layers)
    separate_weights(model)
    write_model(model, target)


def separate_weights(model: schema.ModelT) -> None:
    """Give every way in which a weight of a linear layer is used, by the quantisation of input and output, a buffer of its own."""
    uses: dict[int, dict[tuple, int]] = {}  # by buffer: the buffer of each way
    for subgraph in model.subgraphs:
        for operator in subgraph.operators:
            if model.operatorCodes[operator.opcodeIndex].builtinCode != schema.BuiltinOperator.FULLY_CONNECTED:
                continue
            weight = subgraph.tensors[operator.inputs[1]]
            way = tuple(quantisation(subgraph.tensors[index]) for index in (operator.inputs[0], operator.outputs[0]))
            ways = uses.setdefault(weight.buffer, {way: weight.buffer})
            if way not in ways:
                model.buffers.append(schema.BufferT(data=model.buffers[weight.buffer].data))
                ways[way] = len(model.buffers) - 1
            if ways[way] != weight.buffer:
                twin = copy.copy(weight)
                twin.buffer = ways[way]
                subgraph.tensors.append(twin)
                operator.inputs = [operator.inputs[0], len(subgraph.tensors) - 1, *operator.inputs[2:]]


def quantisation(tensor: schema.TensorT) -> tuple:
    """Scales and zero points of a tensor, empty for a float one."""
    found = tensor.quantization
    return () if found is None or found.scale is None else (tuple(found.scale), tuple(found.zeroPoint))


def with_buffers_inside(path: Path) -> schema.ModelT:
    """The flatbuffer as objects, with the buffers that stand behind it in a large file taken in."""
    model, data = read_model(path), path.read_bytes()
    for buffer in model.buffers:
        if buffer.offset > 1:
            buffer.data = np.frombuffer(data, np.uint8, buffer.size, buffer.offset)
            buffer.offset = buffer.size = 0
    return model


def edit(editor: Editor, layers: int) -> None:
    """Make one signature keep its cache."""
    chunk = editor.shape(editor.inputs["tokens"])[1]
    context = editor.shape(editor.inputs["k_0"])[2]
    first = first_position(editor)
    put_mask(editor, first, chunk, context)
    if "last" in editor.inputs:  # nobody asks a prompt for logits: what depends on it goes at the end
        last = editor.subgraph.tensors[editor.inputs["last"]]
        editor.model.buffers.append(schema.BufferT(data=np.array([chunk - 1], np.int32).view(np.uint8)))
        last.buffer = len(editor.model.buffers) - 1
    start = [editor.constant(f"start_{count}", np.zeros(count, np.int32)) for count in (2, 1)]
    row = editor.put(
        editor.before, "RESHAPE", [first, editor.constant("one", np.array([1], np.int32))], "row", [1], schema.TensorType.INT32
    )
    place = editor.put(editor.before, "CONCATENATION", [start[0], row, start[1]], "place", [4], schema.TensorType.INT32, axis=0)
    inputs = {name: editor.inputs[name] for name in KEPT_INPUTS}
    outputs = {}
    for layer in range(layers):
        for part in ("k", "v"):
            old, new, name = editor.inputs[f"{part}_{layer}"], editor.outputs[f"new_{part}_{layer}"], f"kv_cache_{part}_{layer}"
            inputs[name] = old
            outputs[name] = editor.put(
                editor.after, "DYNAMIC_UPDATE_SLICE", [old, new, place], f"{name}_updated", editor.shape(old), schema.TensorType.FLOAT32
            )
    if "last" not in editor.inputs:
        logits = editor.outputs["logits"]
        shape = [1, 1, editor.shape(logits)[-1]]
        wanted = editor.constant("logits_shape", np.array(shape, np.int32))
        outputs["logits"] = editor.put(editor.after, "RESHAPE", [logits, wanted], "logits_3d", shape, schema.TensorType.FLOAT32)
    editor.finish(inputs, outputs)


def first_position(editor: Editor) -> int:
    """The position of the call's first token, [1, 1, 1, 1]; those behind a short prompt are 0 and say nothing."""
    begin, size = (editor.constant(name, np.array(values, np.int32)) for name, values in (("begin", [0, 0]), ("size", [1, 1])))
    one = editor.put(editor.before, "SLICE", [editor.inputs["positions"], begin, size], "first", [1, 1], schema.TensorType.INT32)
    shape = editor.constant("first_shape", np.ones(4, np.int32))
    return editor.put(editor.before, "RESHAPE", [one, shape], "first_4d", [1, 1, 1, 1], schema.TensorType.INT32)


def put_mask(editor: Editor, first: int, chunk: int, context: int) -> None:
    """Compute the mask [1, 1, chunk, context + chunk]: cached slots before the first position, and the chunk's own past."""
    columns = editor.constant("columns", np.arange(context, dtype=np.int32).reshape(1, 1, 1, context))
    seen, unseen = editor.constant("seen", np.zeros(1, np.float32)), editor.constant("unseen", np.full(1, HIDDEN, np.float32))
    before = editor.put(editor.before, "LESS", [columns, first], "is_cached", [1, 1, 1, context], schema.TensorType.BOOL)
    cached = editor.put(editor.before, "SELECT_V2", [before, seen, unseen], "cached_row", [1, 1, 1, context], schema.TensorType.FLOAT32)
    if chunk > 1:
        times = editor.constant("times", np.array([1, 1, chunk, 1], np.int32))
        cached = editor.put(editor.before, "TILE", [cached, times], "cached", [1, 1, chunk, context], schema.TensorType.FLOAT32)
    own = np.where(np.tri(chunk, dtype=bool), 0, HIDDEN).astype(np.float32).reshape(1, 1, chunk, chunk)
    editor.put_into(editor.before, "CONCATENATION", [cached, editor.constant("own", own)], editor.inputs["mask"], axis=3)
