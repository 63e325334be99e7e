"""From single runs to the benchmark's record: medians, spreads, bandwidth, and what int8 must be."""

import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field

from pipeline.bench_rows import Row

FP32 = "onnx_fp32 in onnxruntime"
MAIN_PROMPT_TOKENS = 128  # decoding goes on from this prompt, prefill speed is told of it
OTHER_PROMPTS_TOKENS = (32, 512)
MUST_BE_FASTER = {
    "onnx_static_int8 in onnxruntime": "onnx_fp32 in onnxruntime",
    "tflite_static_int8 in litert": "tflite_fp32 in litert",
}
LARGEST_SHARE_OF_FP32_BYTES = 0.28


@dataclass
class Runs:
    """What one row gave at one number of threads, round by round; ``failure`` ends it. The only thing here that grows."""

    row: Row
    threads: int
    rounds: list[dict] = field(default_factory=list)
    failure: str | None = None
    quality: dict | None = None
    wall_s: list[float] = field(default_factory=list)


def kept(timing: dict) -> dict:
    """What is told of one run: milliseconds, MB of 10^6 bytes, tokens per second."""
    return {
        "load_ms": timing["load_ms"],
        "first_token_ms": {str(prompt["tokens"]): prompt["ms"] for prompt in timing["prompts"]},
        "decode_tokens_per_s": timing["decode_tokens_per_s"],
        "peak_rss_mb": timing["peak_rss_mb"],
    }


def row_record(runs: Runs, bandwidth_gb_s: float | None) -> dict:
    """Medians over the rounds of one row. ``*_spread`` is (largest - smallest) / median; all None where no round was finished."""
    row, rounds = runs.row, runs.rounds
    record = {
        "row": row.label, "group": row.group, "threads": runs.threads, "version": row.version, "bytes": row.bytes,
        "bytes_read_per_token": row.bytes_read_per_token, "failure": row.missing or runs.failure,
        "notes": list(dict.fromkeys([*row.notes, *(note for timing in rounds for note in timing.get("notes", []))])),
    }  # fmt: skip
    first = {tokens: median(timing["first_token_ms"][tokens] for timing in rounds) for tokens in prompts_of(rounds)}
    main = str(MAIN_PROMPT_TOKENS) if str(MAIN_PROMPT_TOKENS) in first else max(first, key=int, default=None)
    decode = median(timing["decode_tokens_per_s"] for timing in rounds)
    read = decode * row.bytes_read_per_token / 1e9 if decode and row.bytes_read_per_token else None
    return {
        **record,
        "first_token_ms": first,
        "first_token_spread": spread(timing["first_token_ms"][main] for timing in rounds),
        "prefill_tokens_per_s": int(main) / first[main] * 1000 if main else None,
        "decode_tokens_per_s": decode,
        "decode_spread": spread(timing["decode_tokens_per_s"] for timing in rounds),
        "load_ms": median(timing["load_ms"] for timing in rounds),
        "peak_rss_mb": median(timing["peak_rss_mb"] for timing in rounds),
        "read_gb_s": read,
        "bandwidth_share": read / bandwidth_gb_s if read and bandwidth_gb_s else None,
        "quality": runs.quality,
        "rounds": [{key: value for key, value in timing.items() if key != "notes"} for timing in rounds],
    }


def prompts_of(rounds: list[dict]) -> list[str]:
    """Prompt lengths that every round has, shortest first."""
    shared = set.intersection(*(set(timing["first_token_ms"]) for timing in rounds)) if rounds else set()
    return sorted(shared, key=int)


def median(values: Iterable[float | None]) -> float | None:
    """None of nothing."""
    found = [value for value in values if value is not None]
    return statistics.median(found) if found else None


def spread(values: Iterable[float]) -> float | None:
    """(largest - smallest) / median; None of nothing."""
    found = list(values)
    return (max(found) - min(found)) / statistics.median(found) if found else None


def by_name(rows: list[dict]) -> dict[tuple[str, int], dict]:
    """Rows by label and threads."""
    return {(row["row"], row["threads"]): row for row in rows}


def times_as_fast(row: dict, other: dict | None, phase: str, tokens: str | None = None) -> float | None:
    """How many times as fast ``row`` is as ``other`` in ``first_token`` (after ``tokens``) or ``decode``; None where one has no time."""
    if other is None:
        return None
    if phase == "decode":
        mine, theirs = row["decode_tokens_per_s"], other["decode_tokens_per_s"]
        return mine / theirs if mine and theirs else None
    mine, theirs = row["first_token_ms"].get(tokens), other["first_token_ms"].get(tokens)
    return theirs / mine if mine and theirs else None


def main_prompt(rows: list[dict]) -> str | None:
    """The prompt length that the rows' times are compared at."""
    lengths = {tokens for row in rows for tokens in row["first_token_ms"]}
    return str(MAIN_PROMPT_TOKENS) if str(MAIN_PROMPT_TOKENS) in lengths else max(lengths, key=int, default=None)


def missed(size: dict) -> list[str]:
    """What int8 promises and does not hold in this run: faster than its fp32 sibling in both phases, and far smaller."""
    rows, lines = by_name(size["rows"]), []
    tokens = main_prompt(size["rows"])
    for int8, fp32 in MUST_BE_FASTER.items():
        for threads in size["threads"]:
            small, large = rows.get((int8, threads)), rows.get((fp32, threads))
            if small is None or large is None:  # left out by --only
                continue
            ratios = {
                "first token": times_as_fast(small, large, "first_token", tokens),
                "decode": times_as_fast(small, large, "decode"),
            }
            where = f"{size['name']}: {int8}, {threads} threads"
            lines += [f"{where}: no result: {row['failure']}" for row in (small, large) if row["failure"]]
            lines += [f"{where}: {phase} {ratio:.2f} x fp32, must be over 1" for phase, ratio in ratios.items() if ratio and ratio <= 1]
        if small is not None and large is not None and small["bytes"] and large["bytes"]:
            share = small["bytes"] / large["bytes"]
            if share >= LARGEST_SHARE_OF_FP32_BYTES:
                lines.append(f"{size['name']}: {int8}: {share:.3f} of the bytes of fp32, must be under {LARGEST_SHARE_OF_FP32_BYTES}")
    return lines
