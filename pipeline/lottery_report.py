"""What the lottery said, as a table, as JSON and as a plot."""

import math
import statistics
from dataclasses import asdict
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from models.provenance import library_versions, write_json
from pipeline.lottery import ARMS, Outcome, Plan
from pipeline.table import markdown

COLUMNS = ("sparsity", "steps of the network", "steps in all", "ticket", "re-initialised", "random mask", "one shot", "dense, as long")
NAMES = ("winning ticket", "re-initialised", "random mask", "one shot, same steps in all", "dense, same steps in all")
LABELS = dict(zip(ARMS, NAMES, strict=True))
HOW = (
    "perplexity on held-out text, mean ± half the range over the seeds; the ticket, the re-initialised network and the random mask have"
    " the steps of the network behind them, one shot and dense the steps in all that finding the ticket took"
)


def write(plan: Plan, outcomes: list[Outcome], out: Path) -> dict:
    """Write lottery.json, lottery.md and lottery.png into ``out``; returns what the JSON holds."""
    out.mkdir(parents=True, exist_ok=True)
    record = {
        "plan": asdict(plan),
        "dense": summary([outcome for outcome in outcomes if outcome.arm == "dense"]),
        "levels": [level(outcomes, number) for number in range(1, plan.rounds + 1)],
        "outcomes": [asdict(outcome) for outcome in outcomes],
        "versions": library_versions("torch", "transformers", "tokenizers"),
    }
    write_json(out / "lottery.json", record)
    table = markdown(COLUMNS, rows(record))
    lines = "\n".join(f"- {line}" for line in verdicts(record))
    (out / "lottery.md").write_text(f"# Lottery tickets\n\n{table}\n\n{lines}\n\n![Perplexity](lottery.png)\n", encoding="utf-8")
    plot(record, out / "lottery.png")
    return record


def summary(outcomes: list[Outcome]) -> dict:
    """Perplexity over the seeds: mean, lowest, highest; steps and sparsity are the same in all of them."""
    found = [math.exp(outcome.loss) for outcome in outcomes]
    first = outcomes[0]
    return {
        "perplexity": statistics.fmean(found),
        "lowest": min(found),
        "highest": max(found),
        "sparsity": first.sparsity,
        "own_steps": first.own_steps,
        "total_steps": first.total_steps,
    }


def level(outcomes: list[Outcome], number: int) -> dict:
    """All arms that were trained at a round."""
    here = [outcome for outcome in outcomes if outcome.number == number and outcome.arm != "dense"]
    arms = {arm: summary([outcome for outcome in here if outcome.arm == arm]) for arm in ARMS if any(o.arm == arm for o in here)}
    return {"round": number, "sparsity": arms["ticket"]["sparsity"], "arms": arms}


def rows(record: dict) -> list[tuple[str, ...]]:
    """The dense network, then a row per round."""
    found = [("0.0%", str(record["dense"]["own_steps"]), str(record["dense"]["total_steps"]), told(record["dense"]), "-", "-", "-", "-")]
    for item in record["levels"]:
        ticket, arms = item["arms"]["ticket"], item["arms"]
        cells = [told(arms[arm]) if arm in arms else "-" for arm in ARMS]
        found.append((f"{item['sparsity']:.1%}", str(ticket["own_steps"]), str(ticket["total_steps"]), *cells))
    return found


def told(summed: dict) -> str:
    """Mean ± half the range, which one seed does not have."""
    half = (summed["highest"] - summed["lowest"]) / 2
    return f"{summed['perplexity']:.2f}" + (f" ± {half:.2f}" if half else "")


def verdicts(record: dict) -> list[str]:
    """For each compared round, how far the ticket's perplexity is from each of the others."""
    lines = [HOW]
    for item in record["levels"]:
        if len(item["arms"]) > 1:
            ticket = item["arms"]["ticket"]["perplexity"]
            others = {name: arm["perplexity"] for name, arm in item["arms"].items() if name != "ticket"}
            against = [f"{ticket / perplexity - 1:+.1%} against {LABELS[name]}" for name, perplexity in others.items()]
            lines.append(f"at {item['sparsity']:.0%} the ticket is at {', '.join(against)}")
    return lines


def plot(record: dict, png: Path) -> None:
    """Perplexity over the share of weights left; bars reach from the lowest to the highest seed."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.subplots()
    for arm in ARMS:
        found = [item["arms"][arm] for item in record["levels"] if arm in item["arms"]]
        left = [100 * (1 - item["sparsity"]) for item in record["levels"] if arm in item["arms"]]
        middle = [item["perplexity"] for item in found]
        ends = [[item["perplexity"] - item["lowest"] for item in found], [item["highest"] - item["perplexity"] for item in found]]
        axes.errorbar(left, middle, yerr=ends, marker="o", markersize=4, capsize=3, linewidth=1.2, label=LABELS[arm])
    axes.axhline(record["dense"]["perplexity"], color="grey", linestyle="--", linewidth=1, label="dense")
    axes.set(xscale="log", xlabel="weights left in the linear layers, %", ylabel="held-out perplexity")
    axes.invert_xaxis()
    ticks = sorted({round(100 * (1 - item["sparsity"])) for item in record["levels"]})
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.minorticks_off()
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(png, dpi=110, metadata={"Software": None})
