"""Packs a folder so that the same files give the same bytes, whoever packs them and when."""

import shutil
import stat
import zipfile
from pathlib import Path

ZIP_DATE = (1980, 1, 1, 0, 0, 0)  # the earliest that the format has
FILE_MODE = stat.S_IFREG | 0o644


def write_zip(folder: Path, archive: Path, root: str) -> None:
    """Pack ``folder`` as ``root``: the same files give the same bytes, so names are sorted, and dates, owners and modes fixed."""
    with zipfile.ZipFile(archive, "w") as target:
        names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
        for name in names:
            path, entry = folder / name, zipfile.ZipInfo(f"{root}/{name}", ZIP_DATE)
            entry.compress_type = zipfile.ZIP_DEFLATED
            entry.create_system = 3  # Unix, whatever packs it
            entry.external_attr = FILE_MODE << 16
            entry.file_size = path.stat().st_size  # decides whether the entry needs 64-bit sizes
            with path.open("rb") as source, target.open(entry, "w") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)
