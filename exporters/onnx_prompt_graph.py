"""What the prompt graph of a hybrid gives: keys and values of every token, and the logits of the last one alone.

Behind the last layer's attention nothing mixes tokens, and only the last one's logits are wanted of a prompt. So what lies between
the keys and values and the logits is the decode graph's own part, over the last token: its few-bit matrices read fastest for one
token, and both graphs have them from the same file.
"""

import numpy as np
import onnx as onnx_format
from onnx import numpy_helper

from exporters.onnx_qdq import drop_unused_initializers
from exporters.onnx_structure import BLOCK_LINEAR
from models.errors import GateError

LOGITS = "logits"
LAST, END, TOKEN_AXIS = "last_token.start", "last_token.end", "last_token.axis"  # inputs of the Slice that takes it


def keep_cache_only(graph: onnx_format.GraphProto) -> None:
    """Drop the logits and whatever leads to nothing else."""
    kept = [output for output in graph.output if output.name != LOGITS]
    del graph.output[:]
    graph.output.extend(kept)
    nodes = _leading_to(graph, [output.name for output in kept], stop=set())
    del graph.node[:]
    graph.node.extend(nodes)
    drop_unused_initializers(graph)


def give_last_logits(prompt: onnx_format.GraphProto, decode: onnx_format.GraphProto, artifact: str) -> tuple[str, ...]:
    """Have ``prompt``, which gives the cache alone, give ``logits`` ``[batch, 1, vocab]`` of the last token by ``decode``'s part.

    Returns the names of the products with few-bit matrices that were taken. GateError, naming ``artifact``, where the two meet in
    anything but values ``[batch, sequence, n]``.
    """
    here = {output for node in prompt.node for output in node.output} | {value.name for value in prompt.input}
    constants = {tensor.name: tensor for tensor in decode.initializer}
    taken = _leading_to(decode, [LOGITS], stop=here)
    met = dict.fromkeys(name for node in taken for name in node.input if name in here)
    shapes = {value.name: value.type.tensor_type.shape for value in decode.value_info}
    for name in met:
        sizes = [size.dim_value for size in shapes[name].dim] if name in shapes else []
        if len(sizes) != 3 or any(sizes[:2]) or not sizes[2]:
            raise GateError(f"{artifact}, prompt graph: {name}, where the last token is taken, has sizes {sizes}, not [batch, sequence, n]")
    held = {tensor.name for tensor in prompt.initializer}
    needed = dict.fromkeys(name for node in taken for name in node.input if name in constants)
    prompt.initializer.extend(constants[name] for name in needed if name not in held)
    places = {LAST: -1, END: np.iinfo(np.int64).max, TOKEN_AXIS: 1}
    prompt.initializer.extend(numpy_helper.from_array(np.array([place], np.int64), name) for name, place in places.items())
    for name in met:
        prompt.node.append(onnx_format.helper.make_node("Slice", [name, *places], [f"{name}.last"], f"{name}.last"))
    for node in taken:
        copy = prompt.node.add()
        copy.CopyFrom(node)
        copy.input[:] = [f"{name}.last" if name in met else name for name in node.input]
    made = {output for node in taken for output in node.output}
    kept = [value for value in prompt.value_info if value.name not in made]  # what is told of the others was true of all tokens
    del prompt.value_info[:]
    prompt.value_info.extend(kept)
    prompt.output.add().CopyFrom(next(output for output in decode.output if output.name == LOGITS))
    prompt.output[-1].type.tensor_type.shape.dim[1].dim_value = 1
    return tuple(node.name for node in taken if node.op_type in BLOCK_LINEAR)


def _leading_to(graph: onnx_format.GraphProto, outputs: list[str], stop: set[str]) -> list[onnx_format.NodeProto]:
    """The nodes, in their order, that ``outputs`` need beside the values of ``stop``. An input or output left out has the empty name."""
    producers = {output: node for node in graph.node for output in node.output if output}
    reached, waiting = set(), list(outputs)
    while waiting:
        name = waiting.pop()
        if name in producers and name not in reached and name not in stop:
            reached.add(name)
            waiting += [given for given in producers[name].input if given]
    return [node for node in graph.node if reached & set(node.output)]
