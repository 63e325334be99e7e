"""The int8 KV cache: what its scales cover at any position, what the operator stores, and what hosts make of it."""

import json

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from conftest import VOCABULARY
from device_tests import prompt_cache
from device_tests.artifact import read_artifact
from device_tests.devices.adb_onnx import inputs, tensor_proto
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.onnx_hybrid import check_pair
from device_tests.sessions import open_session as open_host
from device_tests.speculative import Speculator
from exporters import onnx_hybrid_int4, onnx_hybrid_int8, onnx_int8
from exporters.onnx_calibration import Feeds
from exporters.onnx_export import export, save
from exporters.onnx_kv_cache import Turn, attentions, cache_scales, turn_of, with_int8_cache
from exporters.onnx_session import empty_past, open_session_of, run_tokens
from exporters.settings import OnnxHybridInt4Settings, OnnxHybridInt8Settings, OnnxInt8Settings
from exporters.tests.conftest import CASES, WINDOW
from exporters.tests.families import CONTEXT, FAMILIES, tiny_decoder
from exporters.tests.families import VOCABULARY as FAMILY_VOCABULARY
from models.checkpoint import shape_of
from models.errors import UserError

STEPS = 6
VARIANTS = {
    "static": (onnx_int8, OnnxInt8Settings, {"mixed_precision": False}),
    "hybrid int8": (onnx_hybrid_int8, OnnxHybridInt8Settings, {"block": 32}),
    "hybrid int4": (onnx_hybrid_int4, OnnxHybridInt4Settings, {"block": 16}),
}


@pytest.fixture(scope="module")
def words(tmp_path_factory):
    """As the shared one, with calibration windows that hold every token: values that no token reached are cut off."""
    folder, draws = tmp_path_factory.mktemp("text"), np.random.default_rng(0)
    for name, windows in (("calibration", 40), ("validation", 2)):
        np.save(folder / f"{name}.npy", draws.integers(0, VOCABULARY, (windows, WINDOW), dtype=np.int32))
    return folder


@pytest.fixture(scope="module")
def artifact(exports, words, tmp_path_factory):
    """The sidecar by case, variant and the cache's type, made when first asked for."""
    made = {}

    def get(case=("llama", True), variant="hybrid int8", kv_cache="int8"):
        if (case, variant, kv_cache) not in made:
            module, kind, given = VARIANTS[variant]
            folder = tmp_path_factory.mktemp("kv")
            module.run(kind(decode_steps=STEPS, kv_cache=kv_cache, **given), folder, onnx=exports[case], text=words)
            made[case, variant, kv_cache] = folder / f"{module.NAME}.json"
        return made[case, variant, kv_cache]

    return get


def turned(values, angles, interleaved):
    """Pairs of ``values`` ``[n, rotated]`` turned by ``angles`` ``[rotated / 2]``."""
    first, second = (values[:, ::2], values[:, 1::2]) if interleaved else np.split(values, 2, axis=1)
    one, two = first * np.cos(angles) - second * np.sin(angles), second * np.cos(angles) + first * np.sin(angles)
    return np.stack([one, two], -1).reshape(len(values), -1) if interleaved else np.concatenate([one, two], axis=1)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 4), st.integers(0, 4), st.booleans(), st.integers(0, 2**31))
def test_ranges_hold_however_far_pairs_turn_and_are_reached(pairs, rest, interleaved, seed):
    draws = np.random.default_rng(seed)
    values = draws.normal(size=(5, 2 * pairs + rest)).astype(np.float32)
    ranges = Turn(2 * pairs, interleaved).ranges(values)
    np.testing.assert_array_equal(ranges[:, 2 * pairs :], np.abs(values[:, 2 * pairs :]))
    most = np.zeros_like(ranges[:, : 2 * pairs])
    for angle in np.linspace(0, np.pi, 181):
        at = np.abs(turned(values[:, : 2 * pairs], np.full(pairs, angle), interleaved))
        assert (at <= ranges[:, : 2 * pairs] * (1 + 1e-5)).all()
        most = np.maximum(most, at)
    assert (most >= ranges[:, : 2 * pairs] * 0.99).all()


FAMILY_CASES = [
    "llama", "llama, head of 12", "qwen3", "phi", "phi, rotated part of 8", "cohere, q and k normalised", "glm", "smollm3", "exaone4",
    "gemma2", "gpt2",
]  # fmt: skip


@pytest.mark.parametrize("name", FAMILY_CASES)
def test_no_position_goes_beyond_the_scales(name, tmp_path):
    """The calibration's tokens again and again up to the context's end: layer 0 has the same keys, turned ever further."""
    family = FAMILIES[name]
    model = tiny_decoder(family.model_type or name, family.config)
    fp32 = onnx.load(save(export(model, shape_of(model)).graph, tmp_path / "model.onnx")[0])
    window = np.random.default_rng(0).integers(3, FAMILY_VOCABULARY, (1, 8))
    scales = cache_scales(fp32, Feeds(window, 2), "x")
    long = np.resize(window, (1, CONTEXT))
    session, int8 = open_session_of(fp32), open_session_of(with_int8_cache(fp32, scales))
    expected, floats = run_tokens(session, long, empty_past(session, 1))
    got, codes = run_tokens(int8, long, empty_past(int8, 1))
    assert {array.dtype for array in codes.values()} == {np.dtype(np.int8)}
    if family.place != "none" and name != "smollm3":  # its layer 0 does not turn
        short = run_tokens(session, window, empty_past(session, 1))[1]["past_key_values.0.key"]
        assert (np.abs(floats["past_key_values.0.key"]).max(2) > np.abs(short).max(2) * 1.15).any()  # or this test says nothing
    for kind in ("key", "value") if family.place != "none" else ():  # positions are in all of GPT-2's numbers
        name = f"past_key_values.0.{kind}"
        apart = np.abs(codes[name] * scales[name] - floats[name])
        assert (apart <= scales[name] * 0.51).all()
    assert np.square(got - expected).mean() < 5e-3 * np.square(expected).mean()


def test_keys_that_turn_in_a_way_that_the_graph_does_not_say_are_refused(tmp_path):
    """HunYuan normalises after rotating: each channel of a pair has a weight of its own then."""
    model = tiny_decoder("hunyuan_v1_dense", FAMILIES["hunyuan_v1_dense"].config)
    fp32 = onnx.load(save(export(model, shape_of(model)).graph, tmp_path / "model.onnx")[0])
    with pytest.raises(UserError, match="x: the graph does not say how the keys of GroupQueryAttention_0 are rotated; leave kv_cache"):
        cache_scales(fp32, Feeds(np.ones((1, 8), np.int64), 2), "x")
    plain = onnx.GraphProto()
    plain.node.append(helper.make_node("Add", ["turned", "more"], ["k"]))
    attention = helper.make_node("GroupQueryAttention", ["q", "k", "v"], ["y"], "attention")
    with pytest.raises(UserError, match="how the keys of attention are rotated"):
        turn_of(plain, attention, "x")
    plain.initializer.add(name="more")
    assert turn_of(plain, attention, "x") == Turn(0, False)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8_caches_answer_like_float_ones(artifact, words, case, variant):
    """By the host's own library, prompt and steps; and the sidecar says what a token takes."""
    sessions = [open_host(artifact(case, variant, kind), "onnxruntime") for kind in ("float32", "int8")]
    for window in np.load(words / "validation.npy"):
        rows = []
        for session in sessions:
            session.reset()
            rows.append(np.stack([session.prefill(window[:30]), *(session.step(int(token)).copy() for token in window[30:])]))
        assert 0 < np.square(rows[1] - rows[0]).mean() < 5e-3 * np.square(rows[0]).mean()
    assert {cache.dtype for cache in sessions[1].caches().values()} == {np.dtype(np.int8)}
    records = [json.loads(artifact(case, variant, kind).read_text()) for kind in ("float32", "int8")]
    assert records[0]["measured"]["kv_cache_bytes_per_token"] == 4 * records[1]["measured"]["kv_cache_bytes_per_token"]
    held = sum(cache.nbytes for cache in sessions[1].caches().values()) / sessions[1].interface.context_tokens
    assert records[1]["measured"]["kv_cache_bytes_per_token"] == held
    types = {tensor["name"]: tensor["dtype"] for side in records[1]["tensors"].values() for tensor in side}
    assert {types[name] for name in types if "key" in name or "value" in name} == {"int8"}
    assert types["logits"] == "float32" and types["input_ids"] == "int64"


def test_the_operator_stores_rounded_keys_and_values(artifact, words):
    """Layer 0 has the same keys and values with either cache: its codes must be those numbers over their scales, rounded."""
    sessions = [open_host(artifact(variant="static", kv_cache=kind), "onnxruntime") for kind in ("float32", "int8")]
    window = np.load(words / "validation.npy")[0]
    for session in sessions:
        session.prefill(window[:25])
        for token in window[25:]:
            session.step(int(token))
    graph = onnx.load(artifact(variant="static").with_suffix(".onnx")).graph
    scales = {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in graph.initializer if tensor.name.endswith(".scale")}
    for name in ("0.key", "0.value"):
        floats, codes = (session.caches()[name][:, :, : len(window)] for session in sessions)
        exact = floats / scales[f"past_key_values.{name}.scale"]
        assert np.abs(np.clip(exact, -128, 127) - codes).max() < 0.51
        assert np.abs(exact).max() < 160 and np.abs(codes).max() > 60  # neither cut off by much, nor a waste of steps


@pytest.mark.parametrize("variant", VARIANTS)
def test_fast_paths_with_an_int8_cache_are_the_slow_one(artifact, words, variant, tmp_path):
    """Chunks, single steps, a cached beginning and a draft: the same answers as one prompt."""
    sidecar = artifact(variant=variant)
    window = np.load(words / "validation.npy")[0]
    whole, other = open_host(sidecar, "onnxruntime"), open_host(sidecar, "onnxruntime")
    expected = whole.prefill(window[:30])
    other.prefill(window[:20])
    continued = other.prefill(window[20:30])
    np.testing.assert_allclose(continued, expected, atol=1e-4 * np.ptp(expected))
    prompt_cache.save(tmp_path / "cache", whole, read_artifact(sidecar), window[:30])
    cached = open_host(sidecar, "onnxruntime")
    assert prompt_cache.load(tmp_path / "cache", cached, read_artifact(sidecar), window[:30]) == 29
    np.testing.assert_allclose(cached.prefill(window[29:30]), expected, atol=1e-4 * np.ptp(expected))
    greedy = [int(expected.argmax())]
    while len(greedy) < 12:
        greedy.append(int(whole.step(greedy[-1]).argmax()))
    speculator = Speculator(open_host(sidecar, "onnxruntime"), open_host(sidecar, "onnxruntime"), 3)
    drafted = [speculator.first(window[:30])]
    while len(drafted) < 12:
        drafted.append(speculator.next(drafted[-1]))
    assert drafted == greedy


def test_a_cache_of_another_type_is_not_put_into_a_session(artifact, words, tmp_path):
    """Even where a file says that it is this artifact's."""
    floats, sidecar = open_host(artifact(kv_cache="float32"), "onnxruntime"), artifact()
    window = np.load(words / "validation.npy")[0]
    floats.prefill(window[:20])
    prompt_cache.save(tmp_path / "cache", floats, read_artifact(sidecar), window[:20])
    with pytest.raises(DeviceTestError, match="0.key is float32 .*this model's is int8"):
        prompt_cache.load(tmp_path / "cache", open_host(sidecar, "onnxruntime"), read_artifact(sidecar), window[:20])


def test_graphs_of_two_caches_are_no_pair(artifact):
    prompt = open_host(artifact(), "onnxruntime")._prompt_session
    decode = open_host(artifact(kv_cache="float32"), "onnxruntime")._session
    with pytest.raises(ArtifactFailure, match="p: its KV cache is int8, the decode graph's is float32"):
        check_pair(decode, prompt, "p")
    with pytest.raises(ArtifactFailure, match="p: beside the cache it gives logits .*, not the logits of the last token alone"):
        check_pair(decode, decode, "p")


def test_a_phone_is_given_a_cache_of_the_artifact_s_type(artifact):
    feeds = inputs(read_artifact(artifact()), np.arange(3), 5)
    assert feeds["past_key_values.0.key"].dtype == np.int8
    read = onnx.TensorProto.FromString(tensor_proto("past_key_values.0.key", feeds["past_key_values.0.key"]))
    assert read.data_type == onnx.TensorProto.INT8 and onnx.numpy_helper.to_array(read).shape == (1, 2, 5, 16)
    assert inputs(read_artifact(artifact(kv_cache="float32")), np.arange(3), 5)["past_key_values.1.value"].dtype == np.float32


def test_a_float_cache_leaves_the_graph_as_it_was(exports):
    model = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    assert with_int8_cache(model, {}) is model
    scales = cache_scales(model, Feeds(np.ones((1, WINDOW), np.int64), STEPS), "x")
    before = model.SerializeToString(deterministic=True)
    changed = with_int8_cache(model, scales)
    assert model.SerializeToString(deterministic=True) == before
    attributes = [{part.name: helper.get_attribute_value(part) for part in node.attribute} for node in attentions(changed.graph)]
    assert [(part["k_quant_type"], part["v_quant_type"], part["kv_cache_bit_width"]) for part in attributes] == [
        (b"PER_CHANNEL", b"PER_CHANNEL", 8)
    ] * 2
