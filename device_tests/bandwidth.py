"""How fast this machine reads memory: the most that decoding, which reads every weight for every token, can be given.

python3 -m device_tests.bandwidth --threads 4        prints it as JSON

Counted are the bytes that numpy reads, of arrays that no cache holds; nothing is written but one number per array. The best of
several ways to read and of many repeats is taken, because everything that goes wrong only makes it slower.
"""

from __future__ import annotations

import argparse
import json
import sys
import threading
import time
from typing import Any, Callable

import numpy as np

from device_tests.board import condition, largest_cache_bytes
from device_tests.errors import DeviceTestError

MOST_BYTES, FEWEST_BYTES = 256 << 20, 32 << 20  # of a thread's array
CACHES = 8  # an array is as large as so many of the largest cache, so that little of it is still there at the next reading
MEMORY_SHARE = 4  # all arrays together take one of so many parts of the free memory
SECONDS, LEAST_REPEATS = 0.5, 5  # for each way to read
# numpy lets the other threads run in all of these. No matrix product: that would start threads of its own
READERS: dict[str, Callable[[np.ndarray], Any]] = {
    "or": lambda array: np.bitwise_or.reduce(array.view(np.int64)),
    "sum": lambda array: np.add.reduce(array.view(np.int64)),
    "max": lambda array: np.maximum.reduce(array.view(np.float32)),
}


def measure(threads: int) -> float:
    """GB/s (10^9 bytes per second) that ``threads`` threads read together, each an array of its own.

    DeviceTestError for a number of threads that is none, and where too little memory is free.
    """
    if threads < 1:
        raise DeviceTestError(f"{threads} threads; give 1 or more")
    size = bytes_per_thread(threads)
    # written once: pages that nobody wrote are all the same one, and that lies in the cache
    arrays = [np.full(size // 4, index, dtype=np.float32) for index in range(threads)]
    return max(_fastest(reader, arrays) for reader in READERS.values()) / 1e9


def bytes_per_thread(threads: int) -> int:
    """Size of each array, a multiple of 4096: much larger than the caches, but only a part of what is free."""
    wanted = min(MOST_BYTES, max(FEWEST_BYTES, CACHES * (largest_cache_bytes() or 0)))
    free = condition()["free_memory_mb"]
    size = wanted if free is None else min(wanted, int(free * 1e6) // MEMORY_SHARE // threads)
    if size < min(wanted, FEWEST_BYTES):
        raise DeviceTestError(f"{free:.0f} MB of memory are free, too few to measure it with {threads} threads; end other programs")
    return size // 4096 * 4096


def _fastest(reader: Callable[[np.ndarray], Any], arrays: list[np.ndarray]) -> float:
    """Bytes per second of the best repeat."""
    best, repeats, end = 0.0, 0, time.perf_counter() + SECONDS
    while repeats < LEAST_REPEATS or time.perf_counter() < end:
        best = max(best, sum(array.nbytes for array in arrays) / _seconds(reader, arrays))
        repeats += 1
    return best


def _seconds(reader: Callable[[np.ndarray], Any], arrays: list[np.ndarray]) -> float:
    """From the first thread's start to the last one's end, all of them let go at once."""
    together = threading.Barrier(len(arrays))
    times: list[tuple[float, float]] = []

    def read(array: np.ndarray) -> None:
        together.wait()
        start = time.perf_counter()
        reader(array)
        times.append((start, time.perf_counter()))

    workers = [threading.Thread(target=read, args=(array,)) for array in arrays]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return max(end for _, end in times) - min(start for start, _ in times)


def main(arguments: list[str] | None = None) -> int:
    """Measure and print; exit code 2 with one line where that cannot be done."""
    command = argparse.ArgumentParser(prog="python -m device_tests.bandwidth", description="GB/s that this machine reads from memory")
    command.add_argument("--threads", type=int, default=1, help="threads that read at once (default %(default)s)")
    given = command.parse_args(arguments)
    try:
        record = {"threads": given.threads, "bytes_per_thread": bytes_per_thread(max(1, given.threads)), "gb_s": measure(given.threads)}
    except DeviceTestError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    print(json.dumps(record))
    return 0


if __name__ == "__main__":
    sys.exit(main())
