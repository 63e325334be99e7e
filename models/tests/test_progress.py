"""The bar that people see: drawn on a terminal with the time left, nowhere else."""

import os
import re
import time

from models.progress import PROGRESS_FD, track


def test_terminal_sees_count_and_time_left(monkeypatch):
    ours, theirs = os.openpty()
    monkeypatch.setenv(PROGRESS_FD, str(theirs))
    done = []
    for item in track(range(8), "recovering"):
        time.sleep(0.3)  # the bar is drawn ten times a second, and estimates from what it saw
        done.append(item)
        if item == 5:
            break
    os.close(theirs)
    drawn = os.read(ours, 100_000).decode()
    os.close(ours)
    assert done == [*range(6)] and "recovering" in drawn and re.search(r"[3-5]/8", drawn)
    assert re.search(r"m0:00:0[1-3]\b", drawn)  # time left, in a few seconds' range of the true one


def test_nobody_looking_means_nothing_drawn(monkeypatch, tmp_path):
    with (tmp_path / "log").open("w") as log:
        monkeypatch.setenv(PROGRESS_FD, str(log.fileno()))
        assert list(track(range(3), "recovering")) == [0, 1, 2]
    assert (tmp_path / "log").read_text() == ""
