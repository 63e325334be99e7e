"""report.html in a browser, on a phone and on a desk, light and dark."""

import json
from pathlib import Path

import pytest

from pipeline.fingerprint import ROOT
from pipeline.report import Report, build_report, report_json
from pipeline.report_html import report_html
from pipeline.report_plots import Scale, label_places, overlap, round_steps
from pipeline.tests.fake_road import fake_outcome, fake_recipe, fake_road, fake_stages
from pipeline.tests.pages import (
    DESKTOP,
    PHONE,
    SCREEN_NAMES,
    SCREENS,
    faults_of_layout,
    faults_of_numbers,
    numbers_on,
    open_details,
    opened,
    written,
)


def fake_report(folder: Path, **options) -> Report:
    road = fake_road(folder / "road")
    return build_report(fake_recipe(), road, fake_outcome(road, **options), fake_stages())


def unlucky(folder: Path) -> Report:
    """A report with next to nothing in it: nothing was timed, nothing scored, no layer measured, an artifact that is not there."""
    report = fake_report(folder, worse="onnx_static_int8")
    data = json.loads(report_json(report))
    for artifact in data["artifacts"]:
        artifact |= {"quality": None, "coverage": None, "sensitivity": None}
        artifact["devices"] = [{**device, "quality": None} for device in artifact["devices"] if device["emulated"]]
    data["artifacts"][-1]["devices"] = []
    return Report.model_validate(data)


def long_names(folder: Path) -> Report:
    """Names as long as they get."""
    data = json.loads(report_json(fake_report(folder)))
    data["model"]["name"] = "organisation-with-a-long-name.model-of-some-billions-of-parameters-instruct-v2"
    for artifact in data["artifacts"]:
        for device in artifact["devices"]:
            if device["emulated"]:
                device["device"] = "ssh://somebody@raspberrypi-in-the-cellar.local:2222?threads=4"
    return Report.model_validate(data)


def demo(folder: Path) -> Report:
    return Report.model_validate_json((ROOT / "docs" / "demo-report.json").read_text(encoding="utf-8"))


REPORTS = {"demo": demo, "fake": fake_report, "unlucky": unlucky, "long names": long_names}


@pytest.fixture(scope="module", params=REPORTS)
def report(request, tmp_path_factory) -> Report:
    return REPORTS[request.param](tmp_path_factory.mktemp("report"))


@pytest.mark.parametrize(("screen", "scheme"), SCREENS, ids=SCREEN_NAMES)
def test_the_page_is_rendered_fits_and_can_be_read(browser, report, tmp_path, screen, scheme):
    with opened(browser, written(tmp_path, report_html(report)), screen, scheme) as (page, faults):
        assert page.title() == f"{report.model.name}: {'passed' if report.passed else 'failed'}"
        assert page.locator("h1").inner_text() == report.model.name
        assert faults_of_layout(page) == []
        open_details(page)
        assert faults_of_layout(page) == []
        assert faults == []


def test_every_number_is_the_record_s(browser, report, tmp_path):
    with opened(browser, written(tmp_path, report_html(report)), DESKTOP, "light") as (page, _):
        record = json.loads(report_json(report))
        assert faults_of_numbers(page, record) == []
        assert len(numbers_on(page)) > 40


def test_a_number_that_is_not_the_record_s_is_found(browser, tmp_path):
    """The check above can fail: it names a changed value and a changed text."""
    report = demo(tmp_path)
    text = report_html(report)
    record = json.loads(report_json(report))
    shown = 'data-path="reference.perplexity" data-form="perplexity" value="'
    for spoilt in (text.replace(f"{shown}1", f"{shown}2"), text.replace(">11.343<", ">11.344<")):
        assert spoilt != text
        with opened(browser, written(tmp_path, spoilt), DESKTOP, "light") as (page, _):
            assert "reference.perplexity" in faults_of_numbers(page, record)[0]


def test_light_and_dark_differ(browser, tmp_path):
    grounds = {}
    for scheme in ("light", "dark"):
        with opened(browser, written(tmp_path, report_html(demo(tmp_path))), PHONE, scheme) as (page, _):
            grounds[scheme] = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert grounds["light"] == "rgb(255, 255, 255)" and grounds["dark"] != grounds["light"]


@pytest.mark.parametrize("screen", [PHONE, DESKTOP], ids=["phone", "desktop"])
def test_verdict_size_quality_speed_and_memory_stand_on_the_first_screen(browser, tmp_path, screen):
    with opened(browser, written(tmp_path, report_html(demo(tmp_path))), screen, "light") as (page, _):
        bottom = "elements => Math.max(...elements.map(element => element.getBoundingClientRect().bottom))"
        assert page.locator(".card h3").all_inner_texts() == [
            "Size", "Perplexity, lower is better", "Speed, tokens per second", "Peak memory",
        ]  # fmt: skip
        assert page.eval_on_selector_all(".verdict, .card", bottom) <= screen["height"]


def test_every_jump_leads_somewhere(browser, tmp_path):
    with opened(browser, written(tmp_path, report_html(demo(tmp_path))), PHONE, "light") as (page, _):
        missing = "links => links.filter(link => !document.querySelector(link.getAttribute('href'))).map(link => link.textContent)"
        assert page.eval_on_selector_all("a", missing) == [] and page.locator("a").count() >= 7


def test_each_timed_token_is_a_stroke_in_its_place(browser, tmp_path):
    report = demo(tmp_path)
    with opened(browser, written(tmp_path, report_html(report)), DESKTOP, "light") as (page, _):
        drawn = page.eval_on_selector_all("path.tokens", "paths => paths.map(path => path.getAttribute('d').split('M').length - 1)")
    timed = [device for artifact in report.artifacts for device in artifact.devices if device.decode_ms_p50]
    assert drawn == [len(device.decode_ms) for device in timed] and min(drawn) > 30


def test_points_of_the_quality_plot_stand_where_the_scales_say(browser, tmp_path):
    """Each point read off the drawn scales gives the artifact's bytes and perplexity again."""
    report = demo(tmp_path)
    with opened(browser, written(tmp_path, report_html(report)), DESKTOP, "light") as (page, _):
        ticks = page.eval_on_selector_all(
            "svg .scale", "texts => texts.map(t => [t.dataset.axis, +t.dataset.value, +t.getAttribute('x'), +t.getAttribute('y')])"
        )
        points = page.eval_on_selector_all(
            "figure:has(.scale) svg circle", "circles => circles.map(c => [+c.getAttribute('cx'), +c.getAttribute('cy')])"
        )
    across, up = ([tick for tick in ticks if tick[0] == axis] for axis in "xy")
    x = Scale(across[0][2], across[-1][2], across[0][1], across[-1][1])
    y = Scale(up[0][3] - 4, up[-1][3] - 4, up[0][1], up[-1][1])
    expected = [(report.model.bytes_fp32, 0.0)] + [(each.bytes, each.quality.perplexity_change_dense) for each in report.artifacts]
    for (left, top), (size, change) in zip(points, expected, strict=True):
        assert x.at(left) * 1e6 == pytest.approx(size, abs=0.1e6) and y.at(top) / 100 == pytest.approx(change, abs=3e-4)


def test_labels_keep_out_of_each_other_s_way():
    crowd = [(50.0, 60.0), (52.0, 61.0), (54.0, 60.0), (300.0, 150.0)]
    places = label_places(crowd, ["A", "B", "C", "D"])
    boxes = [(x - 4, y - 10, x + 4, y + 2) for x, y in places]
    assert all(overlap(one, other) == 0 for index, one in enumerate(boxes) for other in boxes[index + 1 :])


@pytest.mark.parametrize("span", [(0.0, 27.8), (0.0, 2.78), (-0.4, 0.1), (0.0, 1e-3), (-3.0, 120.0)])
def test_scales_have_few_round_steps_that_span_the_values(span):
    steps = round_steps(*span)
    assert steps[0] <= span[0] + 1e-12 and steps[-1] >= span[1] - 1e-12 and 2 <= len(steps) <= 7


def test_what_was_not_measured_is_said(tmp_path):
    text = report_html(unlucky(tmp_path))
    for words in (
        "was not measured for this model",
        "Nothing was timed",
        "not counted",
        "onnx_fp32 has no quality number",
        "tflite_static_int8 was not measured",
    ):
        assert words in text
