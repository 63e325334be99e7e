"""The record of one artifact in one runtime on one device, as written to result.json."""

from __future__ import annotations

import json
import math
import os
import platform
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from device_tests.errors import DeviceTestError
from device_tests.quality import Quality
from device_tests.replay import Replay
from device_tests.timing import Timing


@dataclass(frozen=True)
class DeviceRecord:
    """One row of a report's ``devices``. Times in ms, memory in MB (10^6 bytes), None where not measured or not reached.

    ``greedy_prefix`` of ``greedy_tokens`` is the shortest of ``greedy_prefixes``; ``max_abs_diff``, ``kl`` and ``top1`` are on
    ``golden_tokens`` golden tokens. ``load_ms`` is with the file in the page cache and the runtime's library imported,
    ``load_cold_ms`` with the file on storage only. ``first_token_ms`` is after a prompt of ``prompt_tokens``; ``prompts`` has all
    lengths that were timed. ``conditions`` are temperature, clock and governor ``before``, ``during`` and ``after``; ``emulated``:
    no real processor of this kind, so nothing was timed. ``notes`` say what a reader must know of these numbers. From ``rounds``
    to ``against_local`` the machine that drives the devices fills in.
    """

    device: str
    isa: str | None
    runtime: str
    runtime_version: str | None
    threads: int
    emulated: bool = False
    load_cold_ms: float | None = None
    load_ms: float | None = None
    first_token_ms: float | None = None
    first_token_cold_ms: float | None = None
    first_token_samples_ms: list[float] = field(default_factory=list)
    prompt_tokens: int | None = None
    prompts: list[dict[str, Any]] = field(default_factory=list)
    decode_ms_p50: float | None = None
    decode_ms_p90: float | None = None
    decode_ms_p99: float | None = None
    decode_ms: list[float] = field(default_factory=list)
    prefill_tokens_per_s: float | None = None
    decode_tokens_per_s: float | None = None
    host_us_per_token: float | None = None
    baseline_rss_mb: float | None = None
    load_rss_mb: float | None = None
    peak_rss_mb: float | None = None
    max_abs_diff: float | None = None
    kl: float | None = None
    top1: float | None = None
    golden_tokens: int | None = None
    greedy_prefix: int | None = None
    greedy_prefixes: list[int] = field(default_factory=list)
    greedy_tokens: int | None = None
    environment: dict[str, str] = field(default_factory=dict)
    conditions: dict[str, dict[str, Any]] = field(default_factory=dict)
    rounds: list[dict[str, Any]] = field(default_factory=list)
    bytes_read_per_token: int | None = None
    read_gb_s: float | None = None
    bandwidth_gb_s: float | None = None
    bandwidth_share: float | None = None
    against_local: dict[str, Any] | None = None
    notes: list[str] = field(default_factory=list)
    passed: bool = False
    failures: list[str] = field(default_factory=list)


def environment() -> dict[str, str]:
    """What may change a number besides the artifact: kernel, C library, Python, numpy, logical CPUs that may be used."""
    libc, version = platform.libc_ver()
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "kernel": f"{platform.system()} {platform.release()}",
        "libc": f"{libc} {version}".strip(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "cpus": str(affinity),
    }


def timing_fields(timing: Timing) -> dict[str, Any]:
    """The record's fields that come from timing."""
    p50, p90, p99 = (float(value) for value in np.percentile(timing.decode_ms, (50, 90, 99)))
    throttled = [when for when, state in timing.conditions.items() if state.get("throttled")]
    return {
        "load_ms": timing.load_ms,
        "first_token_ms": timing.first.ms,
        "first_token_cold_ms": timing.first.cold_ms,
        "first_token_samples_ms": timing.first.samples_ms,
        "prompt_tokens": timing.first.tokens,
        "prefill_tokens_per_s": timing.first.tokens_per_s,
        "prompts": [{**asdict(prompt), "tokens_per_s": prompt.tokens_per_s} for prompt in timing.prompts],
        "decode_ms": timing.decode_ms,
        "decode_ms_p50": p50,
        "decode_ms_p90": p90,
        "decode_ms_p99": p99,
        "decode_tokens_per_s": timing.decode_tokens_per_s,
        "host_us_per_token": timing.host_us_per_token,
        "baseline_rss_mb": timing.baseline_rss_mb,
        "load_rss_mb": timing.load_rss_mb,
        "peak_rss_mb": timing.peak_rss_mb,
        "conditions": timing.conditions,
        "notes": [f"the processor was throttled {' and '.join(throttled)} the measurement: times are not its best"] if throttled else [],
    }


def replay_fields(replay: Replay) -> dict[str, Any]:
    """The record's fields that come from the golden vectors."""
    return {
        "max_abs_diff": replay.max_abs_diff,
        "kl": max(0.0, replay.kl.value),  # rounding can leave -1e-17
        "top1": replay.top1,
        "golden_tokens": replay.tokens,
        "greedy_prefix": replay.greedy_prefix,
        "greedy_prefixes": replay.greedy_prefixes,
        "greedy_tokens": replay.greedy_tokens,
    }


def quality_record(quality: Quality) -> dict[str, Any]:
    """The ``quality`` of an artifact as JSON values."""
    return {
        "perplexity": quality.perplexity.value,
        "perplexity_stderr": quality.perplexity.stderr,
        "perplexity_change": quality.perplexity_change.value,
        "perplexity_change_stderr": quality.perplexity_change.stderr,
        "perplexity_change_dense": quality.perplexity_change_dense.value,
        "perplexity_change_dense_stderr": quality.perplexity_change_dense.stderr,
        "kl": max(0.0, quality.kl.value),  # the reference travels in float32: equal models can come out at -1e-8
        "kl_stderr": quality.kl.stderr,
        "top1": quality.top1.value,
        "top1_stderr": quality.top1.stderr,
        "tokens": quality.tokens,
        "worst_window": quality.worst_window,
        "worst_token": asdict(quality.worst),
    }


def write_result(path: Path, record: dict[str, Any]) -> None:
    """Write whole or not at all. NaN and infinity, which JSON does not have, become null. DeviceTestError without room."""
    draft = path.with_name(path.name + ".draft")
    try:
        draft.write_text(json.dumps(_plain(record), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(draft, path)
    except OSError as error:
        raise DeviceTestError(f"{path}: cannot be written ({error.strerror}); give another --out") from error


def _plain(value: Any) -> Any:
    """JSON values: rounded to six significant digits, which is more than any clock or fp32 difference holds."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
