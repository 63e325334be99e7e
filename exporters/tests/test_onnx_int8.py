"""Static int8 of the ONNX export: what ONNX Runtime makes of it, how it is calibrated, and what the sidecar says."""

import json
import weakref

import numpy as np
import onnx
import pytest

from conftest import VOCABULARY
from exporters import onnx_int8, onnx_rounding
from exporters.artifact import sha256_of
from exporters.onnx_agreement import compare, require_live
from exporters.onnx_calibration import (
    BINS,
    Feeds,
    Histogram,
    activation_ranges,
    entropy_ends,
    observe,
    observing_session,
    percentile_ends,
)
from exporters.onnx_files import save_with_data
from exporters.onnx_qdq import Scheme, linear_layers, quantise
from exporters.onnx_rounding import compensated_rounding, gram_matrices, groups_of
from exporters.onnx_session import empty_past, feed, open_session, run_tokens
from exporters.onnx_structure import require_int8, structure_of
from exporters.settings import OnnxInt8Settings
from exporters.tests.conftest import CASES as SHARED_CASES
from exporters.tests.conftest import WINDOW
from exporters.weight_blocks import Layout, quantise_compensated, searched_grid
from models.errors import GateError, UserError

STEPS = 6
SETTINGS = OnnxInt8Settings(windows=4, decode_steps=STEPS)
CASES = [*SHARED_CASES, ("qwen2", True)]
LINEAR_PER_LAYER = {"llama": 5, "qwen2": 5, "qwen3": 5, "gpt2": 4}  # packed q, k and v are one; the head comes on top


@pytest.fixture(scope="module")
def quantised(exports, text, tmp_path_factory):
    made = {}
    for case in CASES:
        made[case] = tmp_path_factory.mktemp("int8")
        onnx_int8.run(SETTINGS, made[case], onnx=exports[case], text=text)
    return made


def ranges_of(model: onnx.ModelProto, text, **changes):
    feeds = Feeds(np.load(text / "calibration.npy")[:2], STEPS)
    options = {"calibrator": "minmax"} | changes
    return activation_ranges(model, list(dict.fromkeys(linear_layers(model).values())), feeds, **options)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_everything_is_int8_and_the_sidecar_says_what_was_found(case, quantised, exports):
    out, family = quantised[case], case[0]
    sidecar = json.loads((out / "onnx_static_int8.json").read_text())
    measured = sidecar["measured"]
    assert measured["linear_layers"] == measured["int8_linear_layers"] == 2 * LINEAR_PER_LAYER[family] + 1
    assert measured["embedding_int8"] and measured["dequantised_weights"] == 0
    assert [entry["name"] for entry in measured["not_int8"]] == (["transformer.wpe.weight"] if family == "gpt2" else [])
    assert sidecar["sha256"] == sha256_of(out / sidecar["file"])
    assert sidecar["parent"] == sha256_of(exports[case] / "onnx_fp32.onnx")
    structure = structure_of(out / sidecar["file"])
    assert len(structure.int8_linear) == measured["int8_linear_layers"] + len(measured["two_step_layers"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_int8_answers_like_fp32_in_prompt_and_decode(case, quantised, exports):
    tokens = np.random.default_rng(7).integers(0, VOCABULARY, (1, WINDOW))
    answers = []
    for path in (exports[case] / "onnx_fp32.onnx", quantised[case] / "onnx_static_int8.onnx"):
        session = open_session(path)
        prompt, past = run_tokens(session, tokens[:, :30], empty_past(session, 1))
        steps = []
        for position in range(30, WINDOW):
            logits, past = run_tokens(session, tokens[:, position : position + 1], past)
            steps.append(logits)
        answers.append(np.concatenate([prompt, *steps], axis=1)[0])
    expected, got = answers
    for part in (slice(0, 30), slice(30, WINDOW)):
        noise = np.square(got[part] - expected[part]).mean() / np.square(expected[part]).mean()
        assert noise < 0.01


def test_weights_in_the_file_are_int8_and_a_tied_table_is_there_once(quantised, exports):
    tensors = {tensor.name: tensor for tensor in onnx.load(quantised["llama", True] / "onnx_static_int8.onnx").graph.initializer}
    matrices = [t for t in tensors.values() if len(t.dims) == 2 and not t.name.endswith("_cache")]
    assert {t.data_type for t in matrices} == {onnx.TensorProto.INT8}
    assert sum(1 for t in matrices if VOCABULARY in t.dims) == 1
    untied = onnx.load(quantised["llama", False] / "onnx_static_int8.onnx").graph.initializer
    assert sum(1 for t in untied if len(t.dims) == 2 and VOCABULARY in t.dims) == 2


def test_a_float_head_is_found_and_named(exports, text, tmp_path):
    model = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    ranges = ranges_of(model, text)
    onnx.save(quantise(model, Scheme(ranges, exclude=("lm_head",))), tmp_path / "model.onnx")
    structure = structure_of(tmp_path / "model.onnx")
    assert structure.float_linear == ("lm_head",)
    with pytest.raises(GateError, match="float products with a constant matrix.*first: lm_head"):
        require_int8(structure, 11, "onnx_static_int8")


def test_a_table_dequantised_at_every_step_is_found(exports, text, tmp_path, monkeypatch):
    """What the QDQ writer makes of a tied table when nobody takes care of the embedding."""
    monkeypatch.setattr("exporters.onnx_qdq.quantise_embeddings", lambda *_: None)
    model = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    onnx.save(quantise(model, Scheme(ranges_of(model, text))), tmp_path / "model.onnx")
    with pytest.raises(GateError, match="weights dequantised at every step.*lm_head"):
        require_int8(structure_of(tmp_path / "model.onnx"), 11, "onnx_static_int8")


def test_a_float_embedding_is_found(exports, text, tmp_path, monkeypatch):
    monkeypatch.setattr("exporters.onnx_qdq.quantise_embeddings", lambda *_: None)
    model = onnx.load(exports["llama", False] / "onnx_fp32.onnx")
    onnx.save(quantise(model, Scheme(ranges_of(model, text))), tmp_path / "model.onnx")
    with pytest.raises(GateError, match="embedding tables in float.*embed_tokens"):
        require_int8(structure_of(tmp_path / "model.onnx"), 11, "onnx_static_int8")


def test_a_missing_layer_is_counted(quantised):
    with pytest.raises(GateError, match="int8 linear layers, expected 99"):
        require_int8(structure_of(quantised["gpt2", True] / "onnx_static_int8.onnx"), 99, "onnx_static_int8")


def test_two_steps_are_far_more_exact_and_stay_int8(exports, text, tmp_path):
    """Activations of two steps leave the error of the weights alone, so the logits must come much nearer."""
    source, validation = exports["gpt2", True] / "onnx_fp32.onnx", np.load(text / "validation.npy")
    divergence = {}
    for crest in (None, 0.5):
        model = onnx.load(source)
        layers = linear_layers(model)
        ranges = ranges_of(model, text)
        two_step = onnx_int8.two_step_layers(layers, ranges, crest)
        assert len(two_step) == (0 if crest is None else len(layers))
        wide = {name: type(found)(found.low * 4, found.high * 4, found.deviation) for name, found in ranges.items()}
        onnx.save(quantise(model, Scheme(wide, two_step)), tmp_path / "model.onnx")
        require_int8(structure_of(tmp_path / "model.onnx"), len(layers) + len(two_step), "onnx_static_int8")
        divergence[crest] = compare(source, tmp_path / "model.onnx", validation, "int8").kl
    assert divergence[0.5] < divergence[None] / 3


def test_calibration_sees_decode_steps_on_the_real_cache(exports, text):
    """A decode step must give exactly what the same position gives inside one long prompt."""
    model = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    name = linear_layers(model)["model.layers.1.mlp.down_proj"]
    session, windows = observing_session(model, [name]), np.load(text / "calibration.npy")[:1]
    seen = []
    observe(session, [name], Feeds(windows, STEPS), lambda _, values: seen.append(values))
    assert [values.shape[1] for values in seen] == [WINDOW - STEPS] + [1] * STEPS
    (whole,) = session.run([name], feed(windows, empty_past(session, 1)))
    np.testing.assert_allclose(np.concatenate(seen, axis=1), whole, atol=1e-4)


@pytest.mark.parametrize("calibrator", ("minmax", "percentile", "entropy"))
def test_calibration_keeps_nothing_of_the_feeds(calibrator, exports, text, monkeypatch):
    """Memory cannot grow with the windows if no array of a feed outlives the next feed but one."""
    alive: list[weakref.ref] = []
    most = 0

    def watched(session, names, feeds, visit):
        def counting(name, values):
            nonlocal most
            alive.append(weakref.ref(values))
            most = max(most, sum(reference() is not None for reference in alive))
            visit(name, values)

        observe(session, names, feeds, counting)

    monkeypatch.setattr("exporters.onnx_calibration.observe", watched)
    model = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    names = list(dict.fromkeys(linear_layers(model).values()))
    activation_ranges(model, names, Feeds(np.load(text / "calibration.npy"), 2), calibrator)
    assert len(alive) >= 6 * 3 * len(names)
    assert most <= 2 * len(names)


def test_percentile_and_entropy_cut_rare_extremes_and_minmax_does_not():
    values = np.random.default_rng(0).normal(size=200_000)
    values[0] = 200.0
    counts, _ = np.histogram(values, BINS, range=(values.min(), values.max()))
    histogram = Histogram(values.min(), values.max(), counts)
    assert percentile_ends(histogram)[1] < 6
    low, high = entropy_ends(histogram)
    assert low == values.min() and high <= 30


def test_ranges_cover_all_windows(exports, text):
    model = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    names = list(dict.fromkeys(linear_layers(model).values()))
    windows = np.load(text / "calibration.npy")
    single = [activation_ranges(model, names, Feeds(windows[i : i + 1], STEPS), "minmax") for i in range(3)]
    together = activation_ranges(model, names, Feeds(windows[:3], STEPS), "minmax")
    for name in names:
        assert together[name].low == min(found[name].low for found in single)
        assert together[name].high == max(found[name].high for found in single)


def test_an_activation_that_is_always_zero_gets_a_safe_scale(text, tmp_path, exports):
    """A layer whose gate never opens: its range is empty, its scale must not be zero or NaN."""
    model = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    gate = next(t for t in model.graph.initializer if t.name == "model.layers.0.mlp.gate_proj.weight")
    gate.CopyFrom(onnx.numpy_helper.from_array(np.zeros(gate.dims, np.float32), gate.name))
    ranges = ranges_of(model, text)
    dead = linear_layers(model)["model.layers.0.mlp.down_proj"]
    assert (ranges[dead].low, ranges[dead].high) == (0, 0)
    onnx.save(model, tmp_path / "fp32.onnx")
    onnx.save(quantise(model, Scheme(ranges)), tmp_path / "int8.onnx")
    agreement = compare(tmp_path / "fp32.onnx", tmp_path / "int8.onnx", np.load(text / "validation.npy"), "int8")
    assert agreement.kl < 0.1


def test_reduced_range_uses_seven_bits(exports, text):
    model = onnx.load(exports["llama", False] / "onnx_fp32.onnx")
    graph = quantise(model, Scheme(ranges_of(model, text), reduce_range=True)).graph
    for tensor in graph.initializer:
        if tensor.data_type == onnx.TensorProto.INT8 and len(tensor.dims) == 2:
            assert np.abs(onnx.numpy_helper.to_array(tensor)).max() <= 64


@pytest.mark.parametrize("logits", (np.zeros((3, 8)), np.full((3, 8), 2.5), np.array([[1.0, np.nan]])))
def test_dead_logits_are_a_failed_gate(logits):
    with pytest.raises(GateError, match="onnx_static_int8: logits"):
        require_live(logits, "onnx_static_int8")


def test_windows_too_short_for_the_decode_steps_are_the_user_s_mistake(text):
    with pytest.raises(UserError, match="onnx_int8.decode_steps 40 leaves no prompt"):
        onnx_int8.calibration_windows(text, OnnxInt8Settings(decode_steps=WINDOW))


def test_two_runs_are_byte_identical(quantised, exports, text, tmp_path):
    onnx_int8.run(SETTINGS, tmp_path, onnx=exports["gpt2", True], text=text)
    for path in quantised["gpt2", True].iterdir():
        assert path.read_bytes() == (tmp_path / path.name).read_bytes()


def test_compensated_rounding_beats_nearest_on_inputs_that_move_together():
    """The error that counts is of the layer's outputs; on correlated inputs it must fall well below that of plain rounding."""
    draws = np.random.default_rng(0)
    inputs = (draws.normal(size=(500, 16)) @ draws.normal(size=(16, 64)) + draws.normal(size=(500, 64)) * 0.2).astype(np.float32)
    weight = draws.normal(size=(64, 32)).astype(np.float32)
    scale = (np.abs(weight).max(0) / 15).astype(np.float32)
    nearest = np.clip(np.rint(weight / scale), -15, 15)
    rounded = compensated_rounding(weight, scale, inputs.T @ inputs, 15)
    errors = [np.square(inputs @ (matrix * scale - weight)).mean() for matrix in (nearest, rounded)]
    assert rounded.dtype == np.int8 and np.abs(rounded).max() <= 15
    assert errors[1] < errors[0] / 3


def test_a_wide_matrix_is_rounded_in_parts_and_comes_out_the_same(monkeypatch):
    draws = np.random.default_rng(4)
    weight, inputs = draws.normal(size=(16, 70)).astype(np.float32), draws.normal(size=(64, 16)).astype(np.float32)
    gram, layout = inputs.T @ inputs, Layout(bits=4, block=8, symmetric=False)
    scale = np.abs(weight).max(0) / 15

    def made():
        blocks = quantise_compensated(weight, layout, searched_grid, gram)
        return compensated_rounding(weight, scale, gram, 15), blocks.codes, blocks.scales, blocks.zeros

    whole = made()
    monkeypatch.setattr(onnx_rounding, "OUTPUTS_AT_ONCE", 32)
    for one, other in zip(whole, made(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_compensated_rounding_of_an_input_that_is_always_zero_is_nearest():
    weight = np.random.default_rng(0).normal(size=(8, 4)).astype(np.float32)
    rounded = compensated_rounding(weight, np.full(4, 0.05, np.float32), np.zeros((8, 8), np.float32), 127)
    np.testing.assert_array_equal(rounded, np.rint(weight / np.float32(0.05)))


def test_gram_matrices_are_made_in_groups_that_fit(monkeypatch):
    monkeypatch.setattr("exporters.onnx_rounding.GRAM_BYTES", 4 * 2 * 10**2)
    assert list(groups_of({"a": 10, "b": 10, "c": 10, "wide": 40})) == [["a", "b"], ["c"], ["wide"]]


def test_compensation_lowers_the_error_of_the_layers_outputs_in_the_file(exports, text, tmp_path):
    """Same scales, other integers, and a smaller error of what the layers give on the calibration text.

    Judged per layer and not by the logits: a random model's activations hardly correlate, and its logits may gain nothing.
    """
    parent = onnx.load(exports["llama", True] / "onnx_fp32.onnx")
    layers, originals = linear_layers(parent), {t.name: onnx.numpy_helper.to_array(t) for t in parent.graph.initializer}
    feeds = Feeds(np.load(text / "calibration.npy"), decode_steps=0)
    grams = gram_matrices(parent, list(dict.fromkeys(layers.values())), feeds)
    errors = {}
    for rounding in ("nearest", "compensated"):
        (tmp_path / rounding).mkdir()
        settings = OnnxInt8Settings(windows=6, decode_steps=STEPS, rounding=rounding)
        onnx_int8.run(settings, tmp_path / rounding, onnx=exports["llama", True], text=text)
        graph = onnx.load(tmp_path / rounding / "onnx_static_int8.onnx").graph
        written = {t.name: onnx.numpy_helper.to_array(t).astype(np.float64) for t in graph.initializer}
        for layer, value in layers.items():
            name = f"{layer}.weight"
            apart = written[f"{name}_quantized"] * written[f"{name}_scale"] - originals[name]  # [in, out]
            errors[rounding, layer] = np.einsum("io,ij,jo->", apart, grams[value], apart)
    for layer in layers:
        assert errors["compensated", layer] < errors["nearest", layer]


@pytest.mark.parametrize("case", [("llama", True), ("gpt2", True)], ids=str)
def test_a_parent_whose_weights_lie_in_a_file_of_their_own_gives_the_same_artifact(case, quantised, exports, text, tmp_path):
    """As those of more than 2 GB do: nothing on the way is one message. The same graph with the same numbers comes out."""
    source = exports[case] / "onnx_fp32.onnx"
    (tmp_path / "parent").mkdir()
    (tmp_path / "out").mkdir()
    model = onnx.load(source)
    before = model.SerializeToString(deterministic=True)
    save_with_data(model, tmp_path / "parent" / "onnx_fp32.onnx")
    assert model.SerializeToString(deterministic=True) == before, "what was written is still whole in memory"
    files = sorted(path.name for path in (tmp_path / "parent").iterdir())
    assert files == ["onnx_fp32.onnx", "onnx_fp32.onnx.data"]
    assert (tmp_path / "parent" / files[0]).stat().st_size < 0.2 * source.stat().st_size
    sidecar = json.loads((exports[case] / "onnx_fp32.json").read_text())
    sidecar["files"] += [{"path": files[1]}]
    (tmp_path / "parent" / "onnx_fp32.json").write_text(json.dumps(sidecar))
    onnx_int8.run(SETTINGS, tmp_path / "out", onnx=tmp_path / "parent", text=text)
    graphs = [onnx.load(folder / "onnx_static_int8.onnx").graph for folder in (tmp_path / "out", quantised[case])]
    numbers = [{tensor.name: onnx.numpy_helper.to_array(tensor).tobytes() for tensor in graph.initializer} for graph in graphs]
    assert numbers[0] == numbers[1] and list(graphs[0].node) == list(graphs[1].node)
