"""Two bundles side by side, in the terminal and as a page; and a report's page made again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from models.errors import GateError, UserError
from pipeline.bundle import BundleInputs, build_bundle
from pipeline.compare import compare
from pipeline.compare_bundles import flat, notes
from pipeline.compare_html import comparison_html
from pipeline.device_report import device_report, read_record, write_device_report
from pipeline.fingerprint import ROOT
from pipeline.recipe import load_recipe
from pipeline.report import build_report, report_json
from pipeline.report_again import write_again
from pipeline.report_html import device_report_html
from pipeline.runner import with_our_path
from pipeline.tests.fake_road import ARTIFACTS, EVERYTHING, fake_outcome, fake_road, fake_stages
from pipeline.tests.pages import SCREEN_NAMES, SCREENS, faults_of_layout, faults_of_numbers, numbers_on, open_details, opened, written

DEMO_REPORT = ROOT / "docs" / "demo-report.json"


def built(out: Path, settings: tuple[str, ...] = (), name: str = "tiny", seconds: float = 1.5):
    recipe = load_recipe(None, [f'name="{name}"', f"artifacts={json.dumps(ARTIFACTS)}", *settings])
    road = fake_road(out / "road")
    stages = [{**stage, "seconds": seconds} for stage in fake_stages()]
    report = build_report(recipe, road, fake_outcome(road), stages)
    return build_bundle(BundleInputs(recipe, road, report, "key", EVERYTHING), out / "dist")


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    """Two that differ in a setting and in how long a stage took."""
    first = built(tmp_path_factory.mktemp("first"))
    second = built(tmp_path_factory.mktemp("second"), ("prune.ffn=0.25",), name="other", seconds=3.0)
    return first, second


def pocketlm(folder: Path, *arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from pipeline.cli import main; main()", *arguments]
    return subprocess.run(command, cwd=folder, env=with_our_path(dict(os.environ)), capture_output=True, text=True, check=False)


def test_folder_and_zip_are_read_alike(bundles):
    for bundle in bundles:
        assert read_record(bundle.folder) == read_record(bundle.archive) == read_record(bundle.folder / "report.json")


def test_a_bundle_with_a_changed_report_is_refused(bundles, tmp_path):
    copy = tmp_path / "bundle"
    shutil.copytree(bundles[0].folder, copy)
    (copy / "report.json").write_text((copy / "report.json").read_text().replace('"passed": true', '"passed": false', 1))
    for use in (read_record, lambda path: write_again(path, tmp_path / "page.html")):
        with pytest.raises(GateError, match="report.json"):
            use(copy)
    assert not (tmp_path / "page.html").exists()


def test_sizes_quality_and_cost_stand_side_by_side(bundles):
    first, second = (read_record(bundle.folder) for bundle in bundles)
    found = compare(first, second)
    whole = {(entry["row"], entry["number"]): entry for entry in found["whole"]}
    entry = whole["onnx_static_int8", "size on disk"]
    assert (entry["a"], entry["b"], entry["ratio"]) == (first.artifacts[1].bytes, second.artifacts[1].bytes, 1.0)
    assert whole["pruned model", "perplexity"]["a"] == 31.25 and whole["stage recover", "time"]["ratio"] == 2.0
    assert whole["tflite_fp32", "top-1"]["ratio"] is None, "agreements are no quantities of which one has twice as much"
    assert found["settings"] == [{"key": "name", "a": "tiny", "b": "other"}, {"key": "prune.ffn", "a": 0.5, "b": 0.25}]
    assert found["differences"] and found["only"] == []


def test_what_only_one_has_is_told(bundles):
    first = read_record(bundles[0].folder)
    fewer = first.model_copy(update={"artifacts": first.artifacts[1:], "stages": first.stages[:-1]})
    found = compare(first, fewer)
    gone = next(entry for entry in found["whole"] if entry["row"] == "onnx_fp32")
    assert gone["a"] == first.artifacts[0].bytes and gone["b"] is None and gone["ratio"] is None
    assert "only in A: onnx_fp32 in onnxruntime on local, 2 threads" in found["only"]


def test_what_does_not_compare_is_said(bundles):
    first = json.loads(report_json(read_record(bundles[0].folder)))
    demo = json.loads(DEMO_REPORT.read_text())
    assert notes(demo, demo) == []
    assert [note.split(":")[0] for note in notes(first, demo)] == [
        "the dense models are different ones",
        "they were judged on different text",
    ]
    assert flat({"a": 1, "b": {"c": {"d": 2}}}) == {"a": 1, "b.c.d": 2}


@pytest.mark.parametrize(("screen", "scheme"), SCREENS, ids=SCREEN_NAMES)
def test_the_page_shows_both_with_the_records_numbers(browser, bundles, tmp_path, screen, scheme):
    records = read_record(bundles[0].folder), read_record(DEMO_REPORT)
    found = compare(*records)
    with opened(browser, written(tmp_path, comparison_html(records, found)), screen, scheme) as (page, faults):
        assert page.locator("h1").inner_text() == "A: tiny, B: demo"
        assert faults_of_layout(page) == []
        open_details(page)
        assert faults_of_layout(page) == [] and faults == []
        data = {side: json.loads(report_json(record)) for side, record in zip("ab", records, strict=True)}
        assert faults_of_numbers(page, {**data, "compared": found}) == []
        paths = {marks["path"].split(".")[0] for marks, _ in numbers_on(page)}
        assert paths == {"a", "b", "compared"}
        assert page.locator("header td:first-child").all_inner_texts() == [
            "size on disk", "download", "perplexity", "first token", "tokens/s", "peak memory",
        ]  # fmt: skip
        assert "they were judged on different text" in page.inner_text("header")


def test_records_of_devices_have_a_page_too(browser, tmp_path):
    report = device_report("tiny", fake_outcome(fake_road(tmp_path / "road")))
    found = compare(report, report)
    with opened(browser, written(tmp_path, comparison_html((report, report), found)), *SCREENS[0]) as (page, faults):
        data = json.loads(report.model_dump_json())
        assert faults_of_numbers(page, {"a": data, "b": data, "compared": found}) == [] and faults_of_layout(page) == [] and faults == []
    with opened(browser, written(tmp_path, device_report_html(report)), *SCREENS[0]) as (page, faults):
        assert faults_of_numbers(page, data) == [] and faults_of_layout(page) == [] and faults == []


def test_the_command_prints_tables_and_writes_the_page(bundles, tmp_path):
    names = (str(bundles[0].folder), str(bundles[1].archive))
    done = pocketlm(tmp_path, "compare", *names, "--html", "side/by-side.html")
    assert done.returncode == 0, done.stderr
    for words in ("prune.ffn", "stage recover", "2.00 ×", "other numbers of models", "first_token_ms", "side/by-side.html"):
        assert words in done.stdout
    assert "download" not in done.stdout, "what is equal is only counted"
    assert "A: tiny, B: other" in (tmp_path / "side" / "by-side.html").read_text()
    found = json.loads(pocketlm(tmp_path, "compare", *names, "--json").stdout)
    assert found.keys() == {"differences", "only", "whole", "settings", "notes"}
    refused = pocketlm(tmp_path, "compare", names[0], "nowhere")
    assert refused.returncode == 2 and "nowhere: cannot be read" in refused.stderr


def test_a_report_made_again_has_the_same_bytes(bundles, tmp_path):
    for path in (bundles[0].folder, bundles[0].archive, bundles[0].folder / "report.json"):
        found = write_again(path, tmp_path / "again.html")
        assert found.same is True and found.page.read_bytes() == (bundles[0].folder / "report.html").read_bytes()
    assert write_again(DEMO_REPORT, tmp_path / "demo.html").same is None
    record = tmp_path / "tiny-devices.json"
    report = device_report("tiny", fake_outcome(fake_road(tmp_path / "road")))
    write_device_report(report, record, "another page")
    assert write_again(record, None).page == tmp_path / "tiny-devices.html"
    assert (tmp_path / "tiny-devices.html").read_text() == device_report_html(report)


def test_a_report_made_again_never_changes_a_bundle(bundles, tmp_path):
    copy = tmp_path / "some-android-bundle"
    shutil.copytree(bundles[0].folder, copy)
    before = {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()}
    assert write_again(copy, None).page == tmp_path / "some-android-bundle-report.html"
    for out in (copy / "report.html", copy / "onnx" / "new.html"):
        with pytest.raises(UserError, match="lies in a bundle"):
            write_again(copy, out)
    assert {path: path.read_bytes() for path in copy.rglob("*") if path.is_file()} == before


def test_the_report_command_says_where_and_whether_it_is_the_same(bundles, tmp_path):
    done = pocketlm(tmp_path, "report", str(bundles[0].archive), "--out", "page.html")
    assert done.returncode == 0 and done.stdout == "page.html\n" and "the same bytes as the bundle's own page" in done.stderr
    assert json.loads(pocketlm(tmp_path, "report", str(DEMO_REPORT), "--out", "x.html", "--json").stdout) == {
        "page": "x.html",
        "same": None,
    }
    (tmp_path / "file").write_text("")
    refused = pocketlm(tmp_path, "report", str(DEMO_REPORT), "--out", "file/x.html")
    assert refused.returncode == 2 and "file/x.html: cannot be written" in refused.stderr and not list(tmp_path.rglob("*.draft"))
