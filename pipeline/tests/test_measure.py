"""Which runtimes an artifact is measured in, and what the line of a failed gate says."""

import pytest

from pipeline.measure import runtimes_of, with_dearest

COSTS = [{"name": f"layers.{index}.down_proj", "kl": 0.1 / (index + 1), "top1": 0.9} for index in range(5)]


def test_an_artifact_is_measured_where_it_was_proved():
    assert runtimes_of({"format": "onnx"}) == ["onnxruntime"]
    assert runtimes_of({"format": "tflite"}) == ["litert", "tflite"]
    assert runtimes_of({"format": "tflite", "runtimes": ["litert"]}) == ["litert"]


@pytest.mark.parametrize(
    "measured",
    [{"sensitivity": {"layers": COSTS}}, {"mixed_precision": {"layers": COSTS}}],
    ids=["measured always", "measured when a target was missed"],
)
def test_a_failed_gate_names_the_dearest_layers(measured):
    result = {"device": {"passed": False, "failures": ["top1 0.9 is below 0.99"]}}
    line = with_dearest(result, {"measured": measured})["device"]["failures"][0]
    assert line.startswith("top1 0.9 is below 0.99; dearest layers as int8: layers.0.down_proj (KL 1.0e-01), layers.1.down_proj")
    assert "layers.3" not in line


def test_nothing_is_added_where_nothing_failed_or_nothing_was_measured():
    passed = {"device": {"passed": True, "failures": []}}
    assert with_dearest(passed, {"measured": {"sensitivity": {"layers": COSTS}}}) == passed
    failed = {"device": {"passed": False, "failures": ["kl 1 exceeds 0.1"]}}
    assert with_dearest(failed, {"measured": {"mixed_precision": {"layers": []}}}) == failed
