"""The part of ``docs/prices.md`` about ten minutes of recovery, and its plot: from the numbers alone, like the rest."""

import math
from pathlib import Path

from matplotlib import pyplot

from pipeline.table import markdown, shown

COLUMNS = ("row", "before", "target", "recovered", "reached", "KL", "top-1", "steps", "tokens", "CPU s", "below target from")
PLOT = "prices-recovery.png"


def long_section(found: dict) -> str:
    """The section, or nothing where no long rows were measured."""
    if not found.get("long"):
        return ""
    long = found["long"]
    control, least = long["control"], min(row["nonzero"] / row["parameters"] for row in long["rows"])
    return (
        "## Ten minutes of recovery\n\n"
        f"A minute is little. These rows recover in bfloat16 on {long['text_bytes'] / 1e6:.0f} MB of the corpus that the model is from "
        "(nothing of it held-out), so that little is seen twice; ten minutes on two cores are 1,200 CPU seconds. `recovered`, KL, top-1 "
        "are of the held-out windows, as everywhere here; `before` and `below target from` are of the validation windows along the curve. "
        f"A row that is pruned while recovering starts as the dense model. As control, the dense model trained on the same text for "
        f"{control['steps']} steps has {control['ratio']:.3f}, after {control['cpu_seconds']:.0f} CPU seconds. The sparsest of these rows "
        f"keeps {least:.0%} of its parameters.\n\n"
        f"{markdown(COLUMNS, [long_line(row) for row in long['rows']])}\n\n"
        f"![Recovery over CPU time]({PLOT})\n"
    )


def long_line(row: dict) -> tuple[str, ...]:
    return (
        row["name"],
        f"{row['curve'][0]['validation_perplexity_ratio']:.3f}",
        f"{row['target']:.2f}",
        f"{row['ratio']:.3f}",
        "yes" if row["ratio"] <= row["target"] else "no",
        f"{row['kl']:.4f}",
        f"{row['top1']:.1%}",
        f"{row['steps']:,}",
        f"{row['tokens']:,}",
        f"{row['cpu_seconds']:.0f}",
        below(row),
    )


def below(row: dict) -> str:
    """From where on the curve holds the target, in CPU seconds; what is still being pruned does not count."""
    points = [point for point in row["curve"][1:] if point["step"] > row["pruned_until_step"]]
    over = [number for number, point in enumerate(points) if point["validation_perplexity_ratio"] > row["target"]]
    after = points[over[-1] + 1 :] if over else points
    return shown(after[0]["cpu_seconds"] if after else None, ".0f")


def plot_recovery(found: dict, path: Path) -> None:
    """Validation KL and perplexity ratio over CPU seconds, tokens written at the ends, each target as a line in its row's colour."""
    figure, (upper, lower) = pyplot.subplots(2, 1, figsize=(9, 8), sharex=True)
    for number, row in enumerate(found["long"]["rows"]):
        colour, points = f"C{number}", row["curve"]
        seconds = [point["cpu_seconds"] for point in points]
        upper.plot(seconds, [point["validation_kl"] or math.nan for point in points], "o-", color=colour, markersize=4, label=row["name"])
        lower.plot(seconds, [point["validation_perplexity_ratio"] for point in points], "o-", color=colour, markersize=4)
        unfinished = [point for point in points if row["pruned_until_step"] and point["step"] <= row["pruned_until_step"]]
        for axes, key in ((upper, "validation_kl"), (lower, "validation_perplexity_ratio")):
            axes.plot([p["cpu_seconds"] for p in unfinished], [p[key] for p in unfinished], "ow", markersize=2.5)
        lower.axhline(row["target"], color=colour, linestyle="--", linewidth=1)
        lower.plot(seconds[-1], row["ratio"], "*", color=colour, markersize=13)
        lower.annotate(
            f"{row['tokens'] / 1e6:.2f} M tokens", (seconds[-1], row["ratio"]), fontsize=7, xytext=(-60, 8), textcoords="offset points"
        )
    upper.set(ylabel="validation KL, nats per token", yscale="log")
    upper.legend(fontsize=8)
    lower.set(xlabel="CPU seconds (ten minutes on two cores: 1,200)", ylabel="perplexity over the dense model's", ylim=(0.98, 1.6))
    lower.set_title("circles: validation text, open while still being pruned; stars: held-out text; dashed: targets", fontsize=9)
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
