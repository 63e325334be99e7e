"""A two-layer attention model in plain numpy, the same model as ONNX and as TFLite, and golden vectors of it.

The numpy form recomputes everything for each text: no cache, so that it can judge the ones that have one.
"""

import hashlib
import json
from dataclasses import asdict
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from device_tests.artifact import Interface

VOCABULARY, LAYERS, HEADS, KV_HEADS, HEAD_DIM, CONTEXT = 48, 2, 2, 1, 8, 40
PREFILL = (4, 8)
HIDDEN = HEADS * HEAD_DIM
INTERFACE = Interface(VOCABULARY, LAYERS, KV_HEADS, HEAD_DIM, CONTEXT, PREFILL, None, 0)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return weights / weights.sum(axis=-1, keepdims=True)


class ToyModel:
    """Embedding plus position, two attention layers with one KV head for two query heads, a head. Weights from ``seed``."""

    def __init__(self, seed: int = 0, spread: float = 1.0) -> None:
        generator = np.random.default_rng(seed)

        def draw(*shape: int) -> np.ndarray:
            return generator.normal(scale=spread / np.sqrt(shape[0]), size=shape).astype(np.float32)

        self.embedding = draw(VOCABULARY, HIDDEN) * 6
        self.position = draw(CONTEXT, HIDDEN) * 3
        width = KV_HEADS * HEAD_DIM
        self.layers = [
            {"q": draw(HIDDEN, HIDDEN), "k": draw(HIDDEN, width), "v": draw(HIDDEN, width), "o": draw(HIDDEN, HIDDEN)}
            for _ in range(LAYERS)
        ]
        self.head = draw(HIDDEN, VOCABULARY) * 2

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Float32 ``[n, vocab]`` of int ``[n]`` tokens."""
        count = len(tokens)
        hidden = self.embedding[tokens] + self.position[:count]
        hidden_by_mask = np.where(np.tri(count, dtype=bool), 0, -np.inf)
        for layer in self.layers:
            query = (hidden @ layer["q"]).reshape(count, HEADS, HEAD_DIM).transpose(1, 0, 2)
            keys, values = hidden @ layer["k"], hidden @ layer["v"]  # [n, head_dim]
            weights = softmax(query @ keys.T / np.sqrt(HEAD_DIM) + hidden_by_mask)
            hidden = hidden + (weights @ values).transpose(1, 0, 2).reshape(count, HIDDEN) @ layer["o"]
        return (hidden @ self.head).astype(np.float32)


class NumpySession:
    """A ToyModel behind the interface of a session; ``spoil`` may change a row of logits before it is handed out."""

    def __init__(self, model: ToyModel, spoil=lambda row, position: row) -> None:
        self.interface, self.position, self.notes = INTERFACE, 0, []
        self._model, self._spoil, self._tokens = model, spoil, []

    def reset(self) -> None:
        self.position, self._tokens = 0, []

    def prefill(self, tokens: np.ndarray) -> np.ndarray:
        self._tokens += [int(token) for token in tokens]
        self.position = len(self._tokens)
        return self._spoil(self._model.logits(np.array(self._tokens))[-1], self.position - 1)

    def step(self, token: int) -> np.ndarray:
        return self.prefill(np.array([token]))


def write_sidecar(path: Path, form: str) -> Path:
    """The JSON beside a model file."""
    data = path.read_bytes()
    sha256 = hashlib.sha256(data).hexdigest()
    interface = asdict(INTERFACE)
    interface["prefill_tokens"] = list(PREFILL) if form == "tflite" else None
    record = {
        "name": path.stem,
        "format": form,
        "file": path.name,
        "files": [{"path": path.name, "sha256": sha256, "bytes": len(data)}],
        "sha256": sha256,
        "bytes": len(data),
        "interface": interface,
    }
    sidecar = path.with_suffix(".json")
    sidecar.write_text(json.dumps(record))
    return sidecar


def write_onnx(model: ToyModel, path: Path) -> Path:
    """The toy as ONNX with GroupQueryAttention; returns the sidecar."""
    constants = {"embedding": model.embedding, "position": model.position, "head": model.head}
    constants.update({f"{kind}_{i}": weight for i, layer in enumerate(model.layers) for kind, weight in layer.items()})
    one, axis, zero = np.array([1], dtype=np.int64), np.array([1], dtype=np.int64), np.array(0, dtype=np.int64)
    constants.update(one=one, axis=axis, zero=zero, unit=np.array(1, dtype=np.int64))
    nodes = [
        helper.make_node("ReduceSum", ["attention_mask", "axis"], ["lengths"], keepdims=0),
        helper.make_node("Sub", ["lengths", "one"], ["last"]),
        helper.make_node("Cast", ["last"], ["seqlens"], to=TensorProto.INT32),
        helper.make_node("Shape", ["attention_mask"], ["mask_shape"]),
        helper.make_node("Gather", ["mask_shape", "unit"], ["total_long"]),
        helper.make_node("Cast", ["total_long"], ["total"], to=TensorProto.INT32),
        helper.make_node("Shape", ["input_ids"], ["ids_shape"]),
        helper.make_node("Gather", ["ids_shape", "unit"], ["new"]),
        helper.make_node("Sub", ["total_long", "new"], ["past"]),
        helper.make_node("Range", ["past", "total_long", "unit"], ["positions"]),
        helper.make_node("Gather", ["embedding", "input_ids"], ["words"]),
        helper.make_node("Gather", ["position", "positions"], ["places"]),
        helper.make_node("Add", ["words", "places"], ["hidden_0"]),
    ]
    for i in range(LAYERS):
        nodes += [helper.make_node("MatMul", [f"hidden_{i}", f"{kind}_{i}"], [f"{kind}{i}"]) for kind in "qkv"]
        pasts = [f"past_key_values.{i}.key", f"past_key_values.{i}.value"]
        presents = [f"present.{i}.key", f"present.{i}.value"]
        nodes.append(
            helper.make_node(
                "GroupQueryAttention",
                [f"q{i}", f"k{i}", f"v{i}", *pasts, "seqlens", "total"],
                [f"mixed_{i}", *presents],
                domain="com.microsoft",
                num_heads=HEADS,
                kv_num_heads=KV_HEADS,
            )
        )
        nodes.append(helper.make_node("MatMul", [f"mixed_{i}", f"o_{i}"], [f"update_{i}"]))
        nodes.append(helper.make_node("Add", [f"hidden_{i}", f"update_{i}"], [f"hidden_{i + 1}"]))
    nodes.append(helper.make_node("MatMul", [f"hidden_{LAYERS}", "head"], ["logits"]))
    inputs = [
        helper.make_tensor_value_info("input_ids", TensorProto.INT64, ["batch", "seq"]),
        helper.make_tensor_value_info("attention_mask", TensorProto.INT64, ["batch", "total"]),
    ]
    outputs = [helper.make_tensor_value_info("logits", TensorProto.FLOAT, ["batch", "seq", VOCABULARY])]
    for i in range(LAYERS):
        for kind in ("key", "value"):
            for name, length, tensors in (
                (f"past_key_values.{i}.{kind}", "past", inputs),
                (f"present.{i}.{kind}", "all", outputs),
            ):
                tensors.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", KV_HEADS, length, HEAD_DIM]))
    initializers = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph(nodes, "toy", inputs, outputs, initializers)
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=8), path)
    return write_sidecar(path, "onnx")


def write_vectors(folder: Path, reference: ToyModel, dense: ToyModel, top_k: int = 6) -> Path:
    """golden.npz and evaluation.npz of two toys, by formulas written out once more."""
    generator = np.random.default_rng(3)
    length, prompt, scored, steps = 24, 11, 6, 10
    windows = generator.integers(0, VOCABULARY, size=(3, length), dtype=np.int32)
    rows = np.stack([reference.logits(window) for window in windows])  # [3, length, vocab]
    continuations = []
    for window in windows[:2]:
        tokens = list(window[:5])
        for _ in range(steps):
            tokens.append(int(reference.logits(np.array(tokens))[-1].argmax()))
        continuations.append(tokens[5:])
    np.savez(
        folder / "golden.npz",
        windows=windows,
        prompt_tokens=np.int32(prompt),
        logits=rows[:, prompt - 1 : prompt - 1 + scored],
        greedy_prompts=windows[:2, :5],
        greedy_tokens=np.array(continuations, dtype=np.int32),
    )
    probability = softmax(rows[:, prompt - 1 : -1].astype(np.float64))
    ids = np.argsort(-probability, axis=-1)[..., :top_k]
    top = np.take_along_axis(probability, ids, axis=-1)
    targets = windows[:, prompt:, None].astype(np.int64)
    dense_probability = softmax(np.stack([dense.logits(window) for window in windows])[:, prompt - 1 : -1].astype(np.float64))
    np.savez(
        folder / "evaluation.npz",
        windows=windows,
        prompt_tokens=np.int32(prompt),
        top_ids=ids.astype(np.int32),
        top_logprob=np.log(top).astype(np.float32),
        rest_logprob=np.log(1 - top.sum(axis=-1)).astype(np.float32),
        target_logprob=np.log(np.take_along_axis(probability, targets, axis=-1)[..., 0]).astype(np.float32),
        dense_target_logprob=np.log(np.take_along_axis(dense_probability, targets, axis=-1)[..., 0]).astype(np.float32),
    )
    return folder
