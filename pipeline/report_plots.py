"""Drawings of a report as inline SVG. Labels and numbers stand beside them as text, so that they wrap on a phone and are looked up."""

import math
from dataclasses import dataclass

from markupsafe import Markup

from pipeline.report_headline import is_fp32
from pipeline.report_numbers import Numbers, Shown, devices_of, value_at

WIDTH = 340.0  # of a drawing, in the units that a phone's width has about as many of
SHOWN_LAYERS = 12
LEAST_SPAN = 0.001  # of lost perplexity: less is drawn as nothing
LEFT, TOP, BOTTOM = 40, 24, 182  # of the scatter plot
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Row:
    """A line of a chart of bars: what it is of, its numbers, and the marks below them."""

    label: str
    shown: tuple[Shown, ...]
    marks: Markup
    height: int = 11


def chart(title: str, rows: list[Row]) -> Markup:
    """Rows with their numbers; empty without any."""
    parts = [
        Markup('<div class="bar"><span>{}</span><span class="soft">{}</span><svg height="{:d}" aria-hidden="true">{}</svg></div>').format(
            row.label, Markup(" / ").join(shown.in_text() for shown in row.shown), row.height, row.marks
        )
        for row in rows
    ]
    return Markup('<div class="bars" role="group" aria-label="{}">{}</div>').format(title, Markup("").join(parts)) if parts else Markup("")


def kind_of(artifact: dict) -> str:
    """The colour of an artifact: its format, and whether it is fp32."""
    return f"{artifact['name'].split('_')[0]}{' fp32' if is_fp32(artifact) else ''}"


def per_cent(value: float, longest: float) -> float:
    """Where a value stands in a row; what is more than ``longest`` stands at the end."""
    return 100 * min(value / (longest or 1), 1)


def bar(kind: str, value: float, longest: float) -> Markup:
    return Markup('<rect class="{}" x="0" y="1" width="{:.2f}%" height="9" rx="2"/>').format(kind, per_cent(value, longest))


def size_plot(numbers: Numbers) -> Markup:
    """Bytes of the dense model in fp32 and of every artifact, as bars from zero, with what a phone downloads."""
    artifacts = list(enumerate(numbers.record["artifacts"]))
    longest = max([numbers.record["model"]["bytes_fp32"], *(artifact["bytes"] for _, artifact in artifacts)])
    dense = numbers.at("model.bytes_fp32", "megabytes")
    rows = [Row("dense fp32", (dense,), bar("dense", dense.value, longest))]
    for place, artifact in artifacts:
        size, download = (numbers.at(f"artifacts.{place}.{key}", "megabytes") for key in ("bytes", "bytes_compressed"))
        rows.append(Row(artifact["name"], (size, download), bar(kind_of(artifact), size.value, longest)))
    return chart("Size on disk", rows)


def sensitivity_plot(numbers: Numbers) -> Markup:
    """What the dearest layers of the first artifact that measured it cost as int8, as bars from zero; empty without one."""
    artifacts = numbers.record["artifacts"]
    place = next((place for place, artifact in enumerate(artifacts) if artifact["sensitivity"]), None)
    if place is None:
        return Markup("")
    count = len(artifacts[place]["sensitivity"]["layers"][:SHOWN_LAYERS])
    shown = [numbers.at(f"artifacts.{place}.sensitivity.layers.{index}.kl", "scientific") for index in range(count)]
    longest = max((item.value for item in shown), default=0)
    layers = artifacts[place]["sensitivity"]["layers"]
    rows = [Row(layers[index]["name"], (item,), bar(kind_of(artifacts[place]), item.value, longest)) for index, item in enumerate(shown)]
    return chart("KL divergence when one layer alone is int8", rows)


def latency_plot(numbers: Numbers) -> Markup:
    """Milliseconds per decoded token: a stroke for each token that was timed, a dot at the median, a line to the 99th percentile."""
    timed = []
    for _, artifact, path, device in devices_of(numbers.record):
        shown = tuple(numbers.at(f"{path}.decode_ms_{share}", "milliseconds") for share in ("p50", "p90", "p99"))
        if all(item.value is not None for item in shown):
            timed.append(
                (f"{artifact['name']} in {device['runtime']} on {device['device']}", kind_of(artifact), device["decode_ms"], shown)
            )
    longest = max((shown[-1].value for _, _, _, shown in timed), default=0)
    rows = [Row(label, shown, distribution(kind, samples, shown, longest), 18) for label, kind, samples, shown in timed]
    return chart("Milliseconds per decoded token", rows)


def distribution(kind: str, samples: list[float], shown: tuple[Shown, ...], longest: float) -> Markup:
    """The marks of one row; a token that took longer than ``longest``, the largest 99th percentile, is drawn at the end."""
    p50, _, p99 = (per_cent(item.value, longest) for item in shown)
    strokes = Markup("").join(Markup("M{:.2f} 2v14").format(per_cent(sample, longest)) for sample in samples)
    return Markup(
        '<line class="axis" x1="0" y1="9" x2="100%" y2="9"/>'
        '<svg viewBox="0 0 100 18" height="18" width="100%" preserveAspectRatio="none"><path class="tokens {}" d="{}"/></svg>'
        '<line class="spread {}" x1="{:.2f}%" y1="9" x2="{:.2f}%" y2="9"/><circle class="{}" cx="{:.2f}%" cy="9" r="4.5"/>'
    ).format(kind, strokes, kind, p50, p99, kind, p50)


@dataclass(frozen=True)
class Point:
    """An artifact among the others: bytes to the right, perplexity lost upwards."""

    letter: str
    name: str
    kind: str
    size: Shown
    change: Shown | None  # None: the dense model, which is what the others are held against


def points_of(numbers: Numbers) -> tuple[list[Point], list[str]]:
    """Everything that has both numbers, and the names of the artifacts that do not."""
    found, without = [Point("A", "dense fp32", "dense", numbers.at("model.bytes_fp32", "megabytes"), None)], []
    for place, artifact in enumerate(numbers.record["artifacts"]):
        path = f"artifacts.{place}.quality.perplexity_change_dense"
        if not artifact["quality"] or value_at(numbers.record, path) is None:
            without.append(artifact["name"])
            continue
        size, change = numbers.at(f"artifacts.{place}.bytes", "megabytes"), numbers.at(path, "change")
        found.append(Point(letter_of(len(found)), artifact["name"], kind_of(artifact), size, change))
    return found, without


def letter_of(place: int) -> str:
    """A, B ... Z, AA, AB ..."""
    rest, last = divmod(place, len(LETTERS))
    return (letter_of(rest - 1) if rest else "") + LETTERS[last]


@dataclass(frozen=True)
class Scale:
    """From values to places in a drawing: ``least`` stands at ``start``, ``most`` at ``end``."""

    least: float
    most: float
    start: float
    end: float

    def at(self, value: float) -> float:
        return self.start + (self.end - self.start) * (value - self.least) / ((self.most - self.least) or 1)


def round_steps(least: float, most: float, count: int = 4) -> list[float]:
    """About ``count`` round numbers that span ``least`` to ``most``: steps of 1, 2 or 5 times a power of ten."""
    raw = max(most - least, 1e-9) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= raw * (1 - 1e-9))
    first, last = math.floor(least / step + 1e-9), math.ceil(most / step - 1e-9)
    return [place * step for place in range(first, last + 1)]


def quality_plot(numbers: Numbers) -> Markup:
    """Perplexity lost against the dense model over bytes, a letter for each artifact; the list of letters is text below the drawing."""
    points, without = points_of(numbers)
    changes = [point.change.value if point.change else 0.0 for point in points]
    across = round_steps(0.0, max(point.size.value for point in points) / 1e6)
    up = round_steps(min(0.0, *changes) * 100, max(LEAST_SPAN, *changes) * 100)
    x, y = Scale(across[0], across[-1], LEFT, WIDTH - 12), Scale(up[0], up[-1], BOTTOM, TOP)
    marks = [axis_mark(x.at(tick), BOTTOM + 14, tick, "x") for tick in across] + [
        axis_mark(LEFT - 6, y.at(tick) + 4, tick, "y") for tick in up
    ]
    lines = Markup("").join(Markup("M{:d} {:.1f}H{:g}").format(LEFT, y.at(tick), WIDTH - 12) for tick in up)
    places = [(x.at(point.size.value / 1e6), y.at(100 * change)) for point, change in zip(points, changes, strict=True)]
    for point, place, label in zip(points, places, label_places(places, [point.letter for point in points]), strict=True):
        marks.append(mark_of(point, place, label))
    marks.append(
        Markup('<text class="title" x="{:g}" y="210">MB</text><text class="title left" x="0" y="10">% lost</text>').format(WIDTH - 12)
    )
    plot = drawing(214, Markup('<path class="axis" d="{}"/>{}').format(lines, Markup("").join(marks)), "Quality against bytes")
    return plot + legend(points, without)


def axis_mark(x: float, y: float, value: float, axis: str) -> Markup:
    """A number of a scale, which says where things stand and is nobody's measurement."""
    text = Markup('<text class="scale {}" data-axis="{}" data-value="{:g}" x="{:.1f}" y="{:.1f}">{:g}</text>')
    return text.format(axis, axis, value, x, y, value)


def drawing(height: float, marks: Markup, label: str) -> Markup:
    """An inline SVG of ``WIDTH`` that fills the width it is given; its colours are the page's."""
    return Markup('<svg class="plot" viewBox="0 0 {:g} {:g}" role="img" aria-label="{}">{}</svg>').format(WIDTH, height, label, marks)


def mark_of(point: Point, place: tuple[float, float], label: tuple[float, float]) -> Markup:
    x, y = place
    return Markup('<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="5"/><text class="letter" x="{:.1f}" y="{:.1f}">{}</text>').format(
        point.kind, x, y, *label, point.letter
    )


def legend(points: list[Point], without: list[str]) -> Markup:
    """What each letter is, with its numbers."""
    items = [
        Markup('<li><b class="key {}">{}</b> {} <span class="soft">{}{}</span></li>').format(
            point.kind,
            point.letter,
            point.name,
            point.size.in_text(),
            Markup(", {}").format(point.change.in_text()) if point.change else "",
        )
        for point in points
    ]
    items += [Markup('<li class="soft">{} has no quality number</li>').format(name) for name in without]
    return Markup('<ul class="legend">{}</ul>').format(Markup("").join(items))


def label_places(points: list[tuple[float, float]], letters: list[str]) -> list[tuple[float, float]]:
    """Where each letter's middle stands: beside its point, out of the way of the other points and letters where that can be."""
    taken = [(x - 6, y - 6, x + 6, y + 6) for x, y in points]
    found = []
    for (x, y), letter in zip(points, letters, strict=True):
        half = 4.0 * len(letter)
        ring = [(x + reach * math.cos(turn), y + reach * math.sin(turn)) for reach in (13, 22, 31) for turn in angles()]
        boxes = [(a - half, b - 6, a + half, b + 6) for a, b in ring]
        inside = [box for box in boxes if box[0] > LEFT and box[2] < WIDTH and box[1] > TOP - 12 and box[3] < BOTTOM + 2]
        best = min(inside or boxes, key=lambda box: sum(overlap(box, other) for other in taken))
        taken.append(best)
        found.append(((best[0] + best[2]) / 2, best[3] - 2))
    return found


def angles() -> list[float]:
    """Eight directions, right first, then up and down."""
    return [math.radians(degrees) for degrees in (0, -45, 45, -90, 90, -135, 135, 180)]


def overlap(one: tuple[float, ...], other: tuple[float, ...]) -> float:
    """Area that two boxes ``(left, top, right, bottom)`` share."""
    width, height = min(one[2], other[2]) - max(one[0], other[0]), min(one[3], other[3]) - max(one[1], other[1])
    return max(0.0, width) * max(0.0, height)
