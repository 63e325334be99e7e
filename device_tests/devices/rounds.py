"""Several timings of one artifact, each in a fresh process, as one record: medians, with every round kept for the spread."""

from __future__ import annotations

import statistics
from typing import Any

TIMED = (
    "load_cold_ms", "load_ms", "first_token_ms", "first_token_cold_ms", "decode_ms_p50", "decode_ms_p90", "decode_ms_p99",
    "prefill_tokens_per_s", "decode_tokens_per_s", "host_us_per_token", "baseline_rss_mb", "load_rss_mb", "peak_rss_mb",
)  # fmt: skip


def numbers_of(device: dict[str, Any]) -> dict[str, Any]:
    """What was timed in one round, and the time to the first token by prompt length."""
    prompts = {str(prompt["tokens"]): prompt["ms"] for prompt in device["prompts"]}
    return {**{name: device[name] for name in TIMED}, "first_token_ms_by_prompt": prompts}


def merged(results: list[dict[str, Any]]) -> dict[str, Any]:
    """The first result with medians over all ``results`` in place of its times, and ``rounds`` as they were.

    A later round that failed makes the result fail, by its own words.
    """
    first, devices = results[0], [result["device"] for result in results]
    failures = list(dict.fromkeys(failure for device in devices for failure in device["failures"]))
    notes = list(dict.fromkeys(note for device in devices for note in device["notes"]))
    timed = [device for device in devices if device["decode_tokens_per_s"]]
    medians = {name: median([device[name] for device in timed]) for name in TIMED} if timed else {}
    prompts = [with_median(prompt, timed) for prompt in devices[0]["prompts"]]
    device = {**devices[0], **medians, "prompts": prompts, "rounds": [numbers_of(device) for device in timed]}
    return {**first, "device": {**device, "notes": notes, "failures": failures, "passed": not failures}}


def with_median(prompt: dict[str, Any], timed: list[dict[str, Any]]) -> dict[str, Any]:
    """The prompt of the first round with its time the median over all rounds."""
    alike = [other for device in timed for other in device["prompts"] if other["tokens"] == prompt["tokens"]]
    ms = statistics.median(other["ms"] for other in alike)
    return {
        **prompt,
        "ms": ms,
        "cold_ms": statistics.median(other["cold_ms"] for other in alike),
        "tokens_per_s": prompt["tokens"] / ms * 1000,
    }


def median(values: list[float | None]) -> float | None:
    """Of those that were measured; None without any."""
    measured = [value for value in values if value is not None]
    return statistics.median(measured) if measured else None
