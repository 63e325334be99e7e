"""The page of a comparison: two bundles, or two records of device tests, side by side."""

import json
from pathlib import Path

from pipeline.device_report import DeviceReport, write_whole
from pipeline.report import Report, report_json
from pipeline.report_headline import lines
from pipeline.report_html import page
from pipeline.report_numbers import Numbers
from pipeline.report_plots import latency_plot, quality_plot

FORMS = {
    "load_ms": "milliseconds", "first_token_ms": "milliseconds", "decode_ms_p50": "milliseconds", "decode_ms_p99": "milliseconds",
    "decode_tokens_per_s": "rate", "peak_rss_mb": "mb", "max_abs_diff": "scientific", "top1": "agreement",
}  # fmt: skip
NAMES = {
    "load_ms": "load", "first_token_ms": "first token", "decode_ms_p50": "per token p50", "decode_ms_p99": "per token p99",
    "decode_tokens_per_s": "tokens/s", "peak_rss_mb": "peak memory", "max_abs_diff": "largest difference", "top1": "top-1",
}  # fmt: skip
SIDES = ("a", "b")


def comparison_html(records: tuple[Report | DeviceReport, Report | DeviceReport], found: dict) -> str:
    """The page as text. ``found`` is what `pipeline.compare.compare` says of the two."""
    reports = [json.loads(report_json(each) if isinstance(each, Report) else each.model_dump_json()) for each in records]
    data = {**dict(zip(SIDES, reports, strict=True)), "compared": found}
    both = all(isinstance(each, Report) for each in records)
    numbers = {side: Numbers(data[side], f"{side}.") for side in SIDES}
    return page(
        "compare.html.j2",
        data,
        both=both,
        titles={side: data[side]["model"]["name"] if "model" in data[side] else data[side]["name"] for side in SIDES},
        lines={side: lines(data[side]) for side in SIDES},
        latency_plots={side: latency_plot(numbers[side]) for side in SIDES},
        quality_plots={side: quality_plot(numbers[side]) for side in SIDES} if both else {},
        forms=FORMS,
        names=NAMES,
    )


def write_comparison(records: tuple[Report | DeviceReport, Report | DeviceReport], found: dict, place: Path) -> None:
    """The page at ``place``, whole or not at all."""
    write_whole(place, comparison_html(records, found))
