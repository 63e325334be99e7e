"""Numbers of a page, each looked up in the record that the page is made from.

A number stands in a ``data`` element (in a drawing: a ``tspan``) with the path of its place in the record as ``data-path``, the way it
is written as ``data-form`` and the raw value. So the page cannot say what the record does not, and a test, or a script in a browser,
holds the two together. Where a number is worked out, the element says from what: ``data-over`` is the path of what ``data-path`` is
divided by, ``data-total`` is ``sum`` or ``max`` over a path with a ``*`` in it.
"""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from markupsafe import Markup

MISSING = "\u2013"
THIN = "\u202f"  # a narrow space between thousands that no line is broken at


def duration(seconds: float) -> str:
    """Seconds as a person says them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def signed(value: float, digits: int) -> str:
    """A change in per cent; one that is too small to be seen has no sign."""
    text = f"{value:+.{digits}%}"
    return text if text.strip("+-0.%") else f"\u00b1{text[1:]}"


FORMATS: dict[str, Callable[[float], str]] = {
    "megabytes": lambda value: f"{value / 1e6:.2f} MB",
    "mb": lambda value: f"{value:.0f} MB",
    "disk_mb": lambda value: f"{value:.1f} MB",
    "millions": lambda value: f"{value / 1e6:.2f} M",
    "perplexity": lambda value: f"{value:.3f}",
    "change": lambda value: signed(value, 2),
    "small_change": lambda value: signed(value, 4),
    "gb_s": lambda value: f"{value:.1f} GB/s",
    "celsius": lambda value: f"{value:.0f} \u00b0C",
    "share": lambda value: f"{value:.1%}",
    "agreement": lambda value: f"{value:.2%}",
    "scientific": lambda value: f"{value:.1e}",
    "milliseconds": lambda value: f"{value:.2f} ms",
    "seconds": lambda value: f"{value:.1f} s",
    "duration": duration,
    "rate": lambda value: f"{value:,.0f}".replace(",", THIN),
    "count": lambda value: f"{value:,}".replace(",", THIN),
    "bits": lambda value: f"{value:.2f}",
    "times": lambda value: f"{value:.2f} \u00d7",
    "exact": lambda value: f"{value:g}",
}
TOTALS: dict[str, Callable[[list[float]], float]] = {"sum": sum, "max": max}


@dataclass(frozen=True)
class Shown:
    """A number on the page: where in the record it stands or what it is worked out from, its raw value, and what a person reads."""

    path: str
    value: float | None
    form: str
    worked_out: tuple[tuple[str, str], ...] = ()

    @property
    def text(self) -> str:
        return MISSING if self.value is None else FORMATS[self.form](self.value)

    @property
    def attributes(self) -> Markup:
        pairs = (("path", self.path), ("form", self.form), *self.worked_out)
        return Markup(" ").join(Markup('data-{}="{}"').format(name, value) for name, value in pairs)

    def in_text(self) -> Markup:
        """For running text and tables."""
        return Markup('<data {} value="{}">{}</data>').format(self.attributes, json.dumps(self.value), self.text)

    def in_drawing(self) -> Markup:
        """For a text of an SVG."""
        return Markup('<tspan {} data-value="{}">{}</tspan>').format(self.attributes, json.dumps(self.value), self.text)


def value_at(record: dict, path: str):
    """What stands at ``path``: keys and positions joined by dots."""
    for step in path.split("."):
        record = record[int(step)] if isinstance(record, list) else record[step]
    return record


def values_at(record: dict, path: str) -> list:
    """What stands at each place of ``path``, in which one step is ``*``: every item of a list."""
    before, _, after = path.partition(".*.")
    return [value_at(item, after) for item in value_at(record, before)]


class Numbers:
    """Looks numbers up in one record. ``inside`` is where the record stands in a larger one, as a path with a dot behind it."""

    def __init__(self, record: dict, inside: str = "") -> None:
        self.record, self.inside = record, inside

    def at(self, path: str, form: str) -> Shown:
        """The number at ``path``, written as ``form`` of ``FORMATS`` says. KeyError where there is no such place."""
        return Shown(f"{self.inside}{path}", value_at(self.record, path), form)

    def over(self, path: str, other: str, form: str = "times") -> Shown:
        """The number at ``path`` divided by that at ``other``; none where either is missing."""
        value, divisor = value_at(self.record, path), value_at(self.record, other)
        ratio = value / divisor if value is not None and divisor else None
        return Shown(f"{self.inside}{path}", ratio, form, (("over", f"{self.inside}{other}"),))

    def total(self, path: str, form: str, kind: str = "sum") -> Shown:
        """The sum or the largest of what stands at ``path`` with its ``*``; none where one of them is missing."""
        values = values_at(self.record, path)
        known = bool(values) and None not in values
        return Shown(f"{self.inside}{path}", TOTALS[kind](values) if known else None, form, (("total", kind),))

    def in_text(self) -> dict[str, Callable[..., Markup]]:
        """What templates call: ``n(path, form)``, ``over(path, other)``, ``total(path, form, kind)``."""
        return {
            "n": lambda *asked: self.at(*asked).in_text(),
            "over": lambda *asked: self.over(*asked).in_text(),
            "total": lambda *asked: self.total(*asked).in_text(),
        }


def devices_of(report: dict) -> Iterator[tuple[str, dict, str, dict]]:
    """Path and entry of every artifact with path and entry of every device that it was tested on."""
    for place, artifact in enumerate(report["artifacts"]):
        for index, device in enumerate(artifact["devices"]):
            yield f"artifacts.{place}", artifact, f"artifacts.{place}.devices.{index}", device
