"""Targets: reached, missed and by how much, or not measured and why; and each names rows that there can be."""

import pytest

from pipeline.bench_record import Runs, row_record
from pipeline.bench_rows import TORCH, Row, labels_of
from pipeline.bench_sizes import table
from pipeline.bench_targets import Target, targets, told, verdict, verdict_rows
from pipeline.peers.table import peers
from pipeline.stages import ARTIFACT_OF_STAGE


def row(label: str, first_ms: float, rate: float, change: float | None = None, peak_mb: float = 100.0) -> dict:
    timing = {"first_token_ms": {"128": first_ms}, "decode_tokens_per_s": rate, "load_ms": 1.0, "peak_rss_mb": peak_mb}
    quality = None if change is None else {"perplexity_change": change}
    return row_record(Runs(Row(label, "ours", bytes_read_per_token=10**8), 1, [timing], quality=quality), 20.0)


SIZES = {
    "139m": {"rows": [row("ours", 50.0, 150.0, 0.0004, 60.0), row("theirs", 150.0, 100.0, 0.0002)]},
    "half": {"rows": [row("ours", 30.0, 300.0)]},
}


@pytest.mark.parametrize(
    ("given", "value", "words"),
    [
        ({"measure": "first_token", "at_least": 3.0, "against": "theirs"}, 3.0, "reached"),
        ({"measure": "decode", "at_least": 2.0, "against": "theirs"}, 1.5, "missed by 25%"),
        ({"measure": "memory", "at_most": 0.5, "against": "theirs"}, 0.6, "missed by 20%"),
        ({"measure": "bandwidth", "at_least": 0.85}, 0.75, "missed by 12%"),
        ({"measure": "perplexity", "at_most": 0.001}, 0.0004, "reached"),
        ({"measure": "perplexity_over", "at_most": 0.0, "against": "theirs"}, 0.0002, "missed by 0.020%"),
        ({"measure": "decode", "at_least": 2.0, "against": "ours", "size": "half", "against_size": "139m"}, 2.0, "reached"),
        ({"measure": "decode", "at_least": 2.0, "against": "nobody"}, None, "not measured: no row nobody at 1 threads"),
        ({"measure": "decode", "at_least": 2.0, "size": "7b"}, None, "not measured: size 7b was not measured"),
    ],
)
def test_verdicts(given, value, words):
    found = verdict(Target(**{"row": "ours", "size": "139m", "threads": (1,), **given}), 1, SIZES)
    assert found.value == (None if value is None else pytest.approx(value)) and told(found) == words


def test_a_row_without_a_result_is_not_judged():
    broken = row_record(Runs(Row("ours", "ours", missing="not made: no memory"), 1), None)
    found = verdict(Target("ours", "139m", "bandwidth", (1,), at_least=0.85), 1, {"139m": {"rows": [broken]}})
    assert told(found) == "not measured: ours: not made: no memory"


def test_every_target_names_rows_and_sizes_that_there_can_be():
    known = {label for artifact in ARTIFACT_OF_STAGE.values() for label in labels_of(artifact)} | {TORCH}
    known |= {f"{peer.title} {variant}" for peer in peers() for variant in peer.variants}
    for target in targets():
        assert {target.row, target.against or TORCH} <= known, target
        assert {target.size, target.against_size or "demo"} <= set(table())
        assert (target.at_least is None) != (target.at_most is None)
    assert len(verdict_rows([verdict(target, 1, {}) for target in targets()])) == len(targets())
