"""Static int8 TFLite on tiny random models: what is int8, what it computes, and the failures that must be named."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from ai_edge_litert import interpreter as litert
from ai_edge_quantizer import qtyping, quantizer
from hypothesis import given
from hypothesis import strategies as st

from conftest import VOCABULARY, tiny_model, tiny_tokenizer, write_checkpoint
from exporters import tflite_export, tflite_int8
from exporters.settings import TfliteInt8Settings, TfliteSettings
from exporters.tflite_calibration import RowSample, calibrate
from exporters.tflite_coverage import Expected, check_coverage
from exporters.tflite_edit import is_linear, weight_of, weight_users
from exporters.tflite_equalise import balanced_rows, clip_bounds, equalise
from exporters.tflite_logit_range import choose_logit_range, fake_quantised
from exporters.tflite_mixed import Judge, layer_of, static_layers
from exporters.tflite_parity import Feeds, agreement
from exporters.tflite_replay import Replay, replay_all
from exporters.tflite_structure import operators, read_model, write_model
from models.errors import GateError, UserError

SETTINGS = TfliteInt8Settings(windows=4, decode_steps=6)


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tflite_int8_text")
    np.save(folder / "calibration.npy", np.random.default_rng(0).integers(0, VOCABULARY, (8, 40)).astype(np.int32))
    np.save(folder / "validation.npy", np.random.default_rng(1).integers(0, VOCABULARY, (4, 40)).astype(np.int32))
    return folder


@pytest.fixture(scope="session", params=[("llama", True), ("gpt2", True), ("llama", False)], ids=["llama", "gpt2", "untied"])
def float_folder(request, tmp_path_factory, text_folder) -> Path:
    torch.set_num_threads(1)
    family, tied = request.param
    folder = tmp_path_factory.mktemp("tflite_float")
    write_checkpoint(folder / "model", family, tied=tied)
    tflite_export.run(TfliteSettings(prefill_tokens=[4, 12], context_tokens=48), folder, model=folder / "model", text=text_folder)
    return folder


@pytest.fixture(scope="session")
def int8_folder(float_folder, text_folder, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tflite_int8")
    tflite_int8.run(SETTINGS, folder, tflite=float_folder, text=text_folder)
    return folder


def qwen3() -> torch.nn.Module:
    return tiny_model("qwen3")


def constant_norm() -> torch.nn.Module:
    """A norm whose scale vanishes beside its offset gives one number everywhere; a scale of 0 the converter would fold away."""
    model = tiny_model("gpt2")
    with torch.no_grad():
        model.transformer.h[1].ln_2.weight.fill_(1e-20)
        model.transformer.h[1].ln_2.bias.fill_(-2.5)
    return model


LINEAR_LAYERS = {qwen3: 15, constant_norm: 9}  # of two decoder layers and the head


def run_litert(path: Path, feeds: Feeds) -> np.ndarray:
    return replay_all(Replay(litert.Interpreter(str(path), num_threads=1)), feeds.tokens, feeds.prompt_tokens)


def random_feeds() -> Feeds:
    return Feeds(np.random.default_rng(7).integers(0, VOCABULARY, (3, 34)).astype(np.int32), np.array([20, 12, 5], np.int32))


def test_sidecar_tells_what_is_int8(int8_folder):
    measured = json.loads((int8_folder / "tflite_static_int8.json").read_text())["measured"]
    coverage = measured["coverage"]
    assert coverage["linear_layers"] == coverage["int8_linear_layers"] > 0 and coverage["embedding_int8"]
    assert len(coverage["dynamic_linear_layers"]) == 3 and measured["calibration"]["logit_range"] is None  # the head, two FFNs
    linear = {signature: counts["FULLY_CONNECTED"] for signature, counts in measured["operators"].items()}
    assert linear["decode"] == linear["prefill_4"] == linear["prefill_12"]
    for runtime in ("litert", "tflite"):
        found = measured["agreement_with_parent"][runtime]
        assert found["top1"] > 0.6 and 0 < found["kl"] < 0.05  # random weights: flat logits, so the first place is often close
    assert 0 < measured["bytes_of_parent"] < 1


def test_same_bytes_twice(int8_folder, float_folder, text_folder, tmp_path):
    tflite_int8.run(SETTINGS, tmp_path, tflite=float_folder, text=text_folder)
    for name in ("tflite_static_int8.tflite", "tflite_static_int8.json"):
        assert (tmp_path / name).read_bytes() == (int8_folder / name).read_bytes()


def test_equalising_keeps_the_function(float_folder, text_folder, tmp_path):
    path = float_folder / "tflite_fp32.tflite"
    graph = read_model(path)
    seen = calibrate(path, operators(graph), np.load(text_folder / "calibration.npy")[:2], decode_steps=4)
    for name, observed in seen.ranges.items():  # outliers, so that inputs are smoothed and split
        observed.high[0] = 50 * observed.high.max()
        if name in seen.inputs:
            seen.inputs[name][0, 0] = observed.high[0]
    equalised = equalise(graph, seen, alpha=0.5)
    assert equalised.smoothed_layers >= 4 and equalised.split_layers >= 4  # o and down of both layers
    write_model(graph, tmp_path / "equalised.tflite")
    feeds = random_feeds()
    before, after = run_litert(path, feeds), run_litert(tmp_path / "equalised.tflite", feeds)
    assert np.abs(before - after).max() < 1e-4 * np.abs(before).max()
    for weights in weight_users(graph).values():
        rows = np.abs(weight_of(graph, weights[0])).max(1)
        if not all(is_linear(graph, user) for user in weights):  # a table that is looked up uses the whole range in every row
            np.testing.assert_allclose(rows, 1, rtol=1e-5)
        assert 0 < rows.max() <= 1 + 1e-5


def test_rows_are_balanced_only_where_it_pays():
    """The error is measured by rounding weights and outputs, not by the formula that the scales come from."""
    rng = np.random.default_rng(0)
    weight, inputs = rng.normal(size=(24, 64)).astype(np.float32), rng.normal(size=(400, 64)).astype(np.float32)
    weight[5] = 3.0  # sums up what all inputs share, and so reaches far
    inputs += 1.5

    def error(rows: np.ndarray) -> float:
        scaled = weight / rows[:, None]
        step = np.abs(scaled).max() / 127
        products = inputs @ (np.round(scaled / step) * step).T
        reach = np.abs(products).max()
        return float(np.square(fake_quantised(products, -reach, reach) * rows - inputs @ weight.T).sum())

    largest = np.abs(weight).max(1)
    outputs, power = np.abs(inputs @ weight.T).max(0), float(np.square(inputs).sum(1).mean())
    balanced = balanced_rows(weight, outputs, power)
    assert error(balanced) < 0.8 * error(largest)
    np.testing.assert_allclose(balanced_rows(weight, largest, power), largest)  # outputs that reach alike
    np.testing.assert_array_equal(balanced_rows(np.zeros((3, 4)), np.zeros(3), 0.0), 1)


def test_outliers_are_split_off_only_where_it_pays():
    even = np.random.default_rng(0).uniform(-1, 1, (64, 32)).astype(np.float32)
    assert clip_bounds(even) is None
    spiky = even.copy()
    spiky[::16, 3] = 60.0
    low, high = clip_bounds(spiky)
    assert -4 < low < 0 < high <= 30
    assert clip_bounds(np.zeros((4, 4), np.float32)) is None


def test_unrelated_logits_are_a_gate_error(float_folder, text_folder, tmp_path):
    """Weights in reversed order compute something finite that has nothing to do with the parent."""
    windows = np.load(text_folder / "calibration.npy")
    interface = json.loads((float_folder / "tflite_fp32.json").read_text())["interface"]
    graph = read_model(float_folder / "tflite_fp32.tflite")
    for operator in operators(graph):
        if operator.name == "FULLY_CONNECTED" and operator.signature == "decode":
            weight = graph.buffers[operator.inputs[1].buffer].data.view(np.float32)
            graph.buffers[operator.inputs[1].buffer].data = weight[::-1].copy().view(np.uint8)
    write_model(graph, tmp_path / "broken.tflite")
    with pytest.raises(GateError, match="agrees with the float file"):
        tflite_int8.check_agreement(tmp_path / "broken.tflite", float_folder / "tflite_fp32.tflite", windows, interface)


def test_int8_is_near_the_float_file(int8_folder, float_folder):
    feeds = random_feeds()
    logits = run_litert(int8_folder / "tflite_static_int8.tflite", feeds)
    found = agreement(logits, run_litert(float_folder / "tflite_fp32.tflite", feeds))
    assert found.top1 > 0.6 and 0 < found.kl < 0.05


@pytest.mark.parametrize("make", [qwen3, constant_norm], ids=lambda make: make.__name__)
def test_norms_inside_heads_and_an_activation_of_equal_values(make, text_folder, tmp_path):
    """The float file is the reference, and every linear layer of both files is counted operator by operator."""
    make().save_pretrained(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    tflite_export.run(TfliteSettings(prefill_tokens=[4, 12], context_tokens=48), tmp_path, model=tmp_path / "model", text=text_folder)
    tflite_int8.run(SETTINGS, tmp_path, tflite=tmp_path, text=text_folder)
    measured = json.loads((tmp_path / "tflite_static_int8.json").read_text())["measured"]
    graph = operators(read_model(tmp_path / "tflite_fp32.tflite"))
    linear = [op for op in graph if op.name == "FULLY_CONNECTED" and op.signature == "decode"]
    assert len(linear) == LINEAR_LAYERS[make] and measured["coverage"]["embedding_int8"]
    assert measured["coverage"]["int8_linear_layers"] == measured["coverage"]["linear_layers"] >= len(linear)
    assert set(measured["agreement_with_parent"]) == {"litert", "tflite"}
    feeds = random_feeds()
    logits = run_litert(tmp_path / "tflite_static_int8.tflite", feeds)
    found = agreement(logits, run_litert(tmp_path / "tflite_fp32.tflite", feeds))
    assert found.top1 > 0.6 and 0 < found.kl < 0.05, found


def test_a_static_head_and_a_dynamic_layer(float_folder, text_folder, tmp_path):
    path, windows = tmp_path / "mixed.tflite", np.load(text_folder / "calibration.npy")
    parent = float_folder / "tflite_fp32.tflite"
    layer = next(op.outputs[0].name for op in operators(read_model(parent)) if op.name == "FULLY_CONNECTED").split("/")[-1]
    settings = TfliteInt8Settings(windows=2, decode_steps=6)
    prepared = tflite_int8.prepare(settings, parent, windows, tmp_path / "equalised.tflite")
    chosen = tflite_int8.write(prepared, (layer,), path)
    assert chosen.logit_range.high > chosen.logit_range.low
    found = operators(read_model(path))
    expected = Expected(operators(read_model(parent)), prepared.split_layers, (layer,))
    named = check_coverage(found, expected, "file").dynamic_linear_layers
    assert 1 <= len(named) <= 3 and "logits" not in " ".join(named)
    with pytest.raises(GateError, match="is not int8: input is float32"):
        check_coverage(found, replace(expected, dynamic=()), "file")
    with pytest.raises(UserError, match="no linear layer has 'down_prj'"):
        tflite_int8.dynamic_patterns(("down_prj",), found)


@pytest.mark.parametrize("float_folder", [("llama", True)], indirect=True)
def test_layers_become_dynamic_until_the_target_holds(float_folder, text_folder, tmp_path):
    settings = TfliteInt8Settings(windows=2, decode_steps=6, dynamic=(), least_top1=1.0)
    tflite_int8.run(settings, tmp_path, tflite=float_folder, text=text_folder)
    measured = json.loads((tmp_path / "tflite_static_int8.json").read_text())["measured"]
    mixed = measured["mixed_precision"]
    layers = [cost["name"] for cost in mixed["layers"]]
    assert [cost["kl"] for cost in mixed["layers"]] == sorted((cost["kl"] for cost in mixed["layers"]), reverse=True)
    assert [trial["dynamic"] for trial in mixed["trials"][:3]] == [[], layers[:1], layers[:2]]
    assert all(trial["missed"] for trial in mixed["trials"][:-1])
    assert mixed["trials"][-1]["kl"] < mixed["trials"][0]["kl"]
    dynamic = measured["coverage"]["dynamic_linear_layers"]
    assert {name.split("/")[2] for name in dynamic} >= set(mixed["trials"][-1]["dynamic"]) - {"logits_output"}
    assert "logits_output" in layers


@pytest.mark.parametrize("float_folder", [("llama", True)], indirect=True)
def test_a_layers_cost_is_that_of_it_alone(float_folder, text_folder, tmp_path):
    settings, parent = TfliteInt8Settings(windows=2, decode_steps=6), float_folder / "tflite_fp32.tflite"
    prepared = tflite_int8.prepare(settings, parent, np.load(text_folder / "calibration.npy"), tmp_path / "equalised.tflite")
    layer = static_layers(prepared.found, ())[0]
    found = operators(read_model(tflite_int8.write_alone(prepared, layer, tmp_path / "alone.tflite")))
    linear = [operator for operator in found if operator.name == "FULLY_CONNECTED"]
    quantised = [operator for operator in linear if operator.inputs[1].dtype == "int8"]
    assert {layer_of(operator) for operator in quantised} == {layer} and len(quantised) < len(linear)
    judge = Judge.of(parent, np.load(text_folder / "validation.npy"), 48)
    alone, everything = tmp_path / "alone.tflite", tmp_path / "all.tflite"
    tflite_int8.write(prepared, (), everything)
    assert 0 < judge.alone(alone).kl < judge.alone(everything).kl


@pytest.mark.parametrize(
    ("pattern", "granularity", "message"),
    [
        ("proj|c_attn|c_fc", qtyping.QuantGranularity.TENSORWISE, "(logits|lm_head).*not int8"),
        (".", qtyping.QuantGranularity.CHANNELWISE, "scales"),
    ],
)
def test_wrong_recipes_are_named(float_folder, text_folder, tmp_path, pattern, granularity, message):
    """A head left float, and weights with a scale per channel, which tflite-runtime 2.14 computes wrongly in silence."""
    path = float_folder / "tflite_fp32.tflite"
    found = operators(read_model(path))
    ranges = calibrate(path, found, np.load(text_folder / "calibration.npy")[:1], decode_steps=4).ranges
    process = quantizer.Quantizer(str(path))
    process.add_static_config(f".*({pattern}).*", qtyping.TFLOperationName.FULLY_CONNECTED, 8, 8, granularity)
    process.add_dynamic_config(".*", qtyping.TFLOperationName.EMBEDDING_LOOKUP, 8, qtyping.QuantGranularity.TENSORWISE)
    seen = {name: {"min": np.array([[r.low.min()]]), "max": np.array([[r.high.max()]])} for name, r in ranges.items()}
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(process.quantize(seen, enable_progress_report=False).quantized_model)
    with pytest.raises(GateError, match=message):
        check_coverage(operators(read_model(broken)), Expected(found), "tflite_static_int8")


def test_the_file_is_that_of_the_quantizer_s_own_class(float_folder, text_folder, tmp_path, monkeypatch):
    """What ours leaves out of it is a check, which the library still has under that name, and no byte depends on it."""
    assert "_ensure_model_qsv_sufficient" in vars(quantizer.Quantizer)
    parent, windows = float_folder / "tflite_fp32.tflite", np.load(text_folder / "calibration.npy")
    prepared = tflite_int8.prepare(TfliteInt8Settings(), parent, windows, tmp_path / "equalised.tflite")
    paths = [tmp_path / name for name in ("ours.tflite", "theirs.tflite")]
    tflite_int8.write(prepared, (), paths[0])
    monkeypatch.setattr(tflite_int8, "Quantizer", quantizer.Quantizer)
    tflite_int8.write(prepared, (), paths[1])
    assert paths[0].read_bytes() == paths[1].read_bytes()


def test_calibration_streams_windows(float_folder, text_folder):
    """Windows are taken one at a time, ranges only widen, and the sample of logits stays bounded."""
    path = float_folder / "tflite_fp32.tflite"
    found = operators(read_model(path))
    windows = np.load(text_folder / "calibration.npy")
    taken = []

    def stream(count: int):
        for index in range(count):
            taken.append(index)
            yield windows[index % len(windows)]

    few, many = (calibrate(path, found, stream(count), decode_steps=6) for count in (1, 6))
    assert taken == [0, 0, 1, 2, 3, 4, 5]
    assert few.ranges.keys() == many.ranges.keys()
    for name, seen in few.ranges.items():
        assert (many.ranges[name].low <= seen.low).all() and (many.ranges[name].high >= seen.high).all()
        assert seen.low.ndim == 1  # one number per channel, nothing per window


@given(offered=st.integers(1, 400), limit=st.integers(1, 40))
def test_samples_are_bounded_and_even(offered, limit):
    sample = RowSample(limit * 8)
    for call in range(offered):
        sample.offer(np.full(8, call, np.float32))
    kept = [int(row[0]) for row in sample.rows]
    assert kept[0] == 0 and len(kept) <= max(2, limit)
    assert len(set(np.diff(kept))) <= 1  # evenly spread over the calls
    assert offered - kept[-1] <= sample.stride


def test_padding_does_not_widen_ranges(float_folder, text_folder):
    """A prompt of 13 tokens fills one chunk and one row of the next; its ranges are those of the same tokens as steps."""
    path = float_folder / "tflite_fp32.tflite"
    found = operators(read_model(path))
    window = np.load(text_folder / "calibration.npy")[:1, :20]
    padded, stepped = (calibrate(path, found, window, decode_steps=steps).ranges for steps in (7, 19))
    inner = [name for name in padded if "logits" not in name and "lm_head" not in name]
    head = {op.inputs[0].name for op in found if "logits" in op.outputs[0].name}
    for name in set(inner) - head:
        np.testing.assert_allclose(padded[name].high, stepped[name].high, atol=1e-4)
        np.testing.assert_allclose(padded[name].low, stepped[name].low, atol=1e-4)


def test_logit_range_is_never_worse_than_the_whole_range():
    rng = np.random.default_rng(0)
    logits = rng.normal(-4, 3, (16, 200)).astype(np.float32)
    logits[np.arange(16), rng.integers(0, 200, 16)] = 9.0
    chosen = choose_logit_range(logits, np.ones(1, np.float32))
    assert chosen.kl <= chosen.kl_whole_range and chosen.low > logits.min()
    assert choose_logit_range(np.zeros((2, 5), np.float32), np.ones(1)).high > 0


def test_fake_quantisation_rounds_to_the_nearest_step():
    values = np.linspace(-1, 3, 101)
    assert np.abs(fake_quantised(values, -1.0, 3.0) - values).max() <= 4 / 255
    assert fake_quantised(np.array([10.0]), -1.0, 3.0)[0] == pytest.approx(3.0, abs=4 / 255)
