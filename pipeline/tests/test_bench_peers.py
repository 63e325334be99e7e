"""Peers: one that is not there is a row that says so, one that is there is converted once and timed; and each real one, if installed."""

import json
import re

import numpy as np
import pytest

from conftest import write_checkpoint
from pipeline.bench import BenchPlan, Feed, interface_of, run_once
from pipeline.bench_peers import Conversion, peer_row, peer_rows
from pipeline.bench_record import Runs
from pipeline.fit_shape import shape_of_config
from pipeline.peers import install
from pipeline.peers.table import FAILURE, Peer, peers
from pipeline.recipe import ROOT
from pipeline.runner import run_stages
from pipeline.tests.test_bench import INTERFACE

LARGEST_KL = {"fp32": 1e-5, "int8": 0.01, "int8 block 128": 0.01, "int4": 0.3, "Q8_0": 0.01, "Q4_K_M": 0.1, "dynamic int8": 0.01}
WORK = ROOT / ".pocketlm"


def quiet(stage: str, state: str) -> None:
    """Tells nobody."""


def standin(packages: tuple[str, ...] = (), **options) -> Peer:
    given = {"fails": False, "bytes": 12, **options}
    return Peer("standin", "pipeline.tests.standin_peer", "stand-in", "numpy", packages, None, (), {"small": given})


@pytest.fixture
def checkpoint(tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN_LOG", str(tmp_path / "log"))
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"weights")
    return folder


def row_for(peer: Peer, checkpoint, tmp_path):
    return peer_row(Conversion(peer, "small", checkpoint, tmp_path / "work", 1), quiet)


def test_a_peer_is_converted_once_and_timed_by_the_common_loop(checkpoint, tmp_path):
    rows = [row_for(standin(), checkpoint, tmp_path) for _ in range(2)]
    assert rows[0] == rows[1] and (checkpoint / "conversions").read_text() == "x"
    assert (rows[0].label, rows[0].bytes, rows[0].bytes_read_per_token, rows[0].version) == ("stand-in small", 12, 12, np.__version__)
    assert rows[0].notes[0] == "a stand-in" and "MB at most" in rows[0].notes[1]
    np.save(tmp_path / "prompt.npy", np.arange(1, 9, dtype=np.int32))
    runs = Runs(rows[0], 2)
    run_once(runs, Feed(tmp_path / "prompt.npy", tmp_path, INTERFACE), BenchPlan(decode_tokens=4, prompts=(4,)), False, 60)
    assert runs.failure is None and runs.rounds[0]["decode_tokens_per_s"] > 0 and runs.rounds[0]["notes"] == ["2 threads"]


@pytest.mark.parametrize("change", [{"bytes": 13}, None])
def test_other_options_or_other_weights_are_converted_anew(checkpoint, tmp_path, change):
    row_for(standin(), checkpoint, tmp_path)
    if change is None:
        (checkpoint / "model.safetensors").write_bytes(b"other weights")
    row_for(standin(**(change or {})), checkpoint, tmp_path)
    assert (checkpoint / "conversions").read_text() == "xx"


def test_a_checkpoint_that_a_peer_cannot_convert_is_a_row_that_says_why_and_is_tried_again(checkpoint, tmp_path):
    for _ in range(2):
        row = row_for(standin(fails=True), checkpoint, tmp_path)
        assert row.missing.startswith("could not convert:") and "no such operator" in row.missing
    assert (checkpoint / "conversions").read_text() == "xx" and not list((tmp_path / "work").rglob("*.draft"))


def test_a_peer_that_is_not_installed_is_a_row_that_says_how(checkpoint, tmp_path):
    peer = standin(packages=("numpy==1",))
    assert row_for(peer, checkpoint, tmp_path).missing == "not installed; run: make bench-peers"
    peer.home(tmp_path / "work").mkdir(parents=True)
    (peer.home(tmp_path / "work") / FAILURE).write_text("no compiler\n")
    assert row_for(peer, checkpoint, tmp_path).missing == "could not be installed: no compiler"


def test_no_variant_of_any_peer_is_left_out(checkpoint, tmp_path):
    rows = peer_rows(checkpoint, tmp_path / "nothing installed", ("[!t]*",), quiet, 1)  # not transformers' own, which is here
    labels = [f"{peer.title} {variant}" for peer in peers() if peer.packages for variant in peer.variants]
    assert set(labels) <= {row.label for row in rows} and all(row.missing for row in rows if row.label in labels)


def test_every_pin_names_one_version():
    for peer in peers():
        assert (ROOT / f"{peer.module.replace('.', '/')}.py").is_file()
        pins = [*peer.packages, *([peer.source] if peer.source else [])]
        assert all(re.fullmatch(r"[\w.-]+(\[\w+\])?==[\w.]+", pin) for pin in pins), pins


def test_an_installation_that_fails_leaves_the_reason(tmp_path, monkeypatch, capsys):
    peer = standin(packages=("no such requirement",))
    monkeypatch.setattr(install, "peers", lambda: (peer,))
    assert install.main(["--work", str(tmp_path)]) == 1
    assert "Invalid requirement" in peer.failure(tmp_path) and peer.versions(tmp_path) is None
    assert "NOT installed" in capsys.readouterr().out
    assert install.main(["--work", str(tmp_path), "nobody"]) == 2


def test_other_pins_are_not_what_is_installed(tmp_path):
    peer = standin(packages=("numpy==1",))
    peer.home(tmp_path).mkdir(parents=True)
    record = {"wanted": peer.wanted, "versions": {"numpy": "1"}}
    (peer.home(tmp_path) / install.RECORD).write_text(json.dumps(record))
    assert peer.versions(tmp_path) == {"numpy": "1"} and standin(packages=("numpy==2",)).versions(tmp_path) is None


@pytest.fixture(scope="module")
def judged(tmp_path_factory, text_file):
    """A tiny checkpoint with the evaluation windows that its fp32 model answered."""
    root = tmp_path_factory.mktemp("judged")
    from pipeline.recipe import load_recipe

    other = root / "evaluation.txt"
    other.write_text(text_file.read_text(encoding="utf-8")[::-1], encoding="utf-8")
    source = write_checkpoint(root / "llama", "llama")
    places = {"checkpoint.source": source, "text.calibration": text_file, "text.evaluation": other}
    small = [
        "prune.ffn=0", "recover.steps=0", "smooth.enabled=false", "text.window_tokens=48", "text.prompt_tokens=16",
        "text.calibration_windows=2", "text.evaluation_windows=2", "golden.windows=1", "golden.scored_tokens=4", "golden.greedy_tokens=4",
        "smooth.windows=2", "prune.windows=2",
    ]  # fmt: skip
    recipe = load_recipe(None, [*(f"{key}={json.dumps(str(path))}" for key, path in places.items()), *small])
    folders, _ = run_stages(recipe, root / "work", quiet, ("golden",))
    np.save(root / "prompt.npy", np.arange(1, 17, dtype=np.int32))
    return folders, root


@pytest.mark.parametrize(("peer", "variant"), [pytest.param(p, v, id=f"{p.name}-{v}") for p in peers() for v in p.variants])
def test_a_peer_runs_the_same_function(judged, tmp_path, monkeypatch, peer, variant):
    """On a tiny checkpoint: what it converts is timed, and its perplexity is fp32's but for what its bits cost."""
    if peer.packages and peer.versions(WORK) is None:
        pytest.skip(f"{peer.title} is not installed; make bench-peers")
    folders, root = judged
    monkeypatch.setattr(Conversion, "folder", tmp_path / "converted")
    row = peer_row(Conversion(peer, variant, folders["recover"], WORK, 1), quiet)
    assert row.missing is None, row.missing
    config = json.loads((folders["recover"] / "config.json").read_text())
    interface = interface_of(shape_of_config(config, "tiny"), config)
    runs = Runs(row, 1)
    run_once(runs, Feed(root / "prompt.npy", folders["golden"], interface), BenchPlan(decode_tokens=4, prompts=(32,)), True, 120)
    assert runs.failure is None, runs.failure
    # Random weights have more to lose than trained ones; another function is at some nats.
    assert runs.quality["kl"] < LARGEST_KL[variant], runs.quality
    assert set(runs.rounds[0]["first_token_ms"]) == {"16", "32"} and row.bytes_read_per_token <= row.bytes
