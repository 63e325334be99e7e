"""What a phone downloads: the bytes of a file after deflate, the compression of zip, APK and HTTP."""

import zlib
from pathlib import Path

LEVEL = 9  # the best that deflate does
BLOCK_BYTES = 2**20


def deflated_bytes(path: Path) -> int:
    """Bytes of the file's content after zlib at its best level, read in blocks so that memory does not grow with the file."""
    packer, total = zlib.compressobj(LEVEL), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            total += len(packer.compress(block))
    return total + len(packer.flush())
