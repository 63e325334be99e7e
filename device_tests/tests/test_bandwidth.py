"""Memory bandwidth: what is counted, how much is read and when it refuses. No speed is asserted: it is this machine's."""

import json
import subprocess
import sys
import threading

import numpy as np
import pytest

from device_tests import bandwidth
from device_tests.devices.local import PACKAGE_ROOT
from device_tests.errors import DeviceTestError


@pytest.mark.parametrize("name", sorted(bandwidth.READERS))
def test_every_way_to_read_reads_every_byte(name):
    """Whichever four bytes become larger, the answer changes: none of them can have been skipped."""
    reader = bandwidth.READERS[name]
    array = np.ones(64, dtype=np.float32)
    plain = reader(array)
    for place in range(array.size):
        changed = array.copy()
        changed[place] = 7.0
        assert reader(changed) != plain, place


def test_bytes_of_all_threads_over_the_time_from_first_start_to_last_end(monkeypatch):
    """A clock that ticks once per question: with one thread start and end are a tick apart, with three at most five."""
    ticks = iter(range(10**6))
    monkeypatch.setattr(bandwidth.time, "perf_counter", lambda: next(ticks))
    arrays = [np.zeros(1000, dtype=np.float32) for _ in range(3)]
    assert bandwidth._seconds(lambda array: array.sum(), arrays[:1]) == 1
    assert 3 <= bandwidth._seconds(lambda array: array.sum(), arrays) <= 5
    monkeypatch.setattr(bandwidth, "_seconds", lambda reader, given: 0.5 + 0.25 * (next(ticks) % 2))
    assert bandwidth._fastest(lambda array: None, arrays) == 3 * 4000 / 0.5


def test_all_threads_read_at_the_same_time():
    """Readers that wait for each other: one after the other they would wait in vain."""
    met = threading.Barrier(3, timeout=20)
    bandwidth._seconds(lambda array: met.wait(), [np.zeros(1)] * 3)


@pytest.mark.parametrize(
    ("cache_mb", "free_mb", "threads", "expected_mb"),
    [
        (32, 16000, 1, 256),  # eight caches, which is also the most
        (2, 4000, 4, 32),  # never fewer than 32 MiB
        (8, 4000, 4, 64),
        (None, 4000, 4, 32),  # a board that does not tell its caches
        (32, None, 2, 256),  # nor its memory
        (32, 1100, 2, 131),  # a quarter of what is free, for both together
    ],
)
def test_the_size_follows_caches_and_free_memory(monkeypatch, cache_mb, free_mb, threads, expected_mb):
    monkeypatch.setattr(bandwidth, "largest_cache_bytes", lambda: cache_mb and cache_mb << 20)
    monkeypatch.setattr(bandwidth, "condition", lambda: {"free_memory_mb": free_mb})
    size = bandwidth.bytes_per_thread(threads)
    assert size >> 20 == expected_mb and size % 4096 == 0


def test_what_cannot_be_measured_is_one_line(monkeypatch):
    with pytest.raises(DeviceTestError, match="0 threads; give 1 or more"):
        bandwidth.measure(0)
    monkeypatch.setattr(bandwidth, "condition", lambda: {"free_memory_mb": 100.0})
    with pytest.raises(DeviceTestError, match="100 MB of memory are free, too few to measure it with 4 threads; end"):
        bandwidth.measure(4)


def test_the_command_measures_this_machine():
    command = [sys.executable, "-m", "device_tests.bandwidth", "--threads"]
    done = subprocess.run([*command, "2"], cwd=PACKAGE_ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    record = json.loads(done.stdout)
    assert record["threads"] == 2 and record["gb_s"] > 0 and record["bytes_per_thread"] >= 32 << 20
    refused = subprocess.run([*command, "0"], cwd=PACKAGE_ROOT, capture_output=True, text=True, check=False)
    assert refused.returncode == 2 and refused.stderr == "0 threads; give 1 or more\n"
