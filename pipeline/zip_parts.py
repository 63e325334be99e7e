"""A zip as several files, each small enough for a store: ``<name>.zip.001``, ``.002`` and so on, plain cuts of one zip.

``cat <name>.zip.* > <name>.zip`` joins them anywhere; ``joined`` reads them as one file without joining them on the disk.
"""

import io
import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import BinaryIO

from models.errors import UserError

PART = re.compile(r"(?P<whole>.+\.zip)\.(?P<number>\d{3})")
MAX_PARTS = 999
BLOCK_BYTES = 1 << 20


def part_path(archive: Path, number: int) -> Path:
    """Where part ``number``, from 1, of a zip lies."""
    return archive.with_name(f"{archive.name}.{number:03d}")


def is_part(path: Path) -> bool:
    return PART.fullmatch(path.name) is not None


def parts_beside(path: Path) -> list[Path]:
    """All parts of the zip that ``path`` is a part of, in order. UserError where one in between is missing."""
    whole = path.with_name(PART.fullmatch(path.name)["whole"])
    found = existing_parts(whole)
    for number, part in enumerate(found, 1):
        if part != part_path(whole, number):
            raise UserError(f"{part_path(whole, number)}: this part is missing; put all parts of {whole.name} into one folder")
    return found


def existing_parts(archive: Path) -> list[Path]:
    """The files beside ``archive`` that have the names of its parts, by number."""
    if not archive.parent.is_dir():
        return []
    return sorted(path for path in archive.parent.iterdir() if is_part(path) and PART.fullmatch(path.name)["whole"] == archive.name)


def part_count(size: int, part_bytes: int) -> int:
    """How many parts a zip of ``size`` bytes has. UserError where there are more than can be named."""
    count = -(-size // part_bytes)
    if count > MAX_PARTS:
        raise UserError(f"--split-mb {part_bytes / 1e6:g}: {count} parts, {MAX_PARTS} can be named; give a larger one")
    return count


def split(archive: Path, part_bytes: int) -> list[Path]:
    """Cut ``archive``, which stays, into parts of at most ``part_bytes``; parts of an earlier zip go. Returns them in order."""
    remove_parts(archive)
    parts = [part_path(archive, number) for number in range(1, part_count(archive.stat().st_size, part_bytes) + 1)]
    with archive.open("rb") as source:
        for part in parts:
            draft = part.with_name(f".{part.name}.draft")
            with draft.open("wb") as target:
                left = part_bytes
                while left and (block := source.read(min(left, BLOCK_BYTES))):
                    target.write(block)
                    left -= len(block)
            os.replace(draft, part)
    return parts


def remove_parts(archive: Path) -> None:
    """Parts that no longer belong to ``archive``: joined with others they would be no zip, or an older one."""
    for part in existing_parts(archive):
        part.unlink()


def parts_are(archive: Path, part_bytes: int | None) -> bool:
    """Whether the parts beside ``archive`` are its own, cut at ``part_bytes``; None: whether there are none."""
    parts = existing_parts(archive)
    if part_bytes is None:
        return not parts
    size = archive.stat().st_size
    wanted = [min(part_bytes, size - start) for start in range(0, size, part_bytes)]
    names = [part_path(archive, number) for number in range(1, len(wanted) + 1)]
    if parts != names or [part.stat().st_size for part in parts] != wanted:
        return False
    with archive.open("rb") as whole, joined(parts) as cut:
        while block := whole.read(BLOCK_BYTES):
            if block != cut.read(len(block)):
                return False
    return True


@contextmanager
def joined(parts: list[Path]) -> Iterator[BinaryIO]:
    """The parts, one after the other, as one file that can be read from anywhere."""
    with ExitStack() as stack:
        files = [stack.enter_context(part.open("rb")) for part in parts]
        yield io.BufferedReader(Joined(files), BLOCK_BYTES)


class Joined(io.RawIOBase):
    """Several open files as one, for reading."""

    def __init__(self, files: list[BinaryIO]) -> None:
        self._files, self._position = files, 0
        self._sizes = [os.fstat(file.fileno()).st_size for file in files]

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: sum(self._sizes)}[whence]
        if base + offset < 0:
            raise ValueError(f"a position before the beginning: {base + offset}")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        """Fill ``buffer`` from the file that the position lies in; 0 at the end."""
        start = 0
        for file, size in zip(self._files, self._sizes, strict=True):
            if self._position < start + size:
                file.seek(self._position - start)
                count = file.readinto(memoryview(buffer)[: start + size - self._position])
                self._position += count
                return count
            start += size
        return 0
