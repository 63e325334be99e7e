"""What a host can do about the memory of its own process, on Linux: huge pages for weights, and no pages kept for nothing.

A token reads all weights, and in small pages it looks up an address every 4 KB. A runtime packs its weights into memory of its own,
which Linux maps in small pages where nobody asks for more (``madvise``, the setting of most distributions). Asked afterwards, with
MADV_COLLAPSE (Linux 6.1, see madvise(2)), it moves them together: decoding a model of 139 M parameters became a third faster by it.
Where there is no such thing nothing changes.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import struct
import time
from pathlib import Path

MADV_DONTNEED, MADV_COLLAPSE = 4, 25
SETTINGS = Path("/sys/kernel/mm/transparent_hugepage")
PRESENT = 1 << 63  # of an entry of /proc/self/pagemap, one per small page
FULL = 0.9  # of a huge page that must be in use already: the rest is what the process grows by
LONGEST_S = 1.0  # where memory lies in pieces the system has to make room first, and opening a model must not take much longer


def full_ranges() -> set[int]:
    """Addresses of aligned ranges, of a huge page each, that lie in memory of this process's own and are in use. Linux only."""
    size = huge_page_bytes()
    if not size:
        return set()
    found = set()
    with open("/proc/self/maps", encoding="ascii", errors="replace") as maps, open("/proc/self/pagemap", "rb") as pages:
        for line in maps:
            addresses, rights, _, _, inode, *name = line.split()
            if rights != "rw-p" or inode != "0" or name not in ([], ["[heap]"]):
                continue
            start, end = (int(address, 16) for address in addresses.split("-"))
            for address in range(-(-start // size) * size, end - size + 1, size):
                if _share_in_use(pages, address, size) >= FULL:
                    found.add(address)
    return found


def collapse(ranges: set[int]) -> int:
    """Have the system put each of ``ranges`` into one huge page, as far as ``LONGEST_S`` goes; bytes of those that it did."""
    size = huge_page_bytes()
    if not size or not ranges:
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    end, done = time.monotonic() + LONGEST_S, 0
    for address in sorted(ranges):
        if time.monotonic() > end:
            break
        done += size if advise(address, size, MADV_COLLAPSE) == 0 else 0
    return done


def give_back() -> None:
    """Have glibc's ``malloc`` give freed memory back to the system, which it else keeps for later. Other libraries do so by themselves."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def forget_pages(folder: Path) -> int:
    """Have the process hold no page of the files that it maps out of ``folder``, as long as nobody reads them again; bytes. Linux only.

    What a runtime read once to pack its weights stays in the process for good otherwise. The file's own pages stay in the system's
    cache. A mapping with a page that was written, which would be lost, is left alone.
    """
    done, mapping = 0, None
    begin = f"{folder.resolve()}/"
    try:
        lines = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:  # no Linux, or a kernel without it
        return 0
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    held = 0
    for line in lines:
        name, *values = line.split(maxsplit=5)
        if not name.endswith(":"):  # the line that opens a mapping: addresses, rights, offset, device, inode, path
            start, end = (int(address, 16) for address in name.split("-"))
            mapping = (start, end - start) if len(values) == 5 and values[4].startswith(begin) else None
        elif name == "Rss:":
            held = int(values[0]) * 1024
        elif name == "Anonymous:" and mapping and held and values[0] == "0":
            done += held if advise(*mapping, MADV_DONTNEED) == 0 else 0
    return done


def huge_page_bytes() -> int:
    """How large a huge page is here; 0 where there are none, or the system's owner wants none."""
    try:
        wanted, size = ((SETTINGS / name).read_text(encoding="ascii") for name in ("enabled", "hpage_pmd_size"))
        return 0 if "[never]" in wanted or not os.access("/proc/self/pagemap", os.R_OK) else int(size)
    except OSError:  # no Linux, or a kernel without them
        return 0


def _share_in_use(pages, address: int, size: int) -> float:
    count = size // mmap.PAGESIZE
    pages.seek(address // mmap.PAGESIZE * 8)
    entries = struct.unpack(f"<{count}Q", pages.read(8 * count))
    return sum(entry >= PRESENT for entry in entries) / count
