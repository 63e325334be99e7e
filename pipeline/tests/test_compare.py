"""Two records side by side: what may be called a difference, and what may not."""

import json

import pytest

from device_tests.devices.campaign import Outcome
from models.errors import GateError, UserError
from pipeline import compare as comparison
from pipeline.compare import compare_rows
from pipeline.device_report import DeviceReport, device_report, raise_for, read_record, write_device_report
from pipeline.report_html import device_report_html
from pipeline.tests.fake_road import fake_outcome, fake_road


@pytest.fixture()
def outcome(tmp_path):
    return fake_outcome(fake_road(tmp_path / "road"))


def compare(first, second) -> dict:
    return comparison.compare(read_record(first), read_record(second))


def write(outcome: Outcome, path):
    report = device_report("tiny", outcome)
    write_device_report(report, path, device_report_html(report))
    return path


def with_rounds(outcome: Outcome, times: list[float]) -> Outcome:
    """The first result with these first-token times, one per round."""
    device = outcome.results[0]["device"]
    device |= {
        "first_token_ms": sorted(times)[len(times) // 2],
        "rounds": [{"first_token_ms": time, "decode_tokens_per_s": 9.0} for time in times],
    }
    return outcome


def finding(first, second, number="first_token_ms"):
    found = compare(first, second)["differences"]
    return next(entry for entry in found if entry["number"] == number and entry["device"] == "local" and entry["artifact"] == "onnx_fp32")


@pytest.mark.parametrize(
    ("times", "said"),
    [
        ([10.0, 10.1, 10.2], "within the spread"),  # the same
        ([10.3, 10.4, 10.5], "within the spread"),  # ranges apart, medians no further than both ranges are wide
        ([12.0, 12.1, 12.2], "larger in B"),
        ([8.0, 8.1, 8.2], "smaller in B"),
        ([8.0, 10.1, 14.0], "within the spread"),
        ([12.0], "one round: spread unknown"),
    ],
)
def test_only_more_than_the_spread_is_a_difference(outcome, tmp_path, times, said):
    first = write(with_rounds(outcome, [10.0, 10.1, 10.2]), tmp_path / "a.json")
    second = write(with_rounds(outcome, times), tmp_path / "b.json")
    entry = finding(first, second)
    assert entry["finding"] == said and entry["ratio"] == pytest.approx(entry["b"] / entry["a"]) and entry["same_bytes"]


def test_numbers_that_no_clock_makes_are_compared_exactly(outcome, tmp_path):
    first = write(outcome, tmp_path / "a.json")
    outcome.results[0]["device"]["max_abs_diff"] *= 1.5
    second = write(outcome, tmp_path / "b.json")
    assert finding(first, first, "max_abs_diff")["finding"] == "equal"
    assert finding(first, second, "max_abs_diff")["finding"] == "different"


def test_what_stands_in_one_record_only_is_named(outcome, tmp_path):
    first = write(outcome, tmp_path / "a.json")
    second = write(Outcome(outcome.results[1:], outcome.boards), tmp_path / "b.json")
    assert compare(first, second)["only"] == ["only in A: onnx_fp32 in onnxruntime on local, 2 threads"]
    assert compare(second, first)["only"] == ["only in B: onnx_fp32 in onnxruntime on local, 2 threads"]


def test_other_bytes_are_told(outcome, tmp_path):
    first = write(outcome, tmp_path / "a.json")
    for result in outcome.results:
        result["sha256"] = "12" * 32
    second = write(outcome, tmp_path / "b.json")
    assert all("(other bytes)" in row[-1] for row in compare_rows(compare(first, second)))


@pytest.mark.parametrize("text", ["", "[1]", '{"name": "x"}', '{"model": {}}'])
def test_what_is_no_report_is_refused_in_one_line(tmp_path, text):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(UserError, match="no report of PocketLM.*give one that it wrote") as refused:
        compare(tmp_path / "x.json", tmp_path / "x.json")
    assert "\n" not in str(refused.value)
    with pytest.raises(UserError, match="cannot be read"):
        read_record(tmp_path / "none.json")


def test_the_record_says_what_ran_where(outcome, tmp_path):
    record = json.loads(write(outcome, tmp_path / "a.json").read_text())
    assert record["passed"] and set(record["boards"]) == {"local", "arm64"} and DeviceReport.model_validate(record)
    assert {device["device"] for artifact in record["artifacts"] for device in artifact["devices"]} == {"local", "arm64"}
    page = (tmp_path / "a.html").read_text()
    assert "emulated: right for numbers, nothing is timed" in page and "Not tested: ssh://pi: no route to host." in page


def test_the_exit_says_what_failed_and_what_was_out_of_reach(outcome):
    with pytest.raises(UserError, match="^ssh://pi: no route to host$"):
        raise_for(device_report("tiny", outcome))
    outcome.results[0]["device"] |= {"passed": False, "failures": ["onnx_fp32 in onnxruntime on local: all-zero logits"]}
    report = device_report("tiny", outcome)
    assert not report.passed
    with pytest.raises(GateError, match="all-zero logits\nssh://pi: no route"):
        raise_for(report)
    assert not device_report("tiny", Outcome([], {}, [])).passed, "nothing tested is nothing passed"


def test_a_runtime_that_a_device_cannot_have_fails_nothing_while_others_ran(outcome):
    missing = {"device": "ssh://pi", "runtime": "tflite", "reason": "no wheel for Python 3.13"}
    raise_for(device_report("tiny", Outcome(outcome.results, outcome.boards, [missing])))
    with pytest.raises(UserError, match="no wheel for Python 3.13"):
        raise_for(device_report("tiny", Outcome([], {}, [missing])))
