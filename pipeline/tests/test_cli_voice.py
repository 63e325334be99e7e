"""How much the command line says and where: a bar on a terminal, a line per stage elsewhere, --quiet, --verbose, --json, colours."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from device_tests.devices.campaign import Outcome, Plan
from models.progress import PROGRESS_FD
from pipeline import measure
from pipeline.runner import with_our_path

# The command line over two stages that cost nothing, in place of the real ones.
PROGRAM = """
from types import SimpleNamespace
from pipeline import cli, runner
from pipeline.stages import Stage
from pipeline.tests.sample_stage import SampleSettings
module = "pipeline.tests.sample_stage"
runner.STAGES = (Stage("first", module), Stage("second", module, {"before": "first"}))
cli.read_recipe = lambda *given: SimpleNamespace(artifacts=(), first=SampleSettings(), second=SampleSettings(ends=%r))
cli.main()
"""
COLOUR = re.compile(r"\x1b\[(?:\d+;)*[349]\d(?:;\d+)*m")  # ECMA-48, SGR: 30 to 49 and 90 to 97 are colours


def command(ends: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", PROGRAM % ends, *arguments]


def environment(**more: str) -> dict[str, str]:
    plain = {name: value for name, value in os.environ.items() if name not in ("NO_COLOR", "FORCE_COLOR", "COLUMNS")}
    return with_our_path({**plain, **more})


def pocketlm(folder: Path, *arguments: str, ends: str = "counts", **more: str) -> subprocess.CompletedProcess:
    return subprocess.run(command(ends, *arguments), cwd=folder, env=environment(**more), capture_output=True, text=True, check=False)


def on_terminal(folder: Path, *arguments: str, ends: str = "counts", **more: str) -> tuple[str, str]:
    """Standard output, and what a person saw on the terminal that standard error is."""
    ours, theirs = pty.openpty()
    told = environment(TERM="xterm-256color", COLUMNS="100", **more)
    process = subprocess.Popen(command(ends, *arguments), cwd=folder, env=told, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen = read_all(ours)
    output = process.communicate()[0].decode()
    assert process.returncode == 0, seen
    return output, seen


def read_all(descriptor: int) -> str:
    """What comes out of our side of a terminal until the other side is closed."""
    pieces = []
    try:
        while piece := os.read(descriptor, 65536):
            pieces.append(piece)
    except OSError:  # how Linux says that the other side was closed
        pass
    os.close(descriptor)
    return b"".join(pieces).decode(errors="replace")


def test_elsewhere_than_on_a_terminal_a_stage_is_one_line(tmp_path):
    done = pocketlm(tmp_path, "run")
    lines = done.stderr.splitlines()
    assert done.returncode == 0 and done.stdout == "" and len(lines) == 2, done.stderr
    for line, stage in zip(lines, ("first", "second"), strict=True):
        assert re.fullmatch(rf"  {stage} +ran \d+\.\d s, \d+ MB", line)
    assert [line.split() for line in pocketlm(tmp_path, "run").stderr.splitlines()] == [["first", "cached"], ["second", "cached"]]


def test_on_a_terminal_the_running_stage_has_a_bar_with_the_time_left(tmp_path):
    _, seen = on_terminal(tmp_path, "run")
    assert re.search(r"second +runs", seen) and re.search(r"counting.*[3-7]/8.*0:00:0[01]", seen)
    assert "a library says" not in seen


@pytest.mark.parametrize("arguments", [("--quiet", "run", "--json"), ("run", "--quiet", "--json"), ("run", "-q", "--json")])
def test_quiet_says_nothing_but_results(tmp_path, arguments):
    output, seen = on_terminal(tmp_path, *arguments)
    assert seen == "" and [stage["stage"] for stage in json.loads(output)["stages"]] == ["first", "second"]


def test_quiet_leaves_errors(tmp_path):
    done = pocketlm(tmp_path, "run", "--quiet", ends="user")
    assert done.returncode == 2 and done.stderr == "pocketlm: second: value is wrong; take another\n"


def test_verbose_says_why_where_and_what_a_broken_stage_printed(tmp_path):
    done = pocketlm(tmp_path, "run", "--verbose")
    assert "first runs: never run" in done.stderr and re.search(r"second lies in \S+/\.pocketlm/second/[0-9a-f]{16}", done.stderr)
    broken = pocketlm(tmp_path, "--verbose", "run", ends="bug")
    assert broken.returncode == 3 and "second runs: settings.ends: counts -> bug (the last time " in broken.stderr
    assert "Traceback" in broken.stderr and "KeyError: 'surprise'" in broken.stderr
    assert "Traceback" not in pocketlm(tmp_path, "run", ends="bug").stderr


def test_json_is_all_of_standard_output(tmp_path):
    found = json.loads(pocketlm(tmp_path, "run", "--json", ends="well").stdout)
    assert found["folders"].keys() == {"first", "second"} and {"seconds", "peak_rss_mb", "cached"} <= found["stages"][0].keys()


def test_no_color_is_honoured(tmp_path):
    _, coloured = on_terminal(tmp_path, "run", ends="counts")
    _, plain = on_terminal(tmp_path / "..", "run", "--work", str(tmp_path / "other"), NO_COLOR="1")
    assert COLOUR.search(coloured) and "counting" in plain and not COLOUR.search(plain)
    helps = [pocketlm(tmp_path, "--help", FORCE_COLOR="1", **more).stdout for more in ({}, {"NO_COLOR": "1"})]
    assert COLOUR.search(helps[0]) and not COLOUR.search(helps[1]) and "generate" in helps[1]


def test_shell_completion_knows_commands_options_and_values(tmp_path):
    def completed(line: str) -> list[str]:
        words = line.split(" ")
        more = {"_POCKETLM_COMPLETE": "complete_bash", "COMP_WORDS": line, "COMP_CWORD": str(len(words) - 1)}
        code = "import sys; sys.argv[0] = 'pocketlm'; from pipeline.cli import main; main()"
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=tmp_path, env=environment(**more), capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert completed("pocketlm ge") == ["generate"] and completed("pocketlm generate x --runtime li") == ["litert"]
    assert "--prompt" in completed("pocketlm generate x --pr") and "--quiet" in completed("pocketlm bundle --q")


def test_help_of_every_command_tells_of_quiet_and_verbose(tmp_path):
    for name in ("bundle", "generate", "compare"):
        text = pocketlm(tmp_path, name, "--help", COLUMNS="120").stdout
        assert "--quiet" in text and "--verbose" in text


def test_ctrl_c_is_told_and_is_exit_code_130(tmp_path):
    process = subprocess.Popen(command("sleeps", "run"), cwd=tmp_path, env=environment(), stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".pocketlm/second/*.draft/result.txt")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 130 and told.splitlines()[-1] == "pocketlm: interrupted; what was finished is kept"
    assert "Traceback" not in told


def test_measuring_has_a_bar_that_knows_the_runs(monkeypatch):
    """Two artifacts, three rounds here, and an emulated machine: eight runs."""
    drawn = []

    def everywhere(jobs, plan, tell, ran):
        tell("a", "passed")
        for _ in range(plan.runs(len(jobs))):
            ran()
            time.sleep(0.15)
        return Outcome()

    ours, theirs = pty.openpty()
    monkeypatch.setenv(PROGRESS_FD, str(theirs))
    monkeypatch.setattr(measure, "run_everywhere", everywhere)
    measure.run_with_bar(["job", "job"], Plan(("local", "arm64"), rounds=3), lambda name, state: drawn.append((name, state)))
    os.close(theirs)
    seen = read_all(ours)
    assert drawn == [("a", "passed")]
    assert [count for count in range(9) if f"{count}/8" in seen] == list(range(9)) and re.search(r"0:00:0\d", seen)
