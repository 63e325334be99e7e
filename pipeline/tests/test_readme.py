"""The README's tables come out of records of runs, and this machine's newest run agrees with them."""

import json

import pytest

from models.errors import UserError
from pipeline.bench_record import FP32
from pipeline.bench_rows import TORCH
from pipeline.bench_sizes import DEMO_SIZE
from pipeline.readme import BENCH, FRESH, README, REPORT, rendered, with_block


def test_tables_are_what_the_records_say():
    text = README.read_text(encoding="utf-8")
    assert rendered(text) == text, "`make readme` writes the tables again"
    assert "| onnx_static_int8 |" in text and "PyTorch eager fp32" in text


def test_records_are_of_passing_runs():
    assert json.loads(REPORT.read_text())["passed"]
    demo = json.loads(BENCH.read_text())["sizes"][DEMO_SIZE]
    assert {row["threads"] for row in demo["rows"]} == set(demo["threads"])
    assert {TORCH, FP32} <= {row["row"] for row in demo["rows"] if not row["failure"]}


@pytest.mark.skipif(not FRESH[REPORT].is_file(), reason="no bundle of the demo model was built here yet")
def test_the_bundle_built_here_is_the_one_that_the_readme_tells_of():
    kept, fresh = (json.loads(path.read_text()) for path in (REPORT, FRESH[REPORT]))
    assert fresh["model"]["parameters"] == kept["model"]["parameters"], "the demo model changed: `make android-bundle readme`"
    assert fresh["reference"]["perplexity"] == pytest.approx(kept["reference"]["perplexity"], rel=1e-3)
    assert fresh["pruned"]["perplexity"] == pytest.approx(kept["pruned"]["perplexity"], rel=0.02)
    for old, new in zip(kept["artifacts"], fresh["artifacts"], strict=True):
        assert new["name"] == old["name"] and new["bytes"] == pytest.approx(old["bytes"], rel=0.01)
        # Training sums in another order on other processors: the same road, not the same last digit.
        assert new["quality"]["perplexity_change"] == pytest.approx(old["quality"]["perplexity_change"], abs=2e-3)


def test_a_readme_without_marks_is_told():
    with pytest.raises(UserError, match="results"):
        with_block("no marks here", "results", "x")
