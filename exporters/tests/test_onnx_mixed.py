"""What single layers cost as int8, and static int8 in which some layers are something else."""

import json

import numpy as np
import onnx
import pytest

from exporters import onnx_int8
from exporters.onnx_agreement import compare
from exporters.onnx_calibration import Feeds
from exporters.onnx_int8 import static_int8
from exporters.onnx_mixed import EMBEDDING, forms_to_try, layers_to_leave, mixed, named_layers, require_mixed
from exporters.onnx_qdq import linear_layers
from exporters.onnx_sensitivity import Switched, sensitivity
from exporters.onnx_structure import structure_of
from exporters.settings import OnnxInt8Settings
from exporters.targets import Targets
from exporters.tests.conftest import CASES
from models.errors import GateError, UserError

PLAIN = {"windows": 2, "decode_steps": 4, "rounding": "nearest", "two_step_crest": None}


@pytest.fixture(scope="module", params=CASES, ids=str)
def made(request, text, exports):
    """fp32 graph's path, its model, its plain static int8 form, the scheme, and the validation windows."""
    source = exports[request.param] / "onnx_fp32.onnx"
    model = onnx.load(source)
    quantised, scheme = static_int8(model, Feeds(np.load(text / "calibration.npy"), 4), OnnxInt8Settings(**PLAIN))
    return source, model, quantised, scheme, np.load(text / "validation.npy")


def saved(model: onnx.ModelProto, path):
    onnx.save(model, path)
    return path


def test_all_switches_on_is_the_int8_graph_and_all_off_is_fp32(made, tmp_path):
    source, model, quantised, _, windows = made
    switched = Switched(model, quantised, windows)
    assert set(switched.names) == {*linear_layers(model), EMBEDDING}
    off, on = switched.agreement([]), switched.agreement(switched.names)
    assert off.kl == 0 and off.top1 == 1
    expected = compare(source, saved(quantised, tmp_path / "int8.onnx"), windows, "int8")
    assert on.kl == pytest.approx(expected.kl, rel=1e-3) and on.top1 == expected.top1


def test_a_layers_cost_is_that_of_a_file_in_which_it_alone_is_int8(made, tmp_path):
    source, model, quantised, scheme, windows = made
    costs = sensitivity(Switched(model, quantised, windows), windows=1)
    assert [cost.kl for cost in costs.layers] == sorted((cost.kl for cost in costs.layers), reverse=True)
    assert costs.tokens == windows.shape[1] - 1
    for cost in (costs.layers[0], next(cost for cost in costs.layers if cost.name == EMBEDDING)):
        others = {name: "float" for name in (*linear_layers(model), EMBEDDING) if name != cost.name}
        path = saved(mixed(model, quantised, scheme, others), tmp_path / "alone.onnx")
        assert cost.kl == pytest.approx(compare(source, path, windows[:1], "alone").kl, rel=0.02, abs=1e-9)


def test_a_ruined_layer_is_found_and_leaving_it_mends_the_file(made, text, tmp_path):
    source, model, quantised, scheme, windows = made
    victim = next(name for name in linear_layers(model) if name.rsplit(".", 1)[-1] in ("down_proj", "c_proj"))
    ruined = onnx.ModelProto()
    ruined.CopyFrom(quantised)
    weight = next(node.input[1] for node in model.graph.node if node.name == victim)
    scale = next(tensor for tensor in ruined.graph.initializer if tensor.name == f"{weight}_scale")
    scale.CopyFrom(onnx.numpy_helper.from_array(8 * onnx.numpy_helper.to_array(scale), scale.name))
    switched = Switched(model, ruined, windows)
    ranking = [cost.name for cost in sensitivity(switched, windows=2).layers]
    errors = switched.local_errors()
    assert ranking[0] == errors[0].name == victim
    assert errors[0].share == pytest.approx(7**2, rel=0.1)  # 8 times the output in place of it
    assert {error.name for error in errors} == set(switched.names) and errors[1].share < 0.02
    healthy = compare(source, saved(quantised, tmp_path / "int8.onnx"), windows, "int8")
    targets = Targets(healthy.top1 - 0.1, None)
    assert layers_to_leave(switched, ranking, targets) == (victim,)
    first = next(forms_to_try([victim], ranking, []))
    assert first == {victim: "weight_only_int8"}
    path = saved(mixed(model, ruined, scheme, first), tmp_path / "mended.onnx")
    assert not targets.missed(compare(source, path, windows, "mended"))
    require_mixed(structure_of(path), len(linear_layers(model)), first, "mended")
    with pytest.raises(GateError, match="int8 linear layers, expected"):
        require_mixed(structure_of(path), len(linear_layers(model)), {}, "mended")


def test_forms_go_step_by_step_and_end_with_all_in_float():
    ranking = ["a", "b", EMBEDDING, "c", "d"]
    tried = list(forms_to_try(["a", "b"], ranking, ["d2"]))
    assert tried[0] == {"d2": "float", "a": "weight_only_int8", "b": "weight_only_int8"}
    assert EMBEDDING not in tried[1] and len(tried[1]) == 4
    assert tried[-1] == dict.fromkeys([*ranking, "d2"], "float")
    assert next(forms_to_try([], ranking, [])) == {"a": "weight_only_int8"}
    assert list(forms_to_try([], [], ["a"])) == []


def test_the_stage_leaves_int8_until_its_targets_hold_and_says_so(made, text, tmp_path):
    source, model, *_ = made
    first = next(iter(linear_layers(model)))
    settings = OnnxInt8Settings(**PLAIN, least_top1=1.0, largest_perplexity_change=0.0, keep_float=(f"{first[:-2]}*",))
    onnx_int8.run(settings, tmp_path, onnx=source.parent, text=text)
    sidecar = json.loads((tmp_path / "onnx_static_int8.json").read_text())
    measured = sidecar["measured"]
    assert measured["against_fp32"]["top1"] == 1.0 and not measured["mixed_precision"]["trials"][-1]["missed"]
    assert all(trial["missed"] for trial in measured["mixed_precision"]["trials"][:-1])
    kept = set(named_layers(model, settings.keep_float))
    assert kept and kept <= {entry["name"] for entry in measured["not_int8"]}
    assert measured["int8_linear_layers"] < measured["linear_layers"] == len(linear_layers(model))
    assert {cost["name"] for cost in measured["sensitivity"]["layers"]} == {*linear_layers(model), EMBEDDING}


def test_without_mixed_precision_everything_stays_int8(made, text, tmp_path):
    source, model, *_ = made
    settings = OnnxInt8Settings(**PLAIN, least_top1=1.0, mixed_precision=False)
    onnx_int8.run(settings, tmp_path, onnx=source.parent, text=text)
    measured = json.loads((tmp_path / "onnx_static_int8.json").read_text())["measured"]
    assert measured["int8_linear_layers"] == len(linear_layers(model)) and measured["embedding_int8"]


@pytest.mark.parametrize("least_top1", [None, 1.0])
def test_in_a_larger_model_mixed_precision_chooses_by_what_one_run_tells_of_all_layers(made, text, tmp_path, least_top1):
    source, model, *_ = made
    settings = OnnxInt8Settings(**PLAIN, least_top1=least_top1, sensitivity_up_to_mb=0)
    onnx_int8.run(settings, tmp_path, onnx=source.parent, text=text)
    measured = json.loads((tmp_path / "onnx_static_int8.json").read_text())["measured"]
    missed = bool(measured["mixed_precision"]["trials"][0]["missed"])
    assert missed == (least_top1 is not None) and "sensitivity" not in measured
    assert (measured["int8_linear_layers"] < measured["linear_layers"] or not measured["embedding_int8"]) == missed
    left = [entry["why"] for entry in measured["not_int8"] if "position table" not in entry["why"]]
    assert bool(left) == missed and all("its own output is off by" in why for why in left)
    assert not measured["mixed_precision"]["trials"][-1]["missed"]


def test_a_pattern_that_names_nothing_is_refused(made):
    with pytest.raises(UserError, match="names no layer"):
        named_layers(made[1], ["model.layers.99.*"])
