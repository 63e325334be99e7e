"""Memory put together in huge pages and given back: what is taken, what is left alone, and that no number changes."""

import ctypes
import mmap
from pathlib import Path

import numpy as np
import pytest

from device_tests import process_memory
from device_tests.process_memory import collapse, forget_pages, full_ranges, give_back, huge_page_bytes

SIZE = huge_page_bytes()
linux = pytest.mark.skipif(not SIZE, reason="this system has no huge pages to ask for")


def block(huge_pages_long):
    """An array of the process's own memory that holds so many whole huge pages, and the address of the first."""
    array = np.frombuffer(mmap.mmap(-1, (huge_pages_long + 1) * SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS), np.uint8)
    return array, -(-array.ctypes.data // SIZE) * SIZE


@linux
def test_what_is_in_use_is_found_and_what_is_not_is_left_alone():
    """An empty range would cost memory that nobody asked for; one with a byte in every page is in use."""
    array, first = block(4)
    start = first - array.ctypes.data
    array[start : start + 2 * SIZE : mmap.PAGESIZE] = 1
    array[start + 2 * SIZE : start + 3 * SIZE : 2 * mmap.PAGESIZE] = 1
    assert {first, first + SIZE} <= full_ranges()
    assert not {first + 2 * SIZE, first + 3 * SIZE} & full_ranges()


@linux
def test_numbers_stay_as_they_were_in_huge_pages():
    array, first = block(4)
    array[:] = np.random.default_rng(0).integers(0, 256, array.size, dtype=np.uint8)
    before = array.copy()
    ranges = {first + SIZE * index for index in range(4)}
    collapsed = collapse(ranges)
    assert np.array_equal(array, before)
    assert collapsed in range(0, 4 * SIZE + 1, SIZE)
    told = int(next(line.split()[1] for line in open("/proc/self/smaps_rollup") if line.startswith("AnonHugePages:"))) * 1024
    assert told >= collapsed


@pytest.mark.parametrize("setting", ["always madvise [never]\n", None])
def test_a_system_that_wants_none_is_left_alone(tmp_path, monkeypatch, setting):
    monkeypatch.setattr(process_memory, "SETTINGS", tmp_path)
    if setting:
        (tmp_path / "enabled").write_text(setting)
        (tmp_path / "hpage_pmd_size").write_text("2097152\n")
    assert huge_page_bytes() == 0 and full_ranges() == set() and collapse({0}) == 0


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="only glibc keeps what it is given back")
def test_freed_memory_goes_back_to_the_system():
    """Blocks below the size that malloc maps by themselves, with every other one kept: nothing is freed at the end of the heap."""
    blocks = [np.ones(100_000, np.uint8) for _ in range(800)]
    del blocks[::2]
    before = anonymous_bytes()
    give_back()
    assert before - anonymous_bytes() > 20e6
    assert all(block.all() for block in blocks)


def anonymous_bytes():
    status = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in status if line.startswith("RssAnon:")))


def resident(path):
    """kB of ``path`` that this process holds."""
    lines = Path("/proc/self/smaps").read_text().splitlines()
    mine = [index for index, line in enumerate(lines) if line.endswith(str(path))]
    return sum(int(next(line for line in lines[index:] if line.startswith("Rss:")).split()[1]) for index in mine)


@linux
def test_pages_of_mapped_files_are_forgotten_but_for_those_that_were_written(tmp_path):
    """Read again they are as before; other folders' files, and what was changed in memory, stay."""
    (tmp_path / "other").mkdir()
    maps = {}
    for name in ("read", "written", "other/read"):
        (tmp_path / name).write_bytes(np.random.default_rng(0).bytes(64 * mmap.PAGESIZE))
        with (tmp_path / name).open("rb") as file:
            maps[name] = np.frombuffer(mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE), np.uint8)
    expected = int(maps["read"].sum(dtype=np.int64))
    assert int(maps["other/read"].sum(dtype=np.int64)) == int(maps["written"].sum(dtype=np.int64)) == expected
    maps["written"][5] ^= 255
    changed = int(maps["written"][5])
    assert forget_pages(tmp_path / "other") == 64 * mmap.PAGESIZE
    assert resident(tmp_path / "other" / "read") == 0 < resident(tmp_path / "read")
    assert forget_pages(tmp_path) >= 64 * mmap.PAGESIZE
    assert resident(tmp_path / "read") == 0 < resident(tmp_path / "written")
    assert int(maps["read"].sum(dtype=np.int64)) == expected and maps["written"][5] == changed
