"""``report.html``: the report as one self-contained page, readable on a phone, light and dark, without scripts or network.

Every number on the page is looked up in ``report.json`` by its path, which stands beside it as ``data-path`` with the raw
value in ``data-value``: so the page cannot say what the JSON does not, and a test holds the two together.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from pipeline.device_report import DeviceReport
from pipeline.report import Report, report_json

TEMPLATES = Path(__file__).resolve().parent / "templates"
MISSING = "\u2013"
BAR_WIDTH = 340  # of a drawing, in the units that a phone's width has about as many of
ROW_HEIGHT = 34
SHOWN_LAYERS = 12


def megabytes(value: float) -> str:
    return f"{value / 1e6:.2f} MB"


FORMATS: dict[str, Callable[[float], str]] = {
    "megabytes": megabytes,
    "mb": lambda value: f"{value:.0f} MB",
    "millions": lambda value: f"{value / 1e6:.2f} M",
    "perplexity": lambda value: f"{value:.3f}",
    "change": lambda value: f"{value:+.2%}",
    "small_change": lambda value: f"{value:+.4%}",
    "gb_s": lambda value: f"{value:.1f} GB/s",
    "celsius": lambda value: f"{value:.0f} \u00b0C",
    "share": lambda value: f"{value:.1%}",
    "agreement": lambda value: f"{value:.2%}",
    "scientific": lambda value: f"{value:.1e}",
    "milliseconds": lambda value: f"{value:.2f} ms",
    "seconds": lambda value: f"{value:.1f} s",
    "rate": lambda value: f"{value:.0f}",
    "count": lambda value: f"{value:,}".replace(",", "\u202f"),
}


@dataclass(frozen=True)
class Shown:
    """A number on the page: where in the JSON it stands, its raw value, and the text that a person reads."""

    path: str
    value: float | None
    text: str

    @property
    def attributes(self) -> Markup:
        return Markup('data-path="{}" data-value="{}"').format(self.path, json.dumps(self.value))


def looked_up(report: dict, path: str, form: str) -> Shown:
    """The number at ``path`` (keys and positions joined by dots) written as ``form`` says."""
    value = report
    for step in path.split("."):
        value = value[int(step)] if isinstance(value, list) else value[step]
    return Shown(path, value, MISSING if value is None else FORMATS[form](value))


def number(report: dict, path: str, form: str) -> Markup:
    """A number for running text and tables."""
    shown = looked_up(report, path, form)
    return Markup('<data {} value="{}">{}</data>').format(shown.attributes, json.dumps(shown.value), shown.text)


def report_html(report: Report) -> str:
    """The whole page as text; the same report gives the same page."""
    data = json.loads(report_json(report))  # the very values that report.json has, null where a number is none
    return page(
        "report.html.j2",
        data,
        size_plot=lambda: size_plot(data),
        sensitivity_plot=sensitivity_plot(data),
        recipe_lines=recipe_lines(data["recipe"]),
    )


def device_report_html(report: DeviceReport) -> str:
    """The page of a test on devices."""
    return page("device_report.html.j2", json.loads(report.model_dump_json()))


def page(template: str, data: dict, **more) -> str:
    """A template filled with a record; every number is looked up in it by its path."""
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.globals.update(n=lambda path, form: number(data, path, form), latency_plot=lambda: latency_plot(data), **more)
    return environment.get_template(template).render(report=data)


def size_plot(report: dict) -> Markup:
    """Bytes of the dense model in fp32 and of every artifact, as bars from zero."""
    rows = [("dense fp32", looked_up(report, "model.bytes_fp32", "megabytes"), "before")]
    for place, artifact in enumerate(report["artifacts"]):
        rows.append((artifact["name"], looked_up(report, f"artifacts.{place}.bytes", "megabytes"), "after"))
    longest = max(shown.value for _, shown, _ in rows)
    parts = []
    for row, (label, shown, kind) in enumerate(rows):
        width = BAR_WIDTH * shown.value / longest
        bar = Markup('<rect class="{}" x="0" y="18" width="{:.1f}" height="9" rx="2"/>').format(kind, width)
        parts.append(bar_row(row, label, [shown], bar))
    return drawing("Size in MB", len(rows), parts)


def sensitivity_plot(report: dict) -> Markup:
    """What the dearest layers of the first artifact that measured it cost as int8, as bars from zero; empty without one."""
    place = next((place for place, artifact in enumerate(report["artifacts"]) if artifact["sensitivity"]), None)
    if place is None:
        return Markup("")
    path = f"artifacts.{place}.sensitivity.layers"
    layers = report["artifacts"][place]["sensitivity"]["layers"][:SHOWN_LAYERS]
    rows = [(layer["name"], looked_up(report, f"{path}.{index}.kl", "scientific")) for index, layer in enumerate(layers)]
    longest = max(shown.value for _, shown in rows) or 1
    parts = []
    for row, (label, shown) in enumerate(rows):
        bar = Markup('<rect class="after" x="0" y="18" width="{:.1f}" height="9" rx="2"/>').format(BAR_WIDTH * shown.value / longest)
        parts.append(bar_row(row, label, [shown], bar))
    return drawing("KL divergence when one layer alone is int8", len(rows), parts)


def latency_plot(report: dict) -> Markup:
    """Milliseconds per decoded token: a line from the fastest to the 99th percentile, a dot at the median, a tick at the 90th."""
    rows = []
    for place, artifact in enumerate(report["artifacts"]):
        for index, device in enumerate(artifact["devices"]):
            path = f"artifacts.{place}.devices.{index}.decode_ms"
            shown = [looked_up(report, f"{path}_{share}", "milliseconds") for share in ("p50", "p90", "p99")]
            if all(item.value is not None for item in shown):
                fastest = min(device["decode_ms"], default=shown[0].value)
                rows.append((f"{artifact['name']} \u00b7 {device['runtime']} \u00b7 {device['device']}", fastest, shown))
    longest = max((shown[-1].value for _, _, shown in rows), default=0) or 1
    parts = []
    for row, (label, fastest, shown) in enumerate(rows):
        p50, p90, p99 = (BAR_WIDTH * item.value / longest for item in shown)
        marks = Markup(
            '<line class="axis" x1="0" y1="23" x2="{}" y2="23"/><line class="spread" x1="{:.1f}" y1="23" x2="{:.1f}" y2="23"/>'
            '<line class="tick" x1="{:.1f}" y1="18" x2="{:.1f}" y2="28"/><circle class="median" cx="{:.1f}" cy="23" r="4"/>'
        ).format(BAR_WIDTH, BAR_WIDTH * fastest / longest, p99, p90, p90, p50)
        parts.append(bar_row(row, label, shown, marks))
    return drawing("Milliseconds per decoded token", len(rows), parts)


def bar_row(row: int, label: str, shown: list[Shown], marks: Markup) -> Markup:
    """One row of a drawing: label left, numbers right, marks below them."""
    numbers = Markup(" / ").join(Markup("<tspan {}>{}</tspan>").format(item.attributes, item.text) for item in shown)
    texts = Markup('<text x="0" y="12">{}</text><text class="value" x="{}" y="12">{}</text>').format(label, BAR_WIDTH, numbers)
    return Markup('<g transform="translate(10 {})">{}{}</g>').format(row * ROW_HEIGHT, texts, marks)


def drawing(title: str, rows: int, parts: list[Markup]) -> Markup:
    """An inline SVG that fills the page's width; its colours are the page's."""
    height = max(1, rows) * ROW_HEIGHT
    opening = Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">').format(BAR_WIDTH + 20, height, title)
    return Markup("").join([opening, *parts, Markup("</svg>")])


def recipe_lines(recipe: dict, table: str = "") -> Markup:
    """The recipe as ``table.key = value`` lines."""
    lines = []
    for key, value in recipe.items():
        name = f"{table}{key}"
        lines.append(recipe_lines(value, f"{name}.") if isinstance(value, dict) else escape(f"{name} = {json.dumps(value)}\n"))
    return Markup("").join(lines)
