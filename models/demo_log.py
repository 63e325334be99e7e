"""The training log: one CSV row per logged step, and the plot made from it."""

import csv
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure


@dataclass(frozen=True)
class LogRow:
    """What was measured at a step. `validation_loss` is None at most steps. Losses are nats per token."""

    step: int
    tokens: int
    seconds: float  # of training, over all resumptions
    lr_factor: float
    train_loss: float  # mean since the row before
    validation_loss: float | None = None


def read_log(file: Path) -> list[LogRow]:
    """All rows of a log; none when there is no file yet."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return [LogRow(**{field.name: _number(row[field.name], field.name) for field in fields(LogRow)}) for row in csv.DictReader(lines)]


def _number(text: str, name: str) -> int | float | None:
    if not text:
        return None
    return int(text) if name in ("step", "tokens") else float(text)


def write_log(file: Path, rows: list[LogRow]) -> None:
    """Replace the log. A resumed run drops the rows past its checkpoint this way."""
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as lines:
        writer = csv.DictWriter(lines, [field.name for field in fields(LogRow)], lineterminator="\n")
        writer.writeheader()
        writer.writerows(_texts(row) for row in rows)


def append_row(file: Path, row: LogRow) -> None:
    with file.open("a", newline="") as lines:
        csv.DictWriter(lines, [field.name for field in fields(LogRow)], lineterminator="\n").writerow(_texts(row))


def _texts(row: LogRow) -> dict:
    return {name: round(value, 4) if isinstance(value, float) else value for name, value in asdict(row).items()}


def plot_losses(rows: list[LogRow], png: Path) -> None:
    """Training and validation loss over tokens, with the learning rate's factor behind them."""
    matplotlib.use("Agg")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    millions = [row.tokens / 1e6 for row in rows]
    axes.plot(millions, [row.train_loss for row in rows], linewidth=1, alpha=0.7, label="train")
    measured = [row for row in rows if row.validation_loss is not None]
    axes.plot([row.tokens / 1e6 for row in measured], [row.validation_loss for row in measured], "o-", markersize=3, label="validation")
    axes.set(xlabel="million tokens", ylabel="loss, nats per token", ylim=(0.9 * min(row.train_loss for row in rows), 5.5))
    axes.grid(alpha=0.3)
    axes.legend(loc="upper right")
    rate = axes.twinx()
    rate.fill_between(millions, [row.lr_factor for row in rows], color="grey", alpha=0.12)
    rate.set(ylabel="learning rate, share of its peak", ylim=(0, 4))
    png.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(png, dpi=110)
