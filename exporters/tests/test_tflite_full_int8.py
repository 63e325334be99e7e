"""Strict full-integer TFLite on tiny random models: what is int8, what it computes in both runtimes, and failures that must be named."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import interpreter as litert

from conftest import VOCABULARY, write_checkpoint
from device_tests.artifact import read_artifact
from device_tests.errors import ArtifactFailure
from device_tests.tflite_calls import InterpreterCalls
from device_tests.tflite_session import TfliteSession, open_model, signatures_of
from exporters import tflite_full_int8
from exporters.settings import TfliteFullInt8Settings
from exporters.tflite_export import reference_logits
from exporters.tflite_full_check import check_strict, check_types_and_scales
from exporters.tflite_full_ranges import RowRange, score_range, signature_tensor, subgraph_of
from exporters.tflite_parity import Feeds, agreement
from exporters.tflite_replay import Replay, replay_all
from exporters.tflite_structure import Operator, Tensor, constant_bytes, operators, read_model
from models.checkpoint import load_model, shape_of
from models.errors import GateError, UserError

SETTINGS = TfliteFullInt8Settings(windows=6, decode_steps=6, prefill_tokens=12, context_tokens=48)
NAME = "tflite_full_int8"


@pytest.fixture(scope="module")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("full_int8_text")
    rng = np.random.default_rng(0)
    for name in ("calibration", "validation"):
        np.save(folder / f"{name}.npy", rng.integers(0, VOCABULARY, (8, 42)).astype(np.int32))
    return folder


@pytest.fixture(scope="module", params=["llama", "gpt2", "qwen3"])
def converted(request, tmp_path_factory, text_folder) -> Path:
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp(f"full_int8_{request.param}")
    write_checkpoint(folder / "model", request.param)
    tflite_full_int8.run(SETTINGS, folder, model=folder / "model", text=text_folder)
    return folder


def replay_of(folder: Path) -> Replay:
    return Replay(litert.Interpreter(str(folder / f"{NAME}.tflite"), num_threads=1))


def random_tokens(*shape: int) -> np.ndarray:
    return np.random.default_rng(7).integers(0, VOCABULARY, shape).astype(np.int32)


def session_of(folder: Path) -> TfliteSession:
    return open_model(read_artifact(folder / f"{NAME}.json"), litert, threads=1)


def test_nothing_is_float(converted):
    sidecar = json.loads((converted / f"{NAME}.json").read_text())
    found = operators(read_model(converted / f"{NAME}.tflite"))
    kinds = {tensor.dtype for operator in found for tensor in (*operator.inputs, *operator.outputs) if tensor is not None}
    assert "int8" in kinds and kinds <= {"int8", "int32", "int64", "bool"}
    for contract in sidecar["tensors"].values():
        types = {entry["name"]: entry["dtype"] for side in contract.values() for entry in side}
        assert {name for name, dtype in types.items() if dtype == "int32"} <= {"tokens", "positions", "last"}
        assert types["logits"] == types["mask"] == types["k_0"] == types["new_v_1"] == "int8"
    assert sidecar["measured"]["not_int8"] == []
    assert set(sidecar["measured"]["scales"]) == {"mask", "logits", "k_0", "v_0", "k_1", "v_1"}


def test_runtimes_are_those_that_were_proved(converted):
    sidecar = json.loads((converted / f"{NAME}.json").read_text())
    measured = sidecar["measured"]
    assert sidecar["runtimes"] == list(measured["agreement_with_pytorch"]) == ["litert", "tflite"] and not measured["not_proved"]
    for found in measured["agreement_with_pytorch"].values():
        assert found["top1"] > 0.5 and 0 < found["kl"] < 0.1  # random weights: flat logits; chance would be 1 in 384


def test_same_bytes_twice(checkpoints, text_folder, tmp_path):
    for name in ("one", "other"):
        (tmp_path / name).mkdir()
        tflite_full_int8.run(SETTINGS, tmp_path / name, model=checkpoints["llama"], text=text_folder)
    for file in (f"{NAME}.tflite", f"{NAME}.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "other" / file).read_bytes()


def test_weights_are_stored_once(converted):
    """A tied embedding too, and one copy for both signatures."""
    parameters = shape_of(load_model(converted / "model")).parameters
    assert constant_bytes(read_model(converted / f"{NAME}.tflite")) < 1.15 * parameters


def test_it_is_near_pytorch(converted):
    feeds = Feeds(random_tokens(3, 40), np.array([24, 12, 5], np.int32))
    expected = reference_logits(load_model(converted / "model"), feeds)
    found = agreement(replay_all(replay_of(converted), feeds.tokens, feeds.prompt_tokens), expected)
    assert found.top1 > 0.5 and found.kl < 0.1


def test_prefill_and_decode_agree(converted):
    """The same text in chunks and token by token: the same scales, so the same but for rounding. Measured against unrelated text."""
    replay = replay_of(converted)
    chunks, steps = [], []
    for tokens in random_tokens(4, 30):
        replay.reset()
        chunks.append(replay.prompt(tokens))
        replay.reset()
        steps.append([replay.call("decode", token[None]) for token in tokens][-1])
    found = agreement(np.array(steps)[:, None], np.array(chunks)[:, None])
    unrelated = agreement(np.array(steps)[::-1, None], np.array(chunks)[:, None])
    assert found.kl < 0.05 and found.kl < 0.1 * unrelated.kl and found.max_abs_diff < 0.3 * unrelated.max_abs_diff


def test_hidden_slots_do_not_count(converted):
    """What stands in cache slots behind the position changes nothing."""
    replay = replay_of(converted)
    tokens = random_tokens(10)
    clean = replay.prompt(tokens)
    replay.reset()
    rng = np.random.default_rng(1)
    for part in replay.cache.values():
        part[:] = rng.integers(-128, 128, part.shape)
    dirty = replay.prompt(tokens)
    assert agreement(dirty[None, None], clean[None, None]).kl < 0.01


def test_session_has_an_int8_cache(converted):
    session, replay = session_of(converted), replay_of(converted)
    tokens = random_tokens(20)
    empty = {name: cache.copy() for name, cache in session.caches().items()}
    assert all(cache.dtype == np.int8 for cache in empty.values())
    for _ in range(2):  # and once more after a reset
        replay.reset()
        np.testing.assert_array_equal(session.prefill(tokens[:15]), replay.prompt(tokens[:15]))
        for token in tokens[15:]:
            logits = session.step(int(token))
            np.testing.assert_array_equal(logits, replay.call("decode", np.array([token])))
        assert logits.dtype == np.float32 and len(logits) == VOCABULARY
        session.reset()
        for name, cache in session.caches().items():
            np.testing.assert_array_equal(cache, empty[name])


def test_other_scales_are_refused(converted):
    """A cache whose scale is not that of what goes into it: by the export, and by the session on the device."""
    graph = read_model(converted / f"{NAME}.tflite")
    tensor = graph.subgraphs[subgraph_of(graph, "decode")].tensors[signature_tensor(graph, "decode", "new_k_0")]
    tensor.quantization.scale = tensor.quantization.scale * np.float32(1.5)
    with pytest.raises(GateError, match="new_k_0 of decode"):
        check_types_and_scales(graph, NAME)
    interpreter = litert.Interpreter(str(converted / f"{NAME}.tflite"), num_threads=1)
    interpreter.allocate_tensors()
    artifact = read_artifact(converted / f"{NAME}.json")
    with pytest.raises(ArtifactFailure, match="cache k_0"):
        TfliteSession(artifact, InterpreterCalls(Altered(interpreter, "new_k_0"), signatures_of(artifact)))


class Altered:
    """An interpreter whose signatures say another scale for one output: the runtimes' own kernels would not open such a file."""

    def __init__(self, interpreter, output: str):
        self.interpreter, self.output = interpreter, output

    def get_signature_runner(self, name: str):
        self.runner = self.interpreter.get_signature_runner(name)
        details = self.runner.get_output_details()
        scale, zero_point = details[self.output]["quantization"]
        details[self.output]["quantization"] = (1.5 * scale, zero_point)
        self.runner.get_output_details = lambda: details
        return self.runner


@pytest.mark.parametrize(
    ("name", "dtype", "scales", "message"),
    [
        ("ADD", "float32", 0, "float32 tensor"),
        ("DEQUANTIZE", "int8", 1, "into floats"),
        ("STABLEHLO_COMPOSITE", "int8", 1, "no builtin"),
        ("CUSTOM", "int8", 1, "no builtin"),
        ("FULLY_CONNECTED", "int8", 8, "8 scales"),
        ("SOFTMAX", "int16", 1, "int16"),
    ],
)
def test_what_is_not_strict_is_named(name, dtype, scales, message):
    tensor = Tensor(0, "layers.0.mlp", (1, 4), dtype, 0, False, scales)
    with pytest.raises(GateError, match=f"{name} layers.0.mlp in decode.*{message}"):
        check_strict([Operator("decode", name, 1, (tensor,), (tensor,))], NAME)


@pytest.mark.parametrize("least_top", [-9.0, 0.0, 3.0, 40.0])
def test_all_hidden_slots_together_are_less_than_half_a_step(least_top):
    context = 512
    low, high = score_range(RowRange(least_top, 60.0), context, hidden_by=960.0)
    assert high == 60.0 and low <= 0
    assert context * np.exp(low - least_top) <= 0.5 / 256 * (1 + 1e-6)


def test_scores_that_the_mask_cannot_hide_are_refused():
    with pytest.raises(GateError, match="does not hide"):
        score_range(RowRange(0.0, 2000.0), 64, hidden_by=960.0)


def test_windows_without_a_whole_chunk_are_refused(checkpoints, text_folder, tmp_path):
    with pytest.raises(UserError, match="prefill_tokens"):
        tflite_full_int8.run(SETTINGS.model_copy(update={"prefill_tokens": 40}), tmp_path, model=checkpoints["llama"], text=text_folder)
