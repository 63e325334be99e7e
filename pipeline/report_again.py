"""A report's page made again from its numbers, so that one can look at it without trusting the page that came along."""

from dataclasses import dataclass
from pathlib import Path

from models.errors import UserError
from pipeline.device_report import is_bundle, read_record, record_in, write_whole
from pipeline.manifest import MANIFEST
from pipeline.report_html import page_of
from pipeline.verify import bundle_folder

PAGE = "report.html"


@dataclass(frozen=True)
class Again:
    """Where the page is, and whether a bundle's own has the same bytes; None where the numbers came without a page."""

    page: Path
    same: bool | None


def write_again(path: Path, out: Path | None) -> Again:
    """Write the page of the record at ``path``, which is a bundle, a report.json or a device report, to ``out``.

    Without ``out`` it stands beside the bundle or the record. UserError where there is no record, or where the page would change a
    bundle; GateError where the bundle is not as it was built.
    """
    bundle = path.parent if path.name == "report.json" and is_bundle(path.parent) else path
    if is_bundle(bundle):
        with bundle_folder(bundle) as (folder, _):
            text, own = page_of(record_in(folder / "report.json", path)), folder / PAGE
            same = own.read_bytes() == text.encode() if own.is_file() else None
        place = out or bundle.with_name(f"{bundle.resolve().name.removesuffix('.zip')}-{PAGE}")
    else:
        text, same = page_of(read_record(path)), None
        place = out or (path / PAGE if path.is_dir() else path.with_suffix(".html"))
    if any((parent / MANIFEST).is_file() for parent in place.resolve().parents):
        raise UserError(f"{place}: lies in a bundle, whose files have to stay as they are; give another --out")
    write_whole(place, text)
    return Again(place, same)
