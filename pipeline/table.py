"""A report as one table: the same rows for the terminal and for the README."""

from rich.table import Table

COLUMNS = (
    "artifact",
    "runtime",
    "MB",
    "MB download",
    "perplexity change",
    "top-1",
    "first token ms",
    "ms/token p50",
    "tokens/s",
    "peak MB",
    "verdict",
)


def rows(report: dict) -> list[tuple[str, ...]]:
    """One row per artifact and runtime of a ``report.json``; bytes in 10^6 on disk and after deflate, a dash for what was not measured."""
    found = []
    for artifact in report["artifacts"]:
        quality = artifact["quality"] or {}
        sizes = (f"{artifact['bytes'] / 1e6:.1f}", f"{artifact['bytes_compressed'] / 1e6:.1f}")
        for device in artifact["devices"]:
            numbers = (
                shown(quality.get("perplexity_change"), "+.3%"),
                shown(quality.get("top1"), ".2%"),
                shown(device["first_token_ms"], ".1f"),
                shown(device["decode_ms_p50"], ".2f"),
                shown(device["decode_tokens_per_s"], ".0f"),
                shown(device["peak_rss_mb"], ".0f"),
            )
            runtime = f"{device['runtime']} {device['runtime_version'] or ''}".strip()
            verdict = "passed" if device["passed"] else "FAILED"
            found.append((artifact["name"], runtime, *sizes, *numbers, verdict))
    return found


def shown(value: float | None, form: str) -> str:
    """A number in ``form``, or a dash where there is none."""
    return "-" if value is None else format(value, form)


def price(report: dict) -> str:
    """What pruning and recovery cost, in one line."""
    reference, pruned = report["reference"], report["pruned"]
    change = pruned["perplexity"] / reference["perplexity"] - 1
    how = " Recovery diverged and was stopped; the best model before that was kept." if report["recovery"]["diverged"] else ""
    return (
        f"Dense model: {report['model']['parameters'] / 1e6:.2f} M parameters, perplexity {reference['perplexity']:.3f} "
        f"± {reference['perplexity_stderr']:.3f} over {reference['tokens']} tokens. "
        f"Pruned and recovered: {pruned['parameters'] / 1e6:.2f} M parameters, perplexity {pruned['perplexity']:.3f} ({change:+.1%}).{how}"
    )


def table_of(columns: tuple[str, ...], lines: list[tuple[str, ...]], caption: str) -> Table:
    """A table for the terminal: numbers to the right, failures in red."""
    table = Table(caption=caption, caption_justify="left")
    words = ("artifact", "runtime", "row", "verdict")
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line, style="red" if "FAILED" in line else None)
    return table


def markdown(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ("---",) * len(columns), *lines))
