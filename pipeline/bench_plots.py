"""Plots of the benchmark: for each size and number of threads, decode speed against time to the first token."""

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend is chosen before

from pipeline.bench_record import MAIN_PROMPT_TOKENS  # noqa: E402

COLOURS = {"ours": "tab:blue", "PyTorch": "tab:gray", "peer": "tab:orange"}


def write_plots(record: dict, out: Path) -> list[str]:
    """One PNG per size; returns their names. Rows without a result have no bar, the page's tables have them."""
    names = []
    for size in record["sizes"].values():
        names.append(f"bench-{size['name']}.png")
        plot(size, out / names[-1])
    return names


def plot(size: dict, path: Path) -> None:
    """Horizontal bars: decode tokens/s and first-token milliseconds, a column of bars for each number of threads."""
    tokens = str(MAIN_PROMPT_TOKENS)
    labels = list(dict.fromkeys(row["row"] for row in size["rows"]))
    figure, axes = pyplot.subplots(
        2, len(size["threads"]), figsize=(8 * len(size["threads"]), 2 + 0.5 * len(labels)), squeeze=False, layout="constrained"
    )
    for column, threads in enumerate(size["threads"]):
        rows = [row for row in size["rows"] if row["threads"] == threads]
        bars(axes[0][column], rows, [row["decode_tokens_per_s"] for row in rows], f"decode tokens/s, {threads} threads")
        first = [row["first_token_ms"].get(tokens) for row in rows]
        bars(axes[1][column], rows, first, f"first token after {tokens} tokens, ms, {threads} threads")
    figure.suptitle(f"{size['name']}: {size['about']}")
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)


def bars(axes, rows: list[dict], values: list[float | None], title: str) -> None:
    """One bar per row that has a value."""
    pairs = [(row, value) for row, value in zip(rows, values, strict=True) if value is not None]
    colours = [COLOURS[row["group"]] for row, _ in pairs]
    drawn = axes.barh([row["row"] for row, _ in pairs], [value for _, value in pairs], color=colours)
    axes.bar_label(drawn, fmt="%.4g", padding=2, fontsize=7)
    axes.invert_yaxis()
    axes.tick_params(labelsize=7)
    axes.set_title(title, fontsize=9)
