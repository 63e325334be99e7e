"""Two bundles or records, side by side: what changed by more than the spread of repeated runs.

A number is called different only where the medians are further apart than the two ranges over the rounds are wide together: ranges of
few rounds are narrower than the truth, and that they merely do not overlap happens by chance once in ten times with three rounds
each. With a single round on either side there is no range, and nothing is called anything.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.compare_bundles import notes, settings_that_differ, whole
from pipeline.device_report import DeviceReport
from pipeline.report import Report, report_json
from pipeline.table import shown

COMPARE_COLUMNS = ("artifact", "runtime", "device", "number", "A", "B", "B / A", "spread A", "spread B", "finding")
TIMED = {
    "load_ms": ".2f", "first_token_ms": ".2f", "decode_ms_p50": ".3f", "decode_ms_p99": ".3f", "decode_tokens_per_s": ".1f",
    "peak_rss_mb": ".1f",
}  # fmt: skip
EXACT = {"max_abs_diff": ".3g", "top1": ".4f"}  # the same bytes on the same machine give the same numbers


@dataclass(frozen=True)
class Difference:
    """One number in both records. ``ranges`` are (least, most) over the rounds, None where there was one round only."""

    artifact: str
    runtime: str
    device: str
    number: str
    values: tuple[float | None, float | None]
    ranges: tuple[tuple[float, float] | None, tuple[float, float] | None]
    same_bytes: bool

    @property
    def finding(self) -> str:
        """What can be said of the two numbers."""
        first, second = self.values
        if first is None or second is None:
            return "not measured in both"
        if self.number in EXACT:
            return "equal" if first == second else "different"
        if None in self.ranges:
            return "one round: spread unknown"
        (low, high), (other_low, other_high) = self.ranges
        if abs(second - first) <= (high - low) + (other_high - other_low):
            return "within the spread"
        return "larger in B" if second > first else "smaller in B"


def compare(first: Report | DeviceReport, second: Report | DeviceReport) -> dict:
    """``differences`` of what both have measured, the lines ``only`` about what one of them has, and of two bundles the ``whole``, the
    ``settings`` that differ, and ``notes`` on what does not compare: all as JSON values."""
    records = [by_place(record.model_dump(mode="json")["artifacts"]) for record in (first, second)]
    both = [place for place in records[0] if place in records[1]]
    only = [
        f"only in {label}: {' in '.join(place[:2])} on {place[2]}, {place[3]} threads"
        for label, mine, other in (("A", *records), ("B", *records[::-1]))
        for place in mine
        if place not in other
    ]
    differences = [difference for place in both for difference in differences_at(place, *(record[place] for record in records))]
    found = {"differences": [as_record(difference) for difference in differences], "only": only, "whole": [], "settings": [], "notes": []}
    if isinstance(first, Report) and isinstance(second, Report):
        reports = tuple(json.loads(report_json(report)) for report in (first, second))
        found |= {"whole": whole(*reports), "settings": settings_that_differ(*reports), "notes": notes(*reports)}
    return found


def by_place(artifacts: list[dict]) -> dict[tuple, dict]:
    """Devices' entries by artifact, runtime, device and threads, each with the hash of its bytes."""
    return {
        (artifact["name"], device["runtime"], device["device"], device["threads"]): {**device, "sha256": artifact["sha256"]}
        for artifact in artifacts
        for device in artifact["devices"]
    }


def differences_at(place: tuple, first: dict, second: dict) -> Iterator[Difference]:
    """Every number of one place."""
    for number in (*TIMED, *EXACT):
        if first[number] is None and second[number] is None:
            continue
        ranges = tuple(range_of(device["rounds"], number) if number in TIMED else None for device in (first, second))
        yield Difference(*place[:3], number, (first[number], second[number]), ranges, first["sha256"] == second["sha256"])


def range_of(rounds: list[dict], number: str) -> tuple[float, float] | None:
    """Least and most over the rounds; None with fewer than two."""
    values = [entry[number] for entry in rounds if entry.get(number) is not None]
    return (min(values), max(values)) if len(values) > 1 else None


def as_record(difference: Difference) -> dict:
    first, second = difference.values
    return {
        "artifact": difference.artifact,
        "runtime": difference.runtime,
        "device": difference.device,
        "number": difference.number,
        "a": first,
        "b": second,
        "ratio": second / first if first and second is not None else None,
        "range_a": difference.ranges[0],
        "range_b": difference.ranges[1],
        "same_bytes": difference.same_bytes,
        "finding": difference.finding,
    }


def compare_rows(found: dict) -> list[tuple[str, ...]]:
    """The differences as text."""
    lines = []
    for entry in found["differences"]:
        form = {**TIMED, **EXACT}[entry["number"]]
        ranges = [f"{entry[key][0]:{form}}..{entry[key][1]:{form}}" if entry[key] else "-" for key in ("range_a", "range_b")]
        numbers = (shown(entry["a"], form), shown(entry["b"], form), shown(entry["ratio"], ".3f"))
        finding = entry["finding"] + ("" if entry["same_bytes"] else " (other bytes)")
        lines.append((entry["artifact"], entry["runtime"], entry["device"], entry["number"], *numbers, *ranges, finding))
    return lines
