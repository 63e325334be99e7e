"""report.json and report.html: what they say, and that they say the same."""

import json
import re
from html.parser import HTMLParser

import pytest
from pydantic import ValidationError

from device_tests.devices.campaign import Outcome
from models.errors import UserError
from pipeline.recipe import Gates
from pipeline.report import Quality, Report, build_report, coverage_of, read_report, report_json, worst_quality
from pipeline.report_html import report_html
from pipeline.report_numbers import FORMATS
from pipeline.stages import ARTIFACT_OF_STAGE
from pipeline.table import matrix_rows, rows, skipped_lines
from pipeline.tests.fake_road import fake_outcome, fake_recipe, fake_results, fake_road, fake_stages
from pipeline.write_schemas import FOLDER, MODELS, schema_text

PROMISED = {
    "devices": "device isa runtime runtime_version threads load_ms first_token_ms decode_ms_p50 decode_ms_p90 decode_ms_p99 "
    "prefill_tokens_per_s decode_tokens_per_s peak_rss_mb max_abs_diff top1 passed",
    "quality": "perplexity perplexity_stderr perplexity_change perplexity_change_dense kl top1",
    "artifacts": "name file sha256 bytes quality devices passed",
}
VOID = {"meta", "br", "wbr", "rect", "line", "circle", "path"}


class Page(HTMLParser):
    """Collects every number with its path, the texts, and whether the tags close in order."""

    def __init__(self, text: str):
        super().__init__()
        self.open, self.numbers, self.texts, self.addresses = [], [], [], []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        if "data-path" in attributes and not attributes.keys() & {"data-over", "data-total"}:
            self.numbers.append((attributes["data-path"], attributes.get("data-value", attributes.get("value"))))
        self.addresses += [value for name, value in attributes.items() if name in ("src", "href")]
        if tag not in VOID:
            self.open.append((tag, "data-path" in attributes or "data-axis" in attributes))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop()[0] == tag

    def handle_data(self, data):
        inside = {tag for tag, _ in self.open}
        if not inside & {"style", "pre"}:
            self.texts.append((data, any(numbered for _, numbered in self.open)))


@pytest.fixture
def road(tmp_path):
    return fake_road(tmp_path / "road")


def report_of(road, **options) -> Report:
    return build_report(fake_recipe(), road, fake_outcome(road, **options), fake_stages())


def at(data, path: str):
    for step in path.split("."):
        data = data[int(step)] if isinstance(data, list) else data[step]
    return data


def test_report_has_the_promised_fields(road, tmp_path):
    report = report_of(road)
    (tmp_path / "report.json").write_text(report_json(report))
    data = json.loads((tmp_path / "report.json").read_text())
    assert data["passed"] and [artifact["name"] for artifact in data["artifacts"]] == list(fake_recipe().artifacts)
    for artifact in data["artifacts"]:
        assert set(PROMISED["artifacts"].split()) <= artifact.keys()
        assert set(PROMISED["quality"].split()) <= artifact["quality"].keys()
        for device in artifact["devices"]:
            assert set(PROMISED["devices"].split()) <= device.keys()
    assert {"perplexity", "perplexity_stderr", "tokens"} <= data["reference"].keys()
    assert {"perplexity", "parameters", "sparsity"} <= data["pruned"].keys()
    assert data["versions"] == {"onnx": "1.0", "tflite": "1.0", "tokenizers": "0.23.3", "torch": "2.13.0"}
    assert data["recipe"]["checkpoint"]["source"] == "demo" and data["stages"][1]["cached"]
    assert read_report(tmp_path / "report.json") == report
    assert len(rows(data)) == 12  # the terminal's table reads the same report: six runs here, six on the emulated machine
    assert {row[7] for row in rows(data) if row[2] == "arm64"} == {"emulated"}, "no time may stand where none was measured"
    assert [row[4:9] for row in matrix_rows(data["artifacts"])] == [("75.0%", "2e-05", "99.80%", "+0.0200%", "512")] * 6
    assert skipped_lines(data["skipped"]) == ["not tested: ssh://pi: no route to host"]


def test_every_artifact_has_gates():
    assert set(Gates.model_fields) == set(ARTIFACT_OF_STAGE.values())


def test_one_failed_runtime_fails_the_artifact_and_the_whole(road):
    report = report_of(road, worse="tflite_static_int8")
    assert not report.passed
    assert {artifact.name: artifact.passed for artifact in report.artifacts}["tflite_static_int8"] is False
    assert sum(artifact.passed for artifact in report.artifacts) == 3


def test_unmeasured_artifact_did_not_pass(road):
    results = [result for result in fake_results(road) if result["artifact"] != "onnx_fp32"]
    report = build_report(fake_recipe(), road, Outcome(results), fake_stages())
    assert not report.passed and not report.artifacts[0].passed and report.artifacts[0].quality is None


def test_result_of_other_bytes_is_refused(road):
    results = fake_results(road)
    results[0]["sha256"] = "00" * 32
    with pytest.raises(UserError, match="onnx_fp32.*other bytes"):
        build_report(fake_recipe(), road, Outcome(results), fake_stages())


def test_run_that_died_is_reported_without_numbers(road):
    results = fake_results(road)
    device = {"device": "local", "isa": "x86_64", "runtime": "onnxruntime", "runtime_version": None, "threads": 2}
    results[1] |= {"sha256": None, "quality": None, "device": {**device, "passed": False, "failures": ["died by signal SIGSEGV"]}}
    report = build_report(fake_recipe(), road, Outcome(results), fake_stages())
    assert not report.passed and report.artifacts[1].quality is None
    page = report_html(report)
    assert "died by signal SIGSEGV" in page and "null" in page
    Page(page)


def test_quality_is_the_worst_of_the_runtimes_number_by_number():
    first = Quality(perplexity=10, perplexity_stderr=1, perplexity_change=0.01, perplexity_change_dense=0.1, kl=0.5, top1=0.9)
    second = Quality(perplexity=9, perplexity_stderr=2, perplexity_change=0.005, perplexity_change_dense=0.05, kl=0.7, top1=0.8)
    worst = worst_quality([second, first])
    assert (worst.perplexity, worst.perplexity_stderr, worst.perplexity_change) == (10, 1, 0.01)
    assert (worst.kl, worst.top1) == (0.7, 0.8)
    broken = first.model_copy(update={"perplexity_change": None, "perplexity": None})
    assert worst_quality([first, broken]).perplexity_change is None
    assert worst_quality([]) is None


def test_infinite_numbers_become_null(road):
    results = fake_results(road)
    results[0]["quality"] |= {"perplexity": float("inf"), "kl": float("nan")}
    data = json.loads(report_json(build_report(fake_recipe(), road, Outcome(results), fake_stages())))
    assert data["artifacts"][0]["quality"]["perplexity"] is None and data["artifacts"][0]["quality"]["kl"] is None


def test_sampled_text_is_said(tmp_path):
    report = report_of(fake_road(tmp_path / "road", sampled=True))
    assert report.text_sampled and "sampled from the dense model itself" in report_html(report)
    plain = report_of(fake_road(tmp_path / "other"))
    assert not plain.text_sampled and "sampled from the dense model itself" not in report_html(plain)


def test_coverage_is_told_in_both_shapes_that_exporters_write(road):
    found = {artifact.name: artifact.coverage for artifact in report_of(road).artifacts}
    assert found["onnx_fp32"] is None and found["tflite_fp32"] is None
    assert (found["onnx_static_int8"].int8_linear_layers, found["onnx_static_int8"].bits_per_weight) == (14, 8.25)
    assert (found["tflite_static_int8"].linear_layers, found["tflite_static_int8"].bits_per_weight) == (15, None)
    assert coverage_of({"linear_layers": 31, "prompt_int8_linear_layers": 26}).prompt_int8_linear_layers == 26
    assert coverage_of({"sensitivity": None}) is None


def test_report_is_frozen_and_checked(road):
    report = report_of(road)
    with pytest.raises(ValidationError):
        report.passed = False
    with pytest.raises(ValidationError):
        Report.model_validate({**json.loads(report_json(report)), "passed": "perhaps"})


@pytest.mark.parametrize("worse", [None, "onnx_static_int8"])
def test_every_number_on_the_page_is_the_report_s(road, worse):
    report = report_of(road, worse=worse)
    data = json.loads(report_json(report))
    page = Page(report_html(report))
    assert not page.open
    for path, value in page.numbers:
        assert json.loads(value) == at(data, path)
    paths = {path for path, _ in page.numbers}
    for place, artifact in enumerate(data["artifacts"]):
        assert f"artifacts.{place}.bytes" in paths
        for index, device in enumerate(artifact["devices"]):
            timed = ("decode_ms_p50", "peak_rss_mb", "quality.perplexity_change", "quality.top1", "max_abs_diff")
            compared = ("against_local.bit_equal", "against_local.top1", "against_local.perplexity_change", "max_abs_diff")
            for name in compared if device["emulated"] else timed:
                assert f"artifacts.{place}.devices.{index}.{name}" in paths
    assert ("Passed" in {text for text, _ in page.texts}) == (worse is None)


def test_numbers_stand_only_where_they_were_looked_up(road):
    """Text outside of a looked-up number holds no decimal number and no percentage of its own."""
    page = Page(report_html(report_of(road)))
    for text, looked_up in page.texts:
        if not looked_up:
            assert not re.search(r"\d[.,]\d+(?!\.\d)|\d\s?%|\d\s?MB", text.replace("2.3.0", "").replace("apache-2.0", "")), text


def test_page_needs_no_network_and_is_the_same_twice(road):
    report = report_of(road)
    text = report_html(report)
    assert text == report_html(report)
    assert {address[0] for address in Page(text).addresses} == {"#"} and "http" not in text and "url(" not in text and "<script" not in text
    assert "prefers-color-scheme: dark" in text and 'name="viewport"' in text


def test_names_are_escaped(road):
    report = report_of(road)
    model = report.model.model_copy(update={"name": "<script>alert(1)</script>", "source": "a<b"})
    text = report_html(report.model_copy(update={"model": model}))
    assert "<script>" not in text and "a&lt;b" in text


def test_formats_are_readable():
    assert FORMATS["duration"](7.21) == "7.2 s" and FORMATS["duration"](353.9) == "5 min 54 s" and FORMATS["duration"](7379) == "2 h 2 min"
    assert FORMATS["change"](0.00312) == "+0.31%" and FORMATS["megabytes"](9_060_000) == "9.06 MB"
    assert FORMATS["change"](-1e-9) == "\u00b10.00%" and FORMATS["small_change"](-1e-6) == "-0.0001%"
    assert FORMATS["count"](5120) == "5\u202f120"


@pytest.mark.parametrize("name", MODELS)
def test_committed_schema_is_current(name):
    assert (FOLDER / name).read_text(encoding="utf-8") == schema_text(name), "run: python -m pipeline.write_schemas"
