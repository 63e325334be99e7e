"""The benchmark's record as tables: for the terminal, for ``docs/bench/bench.md``, and for the README."""

import json
from pathlib import Path

from models.errors import UserError
from pipeline.bench_record import FP32, by_name, main_prompt, times_as_fast
from pipeline.bench_rows import PEER, TORCH
from pipeline.bench_targets import VERDICT_COLUMNS, verdict_rows, verdicts
from pipeline.peers.table import peers
from pipeline.table import markdown, shown

RECORD, PAGE = "bench.json", "bench.md"
BENCH_COLUMNS = (
    "row", "threads", "MB", "first token ms", "x PyTorch", "x fp32 ORT", "decode tokens/s", "x PyTorch", "x fp32 ORT", "spread", "peak MB",
)  # fmt: skip
STAGE_COLUMNS = ("stage", "seconds", "peak MB", "MB on disk")
RATIO_BASES = (TORCH, FP32)


def read_record(out: Path, record: str = RECORD) -> dict:
    """``bench.json``, or another ``record`` of sizes, of a folder; no sizes where there is none. UserError where it is none of ours."""
    path = out / record
    if not path.is_file():
        return {"sizes": {}}
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: cannot be read ({error}); remove it or give another --out") from error
    if not isinstance(found, dict) or not isinstance(found.get("sizes"), dict):
        raise UserError(f"{path}: is no record of sizes; remove it or give another --out")
    return found


def write_size(size: dict, out: Path, record: str = RECORD) -> dict:
    """Put one measured size in ``bench.json``, or another ``record``, beside those that are there; returns the whole record."""
    whole = read_record(out, record)
    whole["sizes"][size["name"]] = size
    out.mkdir(parents=True, exist_ok=True)
    draft = out / f"{record}.draft"
    draft.write_text(json.dumps(whole, indent=1) + "\n", encoding="utf-8")
    draft.replace(out / record)
    return whole


def full_columns(size: dict) -> tuple[str, ...]:
    """The columns of ``full_rows``."""
    return (
        "row", "threads", "MB read/token", *(f"first token ms, {tokens}" for tokens in prompts(size)), "prefill tokens/s",
        "decode tokens/s", "spread", "peak MB", "load ms", "GB/s", "of memory", "first x PyTorch", "first x fp32 ORT",
        "decode x PyTorch", "decode x fp32 ORT", "perplexity change", "no result because",
    )  # fmt: skip


def full_rows(size: dict) -> list[tuple[str, ...]]:
    """Every row with every column; a dash stands for what was not measured."""
    lines = []
    for row in size["rows"]:
        first = [shown(row["first_token_ms"].get(tokens), ".1f") for tokens in prompts(size)]
        speeds = [shown(row["prefill_tokens_per_s"], ".0f"), shown(row["decode_tokens_per_s"], ".1f"), shown(row["decode_spread"], ".0%")]
        costs = [shown(row["peak_rss_mb"], ".0f"), shown(row["load_ms"], ".0f")]
        read = [shown(row["read_gb_s"], ".2f"), shown(row["bandwidth_share"], ".0%")]
        change = shown(row["quality"]["perplexity_change"], "+.3%") if row["quality"] else "-"
        size_read = shown(row["bytes_read_per_token"] and row["bytes_read_per_token"] / 1e6, ".1f")
        named = (row["row"], str(row["threads"]), size_read)
        lines.append((*named, *first, *speeds, *costs, *read, *ratios(row, size), change, row["failure"] or ""))
    return lines


def ratios(row: dict, size: dict) -> list[str]:
    """Times as fast as eager PyTorch and as fp32 ONNX Runtime at the same threads: first token, then decode."""
    rows, tokens = by_name(size["rows"]), main_prompt(size["rows"])
    others = [rows.get((base, row["threads"])) for base in RATIO_BASES]
    first = [times_as_fast(row, other, "first_token", tokens) for other in others]
    decode = [times_as_fast(row, other, "decode") for other in others]
    return [shown(value, ".2f") for value in (*first, *decode)]


def prompts(size: dict) -> list[str]:
    """Every prompt length that some row was timed with, shortest first."""
    return sorted({tokens for row in size["rows"] for tokens in row["first_token_ms"]}, key=int)


def bench_rows(size: dict) -> list[tuple[str, ...]]:
    """The README's short table: rows that gave a result, first tokens after the main prompt."""
    tokens, lines = main_prompt(size["rows"]), []
    for row in size["rows"]:
        first = ratios(row, size)
        lines.append(
            (
                row["row"],
                str(row["threads"]),
                shown(row["bytes"] and row["bytes"] / 1e6, ".1f"),
                shown(row["first_token_ms"].get(tokens), ".2f"),
                *first[:2],
                shown(row["decode_tokens_per_s"], ".0f"),
                *first[2:],
                shown(row["decode_spread"], ".0%"),
                shown(row["peak_rss_mb"], ".0f"),
            )
        )
    return lines


def page(record: dict, plots: list[str]) -> str:
    """``bench.md``: targets, then every size with its table, its machine, and what it cost to make."""
    parts = [
        "# Speed, memory and quality, in one run per size",
        "Written by `make bench` from `bench.json` in this folder. Compare rows of one size only: other sizes were other runs.",
        "## What it has to reach",
        markdown(VERDICT_COLUMNS, verdict_rows(verdicts(record["sizes"]))),
        *(f"![{name}]({name})" for name in plots),
        *(part for size in record["sizes"].values() for part in section(size)),
    ]
    return "\n\n".join(parts) + "\n"


def section(size: dict) -> list[str]:
    """One size of the page."""
    notes = [f"- {row['row']}: {'; '.join(row['notes'])}" for row in size["rows"] if row["notes"] and row["threads"] == size["threads"][0]]
    costs = [stage_row(row) for row in size["stages"]]
    return [
        f"## {size['name']}",
        f"{size['about']}: {size['parameters'] / 1e6:.1f} M parameters. {size['how']}",
        machine(size),
        markdown(full_columns(size), full_rows(size)),
        *(["Notes:\n\n" + "\n".join(notes)] if notes else []),
        *(["What the stages of the road cost:", markdown(STAGE_COLUMNS, costs)] if costs else []),
    ]


def stage_row(row: dict) -> tuple[str, ...]:
    """What one stage cost; a dash for the disk where an older record does not tell."""
    return (row["stage"], f"{row['seconds']:.1f}", f"{row['peak_rss_mb']:.0f}", shown(row.get("disk_mb"), ".1f"))


def machine(size: dict) -> str:
    """The environment of the run in a few lines."""
    found = size["environment"]
    if found is None:
        return "What machine it was is not recorded."
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    told = [row for row in size["rows"] if row["group"] == PEER and row["version"]]
    theirs = {peer.title: row["version"] for peer in peers() for row in told if row["row"].startswith(f"{peer.title} ")}
    memory = ", ".join(f"{threads}: {shown(each['median'], '.1f')}" for threads, each in size["bandwidth_gb_s"].items())
    named = ", ".join(f"{name} {version}" for name, version in theirs.items())
    return (
        f"Measured {size['measured_at']} on {found['cpu'] or found['isa']}, {found['cores']} cores ({' '.join(found['cpu_flags'])}), "
        f"{shown(found['memory_mb'], '.0f')} MB of memory, {found['system']}, {found['kernel']}, Python {found['python']}; "
        f"{versions}{'; ' + named if named else ''}. Memory bandwidth in GB/s by threads: {memory}. "
        f"Load average of the last quarter of an hour when it ended: {found['load_average'][2]:.1f}."
    )
