"""The record of a test on devices: what ran where, how fast, and whether it agrees. ``pocketlm test --device`` writes it."""

import json
from pathlib import Path

from pydantic import Field

from device_tests.devices.campaign import Outcome
from models.errors import GateError, UserError
from pipeline.manifest import MANIFEST
from pipeline.report import Device, Entry, Report, Skipped, device_of
from pipeline.verify import bundle_folder

FORMAT_VERSION = 1


class Tested(Entry):
    """One artifact on every device that it was tested on."""

    name: str
    sha256: str | None = Field(description="of the bytes that were measured; null when no device could read them")
    devices: list[Device]


class DeviceReport(Entry):
    """The whole record."""

    format_version: int = FORMAT_VERSION
    name: str = Field(description="of the recipe or bundle")
    artifacts: list[Tested]
    boards: dict[str, dict | None] = Field(description="what each device is, as it says itself")
    skipped: list[Skipped]
    passed: bool = Field(description="every artifact passed wherever it was tested, and it was tested somewhere")


def device_report(name: str, outcome: Outcome) -> DeviceReport:
    """The outcome by artifact."""
    tested = []
    for artifact in dict.fromkeys(result["artifact"] for result in outcome.results):
        own = [result for result in outcome.results if result["artifact"] == artifact]
        sha256 = next((result["sha256"] for result in own if result["sha256"]), None)
        tested.append(Tested(name=artifact, sha256=sha256, devices=[device_of(result) for result in own]))
    passed = bool(tested) and all(device.passed for artifact in tested for device in artifact.devices)
    skipped = [Skipped(**entry) for entry in outcome.skipped]
    return DeviceReport(name=name, artifacts=tested, boards=outcome.boards, skipped=skipped, passed=passed)


def write_device_report(report: DeviceReport, path: Path, page: str) -> None:
    """As JSON at ``path`` and as a page beside it, each whole or not at all."""
    write_whole(path.with_suffix(".html"), page)
    write_whole(path, report.model_dump_json(indent=1) + "\n")


def write_whole(file: Path, text: str) -> None:
    """A file with this text, or none. UserError where it cannot be written."""
    draft = file.with_name(f"{file.name}.draft")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        draft.write_text(text, encoding="utf-8")
        draft.replace(file)
    except OSError as error:
        if draft.is_file():
            draft.unlink()
        raise UserError(f"{file}: cannot be written ({error.strerror}); give another place") from error


def read_record(path: Path) -> Report | DeviceReport:
    """The record in a bundle, folder or zip, whose every byte is checked first, or in a file of its own.

    UserError when there is none, GateError when a bundle is not as it was built.
    """
    if is_bundle(path):
        with bundle_folder(path) as (folder, _):
            return record_in(folder / "report.json", path)
    return record_in(path / "report.json" if path.is_dir() else path, path)


def is_bundle(path: Path) -> bool:
    """Whether ``path`` is a bundle's folder, or a file that can be no record by itself."""
    return (path / MANIFEST).is_file() or (path.is_file() and path.suffix != ".json")


def record_in(file: Path, named: Path) -> Report | DeviceReport:
    """The record in a file that the person calls ``named``."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        return (Report if "model" in record else DeviceReport).model_validate(record)
    except OSError as error:
        raise UserError(f"{named}: cannot be read ({error.strerror}); give a bundle, a report.json, or a device report") from error
    except (ValueError, TypeError) as error:
        raise UserError(f"{named}: no report of PocketLM ({str(error).splitlines()[0]}); give one that it wrote") from error


def raise_for(report: DeviceReport) -> None:
    """GateError with a line for each failure; UserError where nothing failed but a device was out of reach.

    A runtime that a device cannot have is told and fails nothing, unless nothing was left to test.
    """
    failures = [failure for artifact in report.artifacts for device in artifact.devices for failure in device.failures]
    skipped = [entry for entry in report.skipped if entry.runtime is None or not report.artifacts]
    lines = [f"{entry.device}: {entry.reason}" for entry in skipped]
    if failures:
        raise GateError("\n".join([*failures, *lines]))
    if lines:
        raise UserError("\n".join(lines))
