"""A report as one table: the same rows for the terminal and for the README."""

from rich.table import Table

COLUMNS = (
    "artifact",
    "runtime",
    "device",
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
DEVICE_COLUMNS = (
    "artifact", "runtime", "device", "threads", "load ms cold", "warm", "first token ms", "ms/token p50", "p90", "p99", "tokens/s", "GB/s",
    "of memory", "peak MB", "difference", "top-1", "verdict",
)  # fmt: skip
MATRIX_COLUMNS = (
    "artifact", "runtime", "device", "isa", "rows bit-equal", "largest difference", "top-1", "perplexity change", "tokens", "verdict",
)  # fmt: skip
EMULATED = "emulated"  # stands where a time would


def rows(report: dict) -> list[tuple[str, ...]]:
    """One row per artifact, runtime and device of a ``report.json``; MB are 10^6 bytes, a dash stands for what was not measured."""
    found = []
    for artifact in report["artifacts"]:
        quality = artifact["quality"] or {}
        sizes = (f"{artifact['bytes'] / 1e6:.1f}", f"{artifact['bytes_compressed'] / 1e6:.1f}")
        agreement = (shown(quality.get("perplexity_change"), "+.3%"), shown(quality.get("top1"), ".2%"))
        for device in artifact["devices"]:
            forms = {"first_token_ms": ".1f", "decode_ms_p50": ".2f", "decode_tokens_per_s": ".0f", "peak_rss_mb": ".0f"}
            numbers = [timed(device, key, form) for key, form in forms.items()]
            found.append((artifact["name"], runtime_of(device), device["device"], *sizes, *agreement, *numbers, verdict(device)))
    return found


def device_rows(artifacts: list[dict]) -> list[tuple[str, ...]]:
    """One row per artifact, runtime and device: all that was timed, and the golden vectors' verdict."""
    forms = {
        "load_cold_ms": ".1f", "load_ms": ".1f", "first_token_ms": ".2f", "decode_ms_p50": ".2f", "decode_ms_p90": ".2f",
        "decode_ms_p99": ".2f", "decode_tokens_per_s": ".0f", "read_gb_s": ".2f", "bandwidth_share": ".0%", "peak_rss_mb": ".0f",
    }  # fmt: skip
    found = []
    for artifact in artifacts:
        for device in artifact["devices"]:
            numbers = [timed(device, key, form) for key, form in forms.items()]
            golden = [shown(device["max_abs_diff"], ".2g"), shown(device["top1"], ".2%")]
            named = (artifact["name"], runtime_of(device), device["device"], str(device["threads"]))
            found.append((*named, *numbers, *golden, verdict(device)))
    return found


def matrix_rows(artifacts: list[dict]) -> list[tuple[str, ...]]:
    """One row per artifact, runtime and device that was held against the machine that built."""
    found = []
    for artifact in artifacts:
        for device in artifact["devices"]:
            other = device["against_local"]
            if other is None:
                continue
            numbers = (f"{other['bit_equal']:.1%}", f"{other['max_abs_diff']:.2g}", f"{other['top1']:.2%}")
            change = shown(other["perplexity_change"], "+.4%")
            named = (artifact["name"], runtime_of(device), device["device"], device["isa"] or "-")
            found.append((*named, *numbers, change, str(other["tokens"]), verdict(device)))
    return found


def timed(device: dict, key: str, form: str) -> str:
    """A time or a size of memory as text; on an emulated device there is none, and the word says so."""
    return EMULATED if device["emulated"] and device[key] is None else shown(device[key], form)


def runtime_of(device: dict) -> str:
    return f"{device['runtime']} {device['runtime_version'] or ''}".strip()


def verdict(device: dict) -> str:
    return "passed" if device["passed"] else "FAILED"


def skipped_lines(skipped: list[dict]) -> list[str]:
    """A plain line for each device or runtime that was left out."""
    return [f"not tested: {what_was_skipped(entry)}: {entry['reason']}" for entry in skipped]


def what_was_skipped(entry: dict) -> str:
    return f"{entry['runtime']} on {entry['device']}" if entry["runtime"] else entry["device"]


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
    words = ("artifact", "runtime", "device", "isa", "row", "verdict")
    for column in columns:
        table.add_column(column, justify="left" if column in words else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line, style="red" if "FAILED" in line else None)
    return table


def markdown(columns: tuple[str, ...], lines: list[tuple[str, ...]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(line) + " |" for line in (columns, ("---",) * len(columns), *lines))
