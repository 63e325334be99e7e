"""What the road costs as tables and a plot: ``costs.json``, ``costs.md`` and ``costs.png``."""

from collections.abc import Iterable
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot  # noqa: E402 - the backend is chosen before

from pipeline.bench_report import STAGE_COLUMNS, read_record, stage_row, write_size  # noqa: E402
from pipeline.costs import over_limits  # noqa: E402
from pipeline.table import markdown, shown  # noqa: E402

RECORD, PAGE, PLOT = "costs.json", "costs.md", "costs.png"
COLUMNS = ("size", "M parameters", "minutes", "limit", "peak MB", "limit", "in", "MB on disk", "slowest stage")
LABELLED = 6  # the dearest stages, which have a line of their own


def write_costs(found: Iterable[dict], out: Path) -> dict:
    """Save each size beside those of other runs as soon as it is measured; page and plot after each. Returns the whole record."""
    record = read_record(out, RECORD)
    for size in found:
        record = write_size(size, out, RECORD)
        plot(by_parameters(record), out / PLOT)
        (out / PAGE).write_text(page(record), encoding="utf-8")
    return record


def by_parameters(record: dict) -> list[dict]:
    return sorted(record["sizes"].values(), key=lambda size: size["parameters"])


def rows(record: dict) -> list[tuple[str, ...]]:
    """One line per size, smallest first."""
    lines = []
    for size in by_parameters(record):
        slowest = max(size["stages"], key=lambda row: row["seconds"])
        largest = max(size["stages"], key=lambda row: row["peak_rss_mb"])
        limits = size["limits"]
        lines.append(
            (
                size["name"], f"{size['parameters'] / 1e6:.1f}", f"{size['minutes']:.1f}", shown(limits["minutes"], ".0f"),
                f"{size['peak_rss_mb']:.0f}", shown(limits["peak_rss_mb"], ".0f"), largest["stage"], f"{size['disk_mb']:.0f}",
                f"{slowest['stage']} ({slowest['seconds'] / 60:.1f} min)",
            )
        )  # fmt: skip
    return lines


def page(record: dict) -> str:
    """``costs.md``: sizes, what passes its limit, the plot, and every stage of every size."""
    passed = [f"- {line}" for size in by_parameters(record) for line in over_limits(size)]
    parts = [
        "# What the road costs",
        "Written by `make costs` from `costs.json` in this folder: the default recipe with pruning in one shot and no recovery, every stage"
        " in a process of its own. Minutes are the sum of the stages' wall time; peak MB is the largest resident memory of any stage's"
        " process, mapped files included; both of the run that made the result. MB are 10^6 bytes.",
        markdown(COLUMNS, rows(record)),
        *(["\n".join(passed)] if passed else []),
        f"![minutes and peak memory by number of parameters]({PLOT})",
        *(part for size in by_parameters(record) for part in section(size)),
    ]
    return "\n\n".join(parts) + "\n"


def section(size: dict) -> list[str]:
    """Every stage of one size, and the machine."""
    machine = size["environment"]
    lines = [(*stage_row(row), "found done" if row["cached"] else "ran") for row in size["stages"]]
    return [
        f"## {size['name']}",
        f"Put together {size['measured_at']} on {machine['cpu'] or machine['isa']}, {machine['cores']} cores.",
        markdown((*STAGE_COLUMNS, "this run"), lines),
    ]


def plot(found: list[dict], path: Path) -> None:
    """Two panels over the number of parameters, both axes logarithmic: minutes and peak memory, in all and of the dearest stages."""
    figure, axes = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    million = [size["parameters"] / 1e6 for size in found]
    panels = (
        (axes[0], "seconds", 60, "minutes", [size["minutes"] for size in found], "all stages"),
        (axes[1], "peak_rss_mb", 1000, "peak memory, GB", [size["peak_rss_mb"] / 1000 for size in found], "largest of all"),
    )
    for panel, field, unit, title, whole, name in panels:
        panel.plot(million, whole, "k-o", label=name, linewidth=2)
        largest = {row["stage"]: row[field] for size in found for row in size["stages"]}
        for stage in sorted(largest, key=largest.get, reverse=True)[:LABELLED]:
            points = [(size["parameters"] / 1e6, row[field] / unit) for size in found for row in size["stages"] if row["stage"] == stage]
            panel.plot(*zip(*points, strict=True), "-o", label=stage, linewidth=1, markersize=4)
        panel.set(xscale="log", yscale="log", xlabel="M parameters of the checkpoint", title=title)
        panel.grid(visible=True, which="both", alpha=0.3)
        panel.legend(fontsize=8)
    figure.savefig(path, dpi=80, metadata={"Software": None})
    pyplot.close(figure)
