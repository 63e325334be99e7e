"""``docs/prices.md`` and its plots, made from ``docs/prices.json`` alone: no number in the text is typed in."""

import json
from pathlib import Path

import matplotlib
from matplotlib import pyplot

from pipeline.prices_report_long import PLOT, long_section, plot_recovery
from pipeline.table import markdown, shown

matplotlib.use("Agg")

TITLES = {
    "weights": "Single weights set to zero",
    "pattern": "n of every m neighbours set to zero",
    "structure": "Parts of the architecture removed: really smaller, really faster",
    "clusters": "Weights that share values",
}
MODEL_COLUMNS = ("row", "one shot", "recovered", "KL recovered", "top-1", "parameters M", "nonzero M", "int8 MB", "download MB", "smaller")
CLUSTER_COLUMNS = ("row", "perplexity", "KL", "top-1", "nonzero M", "fp32 MB", "download MB", "smaller", "indexed MB", "smaller")
ARTIFACT_COLUMNS = (
    "row",
    "runtime",
    "perplexity change",
    "KL",
    "top-1",
    "MB",
    "download MB",
    "smaller",
    "first token ms",
    "tokens/s",
    "peak MB",
)
LEAST_KL = 1e-6  # what is drawn of less: a logarithm has no zero
STYLES = {"weights": "o", "pattern": "s", "structure": "^", "clusters": "D", "dense": "*"}


def write_prices(found: dict, docs: Path) -> None:
    """Write prices.json, prices.md and the two plots into ``docs``."""
    docs.mkdir(parents=True, exist_ok=True)
    (docs / "prices.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    (docs / "prices.md").write_text(prices_page(found), encoding="utf-8")
    plot_downloads(found, docs / "prices-download.png")
    plot_speed(found, docs / "prices-speed.png")
    if found.get("long"):
        plot_recovery(found, docs / PLOT)


def prices_page(found: dict) -> str:
    """The whole page; the same numbers give the same page."""
    parts = [introduction(found)]
    for kind, title in TITLES.items():
        rows = [row for row in found["models"] if row["kind"] == kind]
        table = (
            markdown(CLUSTER_COLUMNS, cluster_lines(rows, found))
            if kind == "clusters"
            else markdown(MODEL_COLUMNS, model_lines(rows, found))
        )
        parts.append(f"## {title}\n\n{table}\n")
    parts.append(CLUSTER_NOTE)
    parts += [section for section in [long_section(found)] if section]
    parts.append(
        f"## Quantised artifacts\n\n{markdown(ARTIFACT_COLUMNS, artifact_lines(found))}\n\n{ARTIFACT_NOTE} {measured_where(found)}\n"
    )
    parts.append(f"## What the textbook promises\n\n{textbook(found)}\n")
    parts.append("![Quality against download](prices-download.png)\n\n![Quality against speed](prices-speed.png)\n")
    return "\n".join(parts)


ARTIFACT_NOTE = (
    "Perplexity change, KL and top-1 are against the fp32 PyTorch model that was exported, in that runtime; `smaller` is the dense "
    "fp32 weights' bytes over the download. Times are of one thread on the machine that measured, and depend on what else it did."
)
CLUSTER_NOTE = (
    "Clusters pay in the download alone: in memory the weights are as large as before. `download MB` is the fp32 file after deflate, which "
    "every runtime opens after unpacking; `indexed MB` is what codes and a codebook come to after deflate, which an app has to turn "
    "back into numbers itself.\n\n"
    "What the winning tickets of iterative pruning are worth, against re-initialised weights, a random mask and one shot, is measured on a "
    "smaller model by `pocketlm lottery`: [lottery/lottery.md](lottery/lottery.md).\n"
)


def measured_where(found: dict) -> str:
    """Which version and machine the artifacts' rows are from; rows that are not from the first row's are named."""
    rows: dict[str, list[str]] = {}
    for row in found["artifacts"]:
        by = row["measured_by"]
        cpu = by["cpu"] or "a processor whose name was not recorded"
        rows.setdefault(f"by version {by['version']} on {by['cores']} cores of {cpu} ({by['isa']})", []).append(row["name"])
    first, *others = rows
    if not others:
        return f"All of them were measured {first}."
    told = [f"{', '.join(dict.fromkeys(rows[where]))} {where}" for where in others]
    return f"They were measured {first}, but {'; '.join(told)}: times of different runs are not to be compared."


def introduction(found: dict) -> str:
    control = row_named(found, "dense, trained on")
    quick = " This is the short form (`QUICK=1`)." if found["quick"] else ""
    missing = f" Not measured yet: {', '.join(dict.fromkeys(found['left_out']))}." if found["left_out"] else ""
    return (
        "# What shrinking costs\n\n"
        f"Made by `make prices` on the demo model.{quick}{missing} Its perplexity is {found['dense_perplexity']:.3f} over "
        f"{found['tokens']} held-out tokens. `one shot` and `recovered` are perplexities as ratios to that, before and after "
        f"{found['recovery_steps']} steps of distillation from the dense model ({found['recovery_tokens']:,} tokens); the road keeps "
        "the better of the two by validation. "
        f"As control, the dense model trained on for as many steps has {control['ratio']:.3f}.\n\n"
        "`int8 MB` is a byte for each weight and a scale for each row, `download MB` the same after deflate: zeros make the download "
        "smaller and nothing else. No runtime here computes faster because of single zeros, and on disk and in memory they take "
        "their place. `smaller` is the dense fp32 model's bytes over the download.\n"
    )


def model_lines(rows: list[dict], found: dict) -> list[tuple[str, ...]]:
    """One line per name: one shot and recovered beside each other, the rest of the recovered one."""
    dense_bytes = row_named(found, "dense")["bytes_fp32"]
    lines = []
    for name in dict.fromkeys(row["name"] for row in rows):
        before, after = (
            next((row for row in rows if row["name"] == name and row["recovered"] == recovered), None) for recovered in (False, True)
        )
        row = after or before
        lines.append(
            (
                name,
                shown(before and before["ratio"], ".3f"),
                shown(after and after["ratio"], ".3f"),
                f"{row['kl']:.4f}",
                f"{row['top1']:.1%}",
                f"{row['parameters'] / 1e6:.2f}",
                f"{row['nonzero'] / 1e6:.2f}",
                f"{row['bytes_int8'] / 1e6:.2f}",
                f"{row['download_int8'] / 1e6:.2f}",
                f"{dense_bytes / row['download_int8']:.1f}x",
            )
        )
    return lines


def cluster_lines(rows: list[dict], found: dict) -> list[tuple[str, ...]]:
    """Clustered weights stay fp32 numbers, so their download is the fp32 file's; indexed: a codebook, and codes instead of numbers."""
    dense_bytes = row_named(found, "dense")["bytes_fp32"]
    return [
        (
            row["name"],
            f"{row['ratio']:.3f}",
            f"{row['kl']:.4f}",
            f"{row['top1']:.1%}",
            f"{row['nonzero'] / 1e6:.2f}",
            f"{row['bytes_fp32'] / 1e6:.2f}",
            f"{row['download_fp32'] / 1e6:.2f}",
            f"{dense_bytes / row['download_fp32']:.1f}x",
            f"{row['download_indexed'] / 1e6:.2f}",
            f"{dense_bytes / row['download_indexed']:.1f}x",
        )
        for row in rows
    ]


def artifact_lines(found: dict) -> list[tuple[str, ...]]:
    lines = []
    for row in found["artifacts"]:
        quality, device = row["quality"] or {}, row["device"]
        numbers = [
            shown(quality.get("perplexity_change"), "+.3%"),
            shown(quality.get("kl"), ".5f"),
            shown(quality.get("top1"), ".2%"),
            f"{row['bytes'] / 1e6:.2f}",
            f"{row['download'] / 1e6:.2f}",
            f"{row['bytes_dense_fp32'] / row['download']:.1f}x",
            shown(device["first_token_ms"], ".1f"),
            shown(device["decode_tokens_per_s"], ".0f"),
            shown(device["peak_rss_mb"], ".0f"),
        ]
        lines.append((row["name"], row["runtime"], *numbers))
    return lines


def textbook(found: dict) -> str:
    """The claim of 90 % of the weights removed and 32 to 8 bits, with what it came to here."""
    rows = {row["name"]: row for row in found["artifacts"]}
    dense, dense_int8 = rows["onnx_fp32, dense model"], rows["onnx_static_int8, dense model"]
    sparse_int8 = rows["onnx_static_int8, sparsegpt 90%"]
    model = next(row for row in found["models"] if row["name"] == "sparsegpt 90%" and row["recovered"])
    kept = model["nonzero"] / row_named(found, "dense")["nonzero"]

    def times(key: str, of: dict) -> str:
        return f"{dense[key] / of[key]:.1f}x"

    def faster(of: dict) -> str:
        return f"{of['device']['decode_tokens_per_s'] / dense['device']['decode_tokens_per_s']:.2f}x"

    def memory(of: dict) -> str:
        return f"{dense['device']['peak_rss_mb'] / of['device']['peak_rss_mb']:.2f}x"

    return (
        "A tenth of the weights at a quarter of the bits is a fortieth of the bytes: so the textbook. The count leaves out what says "
        f"where the remaining weights stand, and the embedding, which is not pruned ({kept:.0%} of all parameters remain here). "
        f"Measured, in ONNX Runtime: 90 % sparse int8 is {times('bytes', sparse_int8)} smaller on disk and "
        f"{times('download', sparse_int8)} smaller to download than dense fp32 (int8 alone: {times('bytes', dense_int8)} and "
        f"{times('download', dense_int8)}). It decodes at {faster(sparse_int8)} the speed of dense fp32 (int8 alone: "
        f"{faster(dense_int8)}) in a process {memory(sparse_int8)} smaller. "
        f"It costs a perplexity of {model['ratio']:.3f} times the dense one after recovery, and "
        f"{shown((sparse_int8['quality'] or {}).get('perplexity_change'), '+.2%')} more for int8."
    )


def row_named(found: dict, name: str) -> dict:
    return next(row for row in found["models"] if row["name"] == name)


def plot_downloads(found: dict, path: Path) -> None:
    """Perplexity ratio against the compressed bytes of every model row, with the Pareto front."""
    figure, axes = pyplot.subplots(figsize=(9, 6))
    points = []
    for row in found["models"]:
        size = row["download_indexed"] if row["kind"] == "clusters" else row["download_int8"]
        points.append((size / 1e6, row["ratio"], row["name"]))
        axes.plot(*points[-1][:2], STYLES[row["kind"]], color="tab:blue" if row["recovered"] else "tab:gray", markersize=5)
    front = pareto_front(points)
    axes.step([x for x, _, _ in front], [y for _, y, _ in front], where="post", color="tab:red", linewidth=1)
    name_points(axes, front)
    axes.set(xlabel="download in MB (weights after deflate)", ylabel="perplexity over the dense model's", yscale="log")
    axes.set_title(
        "Circles single weights, squares patterns, triangles structure, diamonds clusters, stars dense; blue: recovered", fontsize=9
    )
    axes.margins(y=0.25)
    save(figure, path)


def plot_speed(found: dict, path: Path) -> None:
    """KL against decode speed of every artifact in its runtimes, with the Pareto front. Not the rows of other checkpoints."""
    figure, axes = pyplot.subplots(figsize=(9, 6))
    points = []
    for row in found["artifacts"]:
        speed, quality = row["device"]["decode_tokens_per_s"], row["quality"] or {}
        if speed and quality.get("kl") is not None and not row["outliers"]:
            points.append((-speed, max(quality["kl"], LEAST_KL), f"{row['name']} in {row['runtime']}"))
            axes.plot(speed, points[-1][1], "o", color="tab:blue", markersize=5)
    front = [(-x, y, name) for x, y, name in pareto_front(points)]
    axes.step([x for x, _, _ in front], [y for _, y, _ in front], where="post", color="tab:red", linewidth=1)
    name_points(axes, front)
    axes.set(xlabel="decoded tokens per second, one thread", ylabel=f"KL against its fp32 model, nats per token (at least {LEAST_KL:.0e})")
    axes.set(yscale="log")
    axes.margins(x=0.15, y=0.15)
    save(figure, path)


def pareto_front(points: list[tuple[float, float, str]]) -> list[tuple[float, float, str]]:
    """The points than which none is both smaller in the first and in the second number, from left to right."""
    front, lowest = [], float("inf")
    for point in sorted(points):
        if point[1] < lowest:
            front.append(point)
            lowest = point[1]
    return front


def name_points(axes, points: list[tuple[float, float, str]]) -> None:
    """Names that lean away from the curve, so that near points can be told apart."""
    for x, y, name in points:
        axes.annotate(name, (x, y), fontsize=6, rotation=35, xytext=(3, 3), textcoords="offset points")


def save(figure, path: Path) -> None:
    figure.tight_layout()
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)
