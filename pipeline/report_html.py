"""``report.html``: the report as one self-contained page, readable on a phone, light and dark, without scripts or network.

The pages of device tests and of comparisons are made from the same parts.
"""

import json
from dataclasses import dataclass

from markupsafe import Markup, escape

from pipeline.device_report import DeviceReport
from pipeline.rendering import environment
from pipeline.report import Report, report_json
from pipeline.report_headline import lines
from pipeline.report_numbers import Numbers, devices_of, value_at
from pipeline.report_plots import latency_plot, quality_plot, sensitivity_plot, size_plot


@dataclass(frozen=True)
class MatrixLine:
    """An artifact in a runtime: the path of what it did on each device that was held against the machine that built it."""

    label: str
    paths: dict[str, str]


@dataclass(frozen=True)
class Matrix:
    """Artifacts by devices."""

    devices: tuple[str, ...]
    lines: tuple[MatrixLine, ...]
    local_isa: str | None


def report_html(report: Report) -> str:
    """The whole page as text; the same report gives the same page."""
    data = json.loads(report_json(report))  # the very values that report.json has, null where a number is none
    numbers = Numbers(data)
    return page(
        "report.html.j2",
        data,
        **parts(data),
        size_plot=size_plot(numbers),
        quality_plot=quality_plot(numbers),
        sensitivity_plot=sensitivity_plot(numbers),
        recipe_lines=recipe_lines(data["recipe"]),
    )


def device_report_html(report: DeviceReport) -> str:
    """The page of a test on devices."""
    data = json.loads(report.model_dump_json())
    return page("device_report.html.j2", data, **parts(data))


def page_of(report: Report | DeviceReport) -> str:
    """The page of a record, whichever it is."""
    return report_html(report) if isinstance(report, Report) else device_report_html(report)


def parts(data: dict) -> dict:
    """What the pages of reports have in common: the lines on top, the latencies, the matrix of processors."""
    names = tuple(dict.fromkeys(device["device"] for *_, device in devices_of(data)))
    return {"lines": lines(data), "latency_plot": latency_plot(Numbers(data)), "matrix": matrix_of(data), "device_names": names}


def page(template: str, data: dict, **more) -> str:
    """A template filled with a record; every number is looked up in it by its path."""
    templates = environment(autoescape=True)
    templates.filters["wrap"] = wrapped
    templates.globals.update(**Numbers(data).in_text(), value=lambda path: value_at(data, path), emulated=emulated, **more)
    return templates.get_template(template).render(report=data)


def wrapped(name: str) -> Markup:
    """A name that may be broken behind an underscore, where a line is too short for all of it."""
    return Markup("_<wbr>").join(name.split("_"))


def emulated(report: dict) -> list[str]:
    """Names of the emulated devices on which something ran, each with its instruction set."""
    found = (f"{device['device']}, {device['isa']}" for *_, device in devices_of(report) if device["emulated"])
    return list(dict.fromkeys(found))


def matrix_of(report: dict) -> Matrix:
    """Which artifact was held against the building machine's answers on which device."""
    found: dict[str, dict[str, str]] = {}
    devices, isas = [], []
    for _, artifact, path, device in devices_of(report):
        line = found.setdefault(f"{artifact['name']} in {device['runtime']}", {})
        if device["against_local"]:
            name = f"{device['device']}, {device['isa']}{', emulated' if device['emulated'] else ''}"
            line[name] = path
            devices.append(name)
            isas.append(device["against_local"]["local_isa"])
    kept = tuple(MatrixLine(label, paths) for label, paths in found.items())
    return Matrix(tuple(dict.fromkeys(devices)), kept, isas[0] if isas else None)


def recipe_lines(recipe: dict, table: str = "") -> Markup:
    """The recipe as ``table.key = value`` lines."""
    found = []
    for key, value in recipe.items():
        name = f"{table}{key}"
        found.append(recipe_lines(value, f"{name}.") if isinstance(value, dict) else escape(f"{name} = {json.dumps(value)}\n"))
    return Markup("").join(found)
