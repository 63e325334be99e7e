"""pocketlm generate as a person uses it: a prompt through a pipe, stop texts, Ctrl-C, and what is told at the end."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.bundle import BundleInputs, build_bundle
from pipeline.report import build_report
from pipeline.runner import with_our_path
from pipeline.tests.fake_road import EVERYTHING, fake_outcome, fake_recipe, fake_road, fake_stages, with_toy

PROGRAM = "from pipeline.cli import main; main()"
# The same with a model that takes its time and says when it has a token, so that somebody can press Ctrl-C.
SLOW = (
    """
import sys, time
from pipeline import streaming
at_once = streaming.next_token
streaming.next_token = lambda *given: (time.sleep(0.3), print("a token", file=sys.stderr, flush=True), at_once(*given))[2]
"""
    + PROGRAM
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("text")
    road = with_toy(fake_road(root / "road"))
    report = build_report(fake_recipe(), road, fake_outcome(road), fake_stages())
    return build_bundle(BundleInputs(fake_recipe(), road, report, "key", EVERYTHING), root / "dist").folder


def generate(bundle: Path, *arguments: str, stdin: bytes = b"", code: str = PROGRAM) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", code, "generate", str(bundle), "--artifact", "onnx_fp32", *arguments]
    return subprocess.run(command, env=with_our_path(dict(os.environ)), input=stdin, capture_output=True, check=False)


def said(bundle: Path, *arguments: str, stdin: bytes = b"") -> dict:
    done = generate(bundle, "--json", *arguments, stdin=stdin)
    assert done.returncode == 0, done.stderr.decode()
    return json.loads(done.stdout)


def test_a_prompt_comes_from_the_option_or_through_a_pipe(bundle):
    given = said(bundle, "--prompt", "def f(x)", "--max-tokens", "8")
    for arguments in (("--prompt", "-"), ()):
        piped = said(bundle, *arguments, "--max-tokens", "8", stdin=b"def f(x)")
        assert (piped["text"], piped["prompt_tokens"]) == (given["text"], 8)
    done = generate(bundle, stdin=b"caf\xe9")
    assert done.returncode == 2 and b"standard input is not UTF-8 (byte 3); give the prompt in UTF-8" in done.stderr


def test_speed_and_memory_are_told_at_the_end_apart_from_the_text(bundle):
    done = generate(bundle, "--prompt", "abc", "--max-tokens", "6")
    text = said(bundle, "--prompt", "abc", "--max-tokens", "6")["text"]
    assert done.stdout.decode() == f"abc{text}\n"
    line = done.stderr.decode().splitlines()[-1]
    assert line.startswith("onnx_fp32: ") and " tokens/s, first after " in line and " MB at most" in line and "; stopped: " in line
    assert generate(bundle, "--prompt", "abc", "--max-tokens", "6", "--quiet").stderr == b""


def test_draws_follow_the_options(bundle):
    warm = ("--prompt", "abc", "--temperature", "3", "--max-tokens", "20")
    texts = [said(bundle, *warm, "--seed", seed)["text"] for seed in ("1", "1", "2")]
    assert texts[0] == texts[1] != texts[2]
    greedy = said(bundle, "--prompt", "abc", "--max-tokens", "20")["text"]
    for cut in (("--top-k", "1"), ("--top-p", "1e-9")):
        assert said(bundle, *warm, *cut)["text"] == greedy


def test_stop_texts_end_the_answer(bundle):
    whole = said(bundle, "--prompt", "abc", "--temperature", "3", "--max-tokens", "20")["text"]
    found = said(bundle, "--prompt", "abc", "--temperature", "3", "--max-tokens", "20", "--stop", "@", "--stop", whole[3:5])
    assert found["text"] == whole[: whole.index(whole[3:5])] and found["ended"] == "stop text"


@pytest.mark.parametrize("as_json", [False, True], ids=["text", "json"])
def test_ctrl_c_ends_well_and_what_was_written_stays(bundle, as_json):
    command = [sys.executable, "-c", SLOW, "generate", str(bundle), "--artifact", "onnx_fp32", "--prompt", "abc", "--temperature", "3"]
    process = subprocess.Popen(
        [*command, "--max-tokens", "30", *(["--json"] if as_json else [])], env=with_our_path(dict(os.environ)),
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert [process.stderr.readline() for _ in range(2)] == [b"a token\n"] * 2
    if not as_json:
        shown = process.stdout.read1()  # streamed, not kept until the end
        assert shown.startswith(b"abc")
    process.send_signal(signal.SIGINT)
    rest, told = process.communicate(timeout=60)
    assert process.returncode == 130 and b"Traceback" not in told
    if as_json:
        assert json.loads(rest)["ended"] == "interrupted"
    else:
        assert rest.endswith(b"\n") and b"; stopped: interrupted" in told
