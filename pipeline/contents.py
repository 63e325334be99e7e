"""The files of a bundle, folder or zip, looked at without trusting them: names and sizes first, bytes in blocks after.

A zip, whole or in parts, is judged by its directory before a byte of it is unpacked: paths that leave the folder, links, and sizes
that a bundle cannot have.
"""

import os
import shutil
import stat
import struct
import tempfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from models.errors import UserError
from pipeline.zip_parts import is_part, joined, parts_beside

MAX_INFLATION = 200  # a bundle unpacks to a few times its size; a bomb to a thousand times
MAX_FILES = 10_000  # a bundle has about a hundred
BLOCK_BYTES = 1 << 20
UNPRINTABLE = "a name with characters that cannot be shown, which no bundle has"
BROKEN = (  # what reading a damaged zip may raise
    zipfile.BadZipFile, zlib.error, struct.error, EOFError, NotImplementedError, RuntimeError, OSError, ValueError, OverflowError,
)  # fmt: skip


@dataclass(frozen=True)
class Contents:
    """The files of a folder or a zip: size by path, faults of the names, and a way to read one in blocks."""

    sizes: dict[str, int]
    faults: list[str]
    blocks: Callable[[str], Iterator[bytes]]
    packed_bytes: int | None


@contextmanager
def opened(path: Path) -> Iterator[Contents]:
    """The contents of a bundle. UserError when ``path`` is neither a folder, nor a zip, nor a part of one beside the others."""
    if path.is_dir():
        yield folder_contents(path)
        return
    if not path.is_file():
        raise UserError(f"{path}: no such bundle; give the folder or the zip that `pocketlm bundle` wrote")
    with ExitStack() as stack:
        parts = parts_beside(path) if is_part(path) else [path]
        try:
            archive = stack.enter_context(zipfile.ZipFile(stack.enter_context(joined(parts)) if is_part(path) else path))
        except BROKEN as error:
            hint = f", perhaps parts after {parts[-1].name} are missing" if is_part(path) else ""
            raise UserError(f"{path}: no zip that can be read ({error}{hint}); give the bundle's folder or zip") from error
        yield zip_contents(archive, sum(part.stat().st_size for part in parts))


def folder_contents(folder: Path) -> Contents:
    """Files of a folder; links and special files are faults and are not followed."""
    sizes, faults = {}, []
    for place, folders, files in os.walk(folder, followlinks=False):
        for name in sorted([*folders, *files]):
            path = Path(place) / name
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if not relative.isprintable():
                faults.append(f"{relative!a}: {UNPRINTABLE}")
            elif stat.S_ISREG(mode):
                sizes[relative] = path.lstat().st_size
            elif not stat.S_ISDIR(mode):
                faults.append(f"{relative}: {'a link' if stat.S_ISLNK(mode) else 'a special file'}, which no bundle has")

    def blocks(name: str) -> Iterator[bytes]:
        descriptor = os.open(folder / name, os.O_RDONLY | os.O_NOFOLLOW)
        with open(descriptor, "rb") as file:
            yield from iter(lambda: file.read(BLOCK_BYTES), b"")

    return Contents(sizes, faults[:MAX_FILES] + too_many(len(sizes)), blocks, None)


def too_many(count: int) -> list[str]:
    return [f"{count} files, which no bundle has"] if count > MAX_FILES else []


def zip_contents(archive: zipfile.ZipFile, packed_bytes: int) -> Contents:
    """Files of a zip by its directory, below the one folder that they all lie in; nothing is unpacked."""
    sizes, entries = {}, {}
    faults = too_many(len(archive.infolist()))
    roots = {entry.filename.split("/")[0] for entry in archive.infolist()}
    for entry in archive.infolist():
        fault = entry_fault(entry)
        if fault:
            faults.append(f"{entry.filename!a}: {fault}")
            continue
        if entry.is_dir():
            continue
        name = entry.filename.split("/", 1)[1] if len(roots) == 1 and "/" in entry.filename else entry.filename
        if name in sizes:
            faults.append(f"{name}: twice in the zip")
        sizes[name], entries[name] = entry.file_size, entry
    if sum(sizes.values()) > MAX_INFLATION * packed_bytes:
        declared = sum(sizes.values())
        faults.append(f"the zip: {packed_bytes} bytes that unpack to {declared}, more than {MAX_INFLATION} times as many")

    def blocks(name: str) -> Iterator[bytes]:
        with archive.open(entries[name]) as file:  # gives no more than the declared size and checks the CRC at its end
            yield from iter(lambda: file.read(BLOCK_BYTES), b"")

    return Contents(sizes, faults, blocks, packed_bytes)


def entry_fault(entry: zipfile.ZipInfo) -> str | None:
    """Why an entry may not be unpacked, or None."""
    original = entry.orig_filename
    if not entry.filename.isprintable():
        return UNPRINTABLE
    if original.startswith(("/", "\\")) or "\\" in original or ":" in original or "\0" in original:
        return "a path that leaves the folder"
    if ".." in PurePosixPath(original).parts:
        return "a path that leaves the folder"
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        return "a link or special file, which no bundle has"
    if entry.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"packed by method {entry.compress_type}, which no bundle is"
    if entry.flag_bits & 1:
        return "encrypted, which no bundle is"
    return None


def read(contents: Contents, name: str) -> bytes:
    return b"".join(contents.blocks(name))


@contextmanager
def unpacked(contents: Contents, names: list[str]) -> Iterator[Path]:
    """A temporary folder with the files ``names``, all of them checked before. UserError without room for them."""
    with tempfile.TemporaryDirectory(prefix="bundle-") as scratch:
        needed, free = sum(contents.sizes[name] for name in names), shutil.disk_usage(scratch).free
        if needed > free:
            raise UserError(f"no room to unpack {needed / 1e6:.0f} MB, {free / 1e6:.0f} MB are free; make room and run again")
        for name in names:
            target = Path(scratch) / name
            target.parent.mkdir(parents=True, exist_ok=True)
            with target.open("wb") as file:
                for block in contents.blocks(name):
                    file.write(block)
        yield Path(scratch)
