"""What the benchmark has to reach, held against what it measured: reached or not, and by how much it was missed."""

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from pipeline.bench_record import MAIN_PROMPT_TOKENS, by_name, times_as_fast

TARGETS = Path(__file__).parent / "presets" / "bench_targets.toml"
VERDICT_COLUMNS = ("row", "against", "size", "threads", "what", "target", "measured", "verdict")
WORDS = {
    "first_token": "first token, times as fast",
    "decode": "decode, times as fast",
    "memory": "peak memory, share",
    "bandwidth": "decode, share of memory bandwidth",
    "perplexity": "perplexity change",
    "perplexity_over": "perplexity change less that of the other",
}
FORMS = {"bandwidth": ".0%", "perplexity": "+.3%", "perplexity_over": "+.3%"}


@dataclass(frozen=True)
class Target:
    """A limit of one row, against another row or by itself; ``threads`` are the numbers of threads that it holds at."""

    row: str
    size: str
    measure: str
    threads: tuple[int, ...]
    against: str | None = None
    against_size: str | None = None
    at_least: float | None = None
    at_most: float | None = None


@dataclass(frozen=True)
class Verdict:
    """``value`` None: not measured, and ``why``. ``short_by`` is how far it is from the limit as a fraction of it, 0 when reached."""

    target: Target
    threads: int
    value: float | None
    reached: bool | None
    short_by: float | None
    why: str = ""


@cache
def targets() -> tuple[Target, ...]:
    """All targets, in the order of the file."""
    found = tomllib.loads(TARGETS.read_text(encoding="utf-8"))
    return tuple(Target(**{**entry, "threads": tuple(entry.get("threads", found["threads"]))}) for entry in found["target"])


def verdicts(sizes: dict[str, dict]) -> list[Verdict]:
    """Every target at each of its numbers of threads."""
    return [verdict(target, threads, sizes) for target in targets() for threads in target.threads]


def verdict(target: Target, threads: int, sizes: dict[str, dict]) -> Verdict:
    """One target at one number of threads."""
    row, why = found_row(sizes, target.size, target.row, threads)
    other, other_why = None, ""
    if target.against:
        other, other_why = found_row(sizes, target.against_size or target.size, target.against, threads)
    if why or other_why:
        return Verdict(target, threads, None, None, None, why or other_why)
    value = measured(target, row, other)
    if value is None:
        return Verdict(target, threads, None, None, None, "a row has no such number")
    limit = target.at_least if target.at_least is not None else target.at_most
    reached = value >= limit if target.at_least is not None else value <= limit
    return Verdict(target, threads, value, reached, 0.0 if reached else abs(value - limit) / abs(limit) if limit else abs(value - limit))


def found_row(sizes: dict[str, dict], size: str, label: str, threads: int) -> tuple[dict | None, str]:
    """The row, or why there is none to judge."""
    if size not in sizes:
        return None, f"size {size} was not measured"
    row = by_name(sizes[size]["rows"]).get((label, threads))
    if row is None:
        return None, f"no row {label} at {threads} threads"
    return (None, f"{label}: {row['failure']}") if row["decode_tokens_per_s"] is None else (row, "")


def measured(target: Target, row: dict, other: dict | None) -> float | None:
    """The number that the target limits."""
    if target.measure in ("first_token", "decode"):
        return times_as_fast(row, other, target.measure, str(MAIN_PROMPT_TOKENS))
    if target.measure == "memory":
        return row["peak_rss_mb"] / other["peak_rss_mb"] if row["peak_rss_mb"] and other["peak_rss_mb"] else None
    if target.measure == "bandwidth":
        return row["bandwidth_share"]
    changes = [None if each is None or each["quality"] is None else each["quality"]["perplexity_change"] for each in (row, other)]
    if target.measure == "perplexity":
        return changes[0]
    if target.measure == "perplexity_over":
        return None if None in changes else changes[0] - changes[1]
    raise ValueError(f"{target.measure}: no such measure; bench_targets.toml says which there are")


def verdict_rows(found: list[Verdict]) -> list[tuple[str, ...]]:
    """The verdicts as text."""
    lines = []
    for each in found:
        target = each.target
        form = FORMS.get(target.measure, ".2f")
        bound = f"at least {target.at_least:{form}}" if target.at_least is not None else f"at most {target.at_most:{form}}"
        size = f"{target.size} against {target.against_size}" if target.against_size else target.size
        value = "-" if each.value is None else format(each.value, form)
        lines.append((target.row, target.against or "-", size, str(each.threads), WORDS[target.measure], bound, value, told(each)))
    return lines


def told(each: Verdict) -> str:
    """The verdict in words."""
    if each.reached is None:
        return f"not measured: {each.why}"
    if each.reached:
        return "reached"
    limit = each.target.at_least if each.target.at_least is not None else each.target.at_most
    return f"missed by {each.short_by:.0%}" if limit else f"missed by {each.short_by:.3%}"
