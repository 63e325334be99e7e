"""The runner: content decides what runs, a result is whole or absent, a failure leaves nothing but its log."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from models.errors import GateError, UserError
from pipeline import fingerprint, runner
from pipeline.stages import Stage
from pipeline.tests.sample_stage import SampleSettings

MODULE = "pipeline.tests.sample_stage"
ROAD = (Stage("first", MODULE, content=("calls",)), Stage("second", MODULE, {"before": "first"}, content=("calls",)))


@pytest.fixture(autouse=True)
def road(monkeypatch):
    monkeypatch.setattr(runner, "STAGES", ROAD)


def recipe(first: dict | None = None, second: dict | None = None):
    return SimpleNamespace(artifacts=(), first=SampleSettings(**(first or {})), second=SampleSettings(**(second or {})))


def run(work: Path, **settings):
    told = []
    folders, runs = runner.run_stages(recipe(**settings), work, lambda stage, state: told.append((stage, state.split()[0])))
    return folders, runs, told


def leftovers(work: Path) -> list[str]:
    return sorted(path.name for path in work.rglob("*") if ".draft" in path.name or path.name.endswith(".said.json"))


def test_second_run_does_nothing_and_keeps_what_the_first_one_cost(tmp_path):
    folders, runs, told = run(tmp_path)
    assert (folders["second"] / "result.txt").read_text() == "2"
    assert told == [("first", "runs"), ("first", "ran"), ("second", "runs"), ("second", "ran")]
    again, cached, told_again = run(tmp_path)
    assert again == folders and told_again == [("first", "cached"), ("second", "cached")]
    assert [item.seconds for item in cached] == [item.seconds for item in runs] and all(item.cached for item in cached)
    assert all(item.peak_rss_mb > 1 for item in runs) and leftovers(tmp_path) == []


def test_plan_names_the_setting_that_changed_and_the_stages_behind_it(tmp_path):
    run(tmp_path)
    planned = runner.plan(recipe(second={"value": 7}), tmp_path)
    assert [item.cached for item in planned] == [True, False]
    assert planned[1].reasons == ("settings.value: 1 -> 7",)
    behind = runner.plan(recipe(first={"value": 7}), tmp_path)
    assert [item.reasons for item in behind] == [("settings.value: 1 -> 7",), ("inputs before changed",)]


@pytest.mark.parametrize(
    ("ends", "error", "words"),
    [
        ("user", UserError, "second: value is wrong; take another"),
        ("gate", GateError, "second: 0.5 over the limit 0.1"),
        ("disk", UserError, "no room left on the disk"),
        ("bug", runner.StageDied, "KeyError"),
        ("killed", runner.StageDied, "want of memory"),
    ],
)
def test_a_failure_is_told_and_leaves_nothing_half_written(tmp_path, ends, error, words):
    with pytest.raises(error, match=words):
        run(tmp_path, second={"ends": ends})
    assert leftovers(tmp_path) == [] and not list(tmp_path.glob("second/*/"))
    _, _, told = run(tmp_path)
    assert told[0] == ("first", "cached")


def test_a_stage_goes_on_from_what_it_left(tmp_path):
    with pytest.raises(runner.StageDied):
        run(tmp_path, first={"ends": "resumes"})
    folders, _, _ = run(tmp_path, first={"ends": "resumes"})
    assert not (folders["first"] / ".resume").exists() and leftovers(tmp_path) == []


def start(work: Path, settings: dict) -> subprocess.Popen:
    """The same road in another Python process."""
    code = (
        "import json, sys; from pathlib import Path; from types import SimpleNamespace\n"
        "from pipeline import runner; from pipeline.tests import test_runner\n"
        "runner.STAGES = test_runner.ROAD\n"
        f"runner.run_stages(test_runner.recipe(first={settings!r}), Path({str(work)!r}), lambda *_: None)\n"
    )
    environment = runner.with_our_path(dict(os.environ))
    return subprocess.Popen([sys.executable, "-c", code], env=environment)


def test_two_runs_at_once_end_with_one_result(tmp_path):
    calls = tmp_path / "calls.txt"
    calls.touch()
    processes = [start(tmp_path / "work", {"calls": str(calls)}) for _ in range(2)]
    assert [process.wait(120) for process in processes] == [0, 0]
    assert calls.read_text().count("\n") == 1
    assert leftovers(tmp_path) == []


def test_a_killed_run_takes_its_stage_along_and_the_next_run_is_whole(tmp_path):
    process = start(tmp_path, {"ends": "sleeps"})
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("first/*.draft/result.txt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    while writers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not writers(tmp_path), "the stage's process outlived the run that started it"
    assert not list(tmp_path.glob("first/*/stage.json"))
    run(tmp_path)


def test_a_disk_that_is_really_full_is_the_users_to_mend(tmp_path):
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)], capture_output=True, text=True, check=False)
    if mounted.returncode:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    try:
        with pytest.raises(UserError, match="no room left on the disk"):
            run(small, first={"ends": "fills"})
        assert leftovers(small) == []
    finally:
        subprocess.run(["umount", str(small)], check=True)


def writers(work: Path) -> list[str]:
    """Command lines of running processes that write below ``work``."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(work) in line and "stage_process" in line:
            found.append(line)
    return found


def test_comments_and_docstrings_do_not_count_but_code_does(tmp_path, monkeypatch):
    package = tmp_path / "pipeline"
    package.mkdir()
    monkeypatch.setattr(fingerprint, "ROOT", tmp_path)

    def hash_of(source: str) -> str:
        (package / "sample.py").write_text(source)
        fingerprint.parsed.cache_clear()
        return fingerprint.parsed("pipeline.sample")[0]

    plain = hash_of("def f():\n    'Doc.'\n    return 1\n")
    assert hash_of("# why\ndef f():\n    'Other words.'\n    return 1  # one\n") == plain
    assert hash_of("def f():\n    'Doc.'\n    return 2\n") != plain
    fingerprint.parsed.cache_clear()


def test_code_of_a_stage_reaches_through_our_imports_and_finds_the_libraries():
    code, foreign = fingerprint.code_of("pipeline.stage_process")
    assert "pipeline.stage_process" in code and "ctypes" in foreign
    code, foreign = fingerprint.code_of("pipeline.recipe")
    assert "models.errors" not in code, "what only words a message must not invalidate results"
    assert fingerprint.library_versions(foreign)["pydantic"]


def test_content_decides_not_the_path_or_the_date(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    for folder in (one, two):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
    assert fingerprint.tree_sha256(one) == fingerprint.tree_sha256(two)
    os.utime(two / "config.json", (0, 0))
    assert fingerprint.tree_sha256(one) == fingerprint.tree_sha256(two)
    (two / "config.json").write_text('{"a": 1}')
    assert fingerprint.tree_sha256(one) != fingerprint.tree_sha256(two)


def test_record_holds_the_parts_that_made_the_key(tmp_path):
    folders, _, _ = run(tmp_path)
    record = json.loads((folders["first"] / runner.RECORD).read_text())
    assert fingerprint.key_of(ROAD[0], record["parts"]) == record["key"] == folders["first"].name


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "mallopt"), reason="only glibc keeps what it is given back")
def test_a_stage_that_holds_large_matrices_gives_them_back():
    """Every second of 100 blocks is freed, after a larger one that has the C library keep what is freed from then on."""
    program = """
import numpy as np
from pipeline.stage_process import return_large_blocks
{call}
first = np.ones(16 << 20, np.uint8)
del first
blocks = [np.ones(2 << 20, np.uint8) for _ in range(100)]
blocks = blocks[::2]
print(next(line.split()[1] for line in open("/proc/self/status") if line.startswith("VmRSS")))
"""
    held = []
    for call in ("", "return_large_blocks()"):
        made = subprocess.run([sys.executable, "-c", program.format(call=call)], capture_output=True, check=True)
        held.append(int(made.stdout))
    assert held[0] - held[1] > 90_000, held  # kB
