"""One loop over all devices: what each is asked, what is compared, and what one of them cannot spoil for the others."""

import json
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest

from device_tests.answers import Agreement, read_answers, write_answers
from device_tests.devices import DeviceUnavailable, open_device
from device_tests.devices import campaign as campaigning
from device_tests.devices.campaign import Limits, Plan, missed, run_everywhere
from device_tests.devices.job import Job, Run
from device_tests.devices.local import Local
from device_tests.devices.rounds import merged
from device_tests.errors import DeviceTestError
from device_tests.gates import Gates
from device_tests.tests.toy import ToyModel, write_onnx, write_vectors


def silent(what: str, state: str) -> None:
    """Nobody listens."""


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    sidecar = write_onnx(ToyModel(), folder / "toy.onnx")
    record = json.loads(sidecar.read_text())
    sidecar.write_text(json.dumps({**record, "bytes_read_per_token": 10_000}))
    return Job(
        sidecar, write_vectors(folder, ToyModel(), ToyModel(1)), Run("onnxruntime", gates=Gates(top1=1.0), quality=True, decode_tokens=8)
    )


class Other(Local):
    """This machine under another name; ``spoil`` changes what it answers, ``ask`` sees each job before it runs."""

    def __init__(self, emulated=True, spoil=lambda answers: answers, ask=lambda job: None):
        super().__init__()
        self.name, self.emulated, self.spoil, self.ask = "other", emulated, spoil, ask

    def run(self, job):
        self.ask(job)
        result = super().run(job)
        if job.run.answers is not None:
            write_answers(job.run.answers, self.spoil(read_answers(job.run.answers)))
        return {**result, "device": {**result["device"], "device": self.name}}


@pytest.fixture()
def devices(monkeypatch):
    """Devices by address, instead of those that addresses lead to."""
    known = {"local": Local()}

    @contextmanager
    def opened(address, tell, work):
        if isinstance(known[address], Exception):
            raise known[address]
        yield known[address]

    monkeypatch.setattr(campaigning, "open_device", opened)
    monkeypatch.setattr(campaigning, "check_address", lambda address: None)
    return known


def test_an_emulated_device_is_not_timed_and_scores_few_windows(job, devices):
    asked = []
    devices["other"] = Other(ask=lambda job: asked.append(job.run))
    plan, ended = Plan(("other", "local"), rounds=3, emulated_windows=2), []
    outcome = run_everywhere([job], plan, silent, lambda: ended.append(1))
    assert len(ended) == plan.runs(1) == 4
    here, there = (result["device"] for result in outcome.results)
    assert [run.timing for run in asked] == [False] and asked[0].windows == 2 and not asked[0].quality
    assert there["emulated"] and there["first_token_ms"] is None and outcome.results[1]["quality"] is None
    assert here["device"] == "local", "this machine comes first, whatever the order"
    found = there["against_local"]
    assert (found["bit_equal"], found["top1"], found["perplexity_change"], found["windows"], found["tokens"]) == (1, 1, 0, 2, 26)
    assert len(here["rounds"]) == 3 and here["against_local"] is None


def test_times_are_medians_of_the_rounds_and_say_how_much_memory_was_read(job, devices):
    outcome = run_everywhere([job], Plan(rounds=3), silent)
    device = outcome.results[0]["device"]
    rates = sorted(entry["decode_tokens_per_s"] for entry in device["rounds"])
    assert len(rates) == 3 and device["decode_tokens_per_s"] == rates[1]
    assert outcome.boards["local"]["bandwidth_gb_s"]["1"] > 0.1
    assert device["read_gb_s"] > 0 and device["bandwidth_share"] == pytest.approx(device["read_gb_s"] / device["bandwidth_gb_s"])


@pytest.mark.parametrize(
    ("spoil", "words"),
    [
        (
            lambda answers: replace(answers, choice=answers.choice + 1),
            "top1 0.0000 against the same artifact on this machine, over 39 tokens, is below 0.9900 less 0.04",
        ),
        (lambda answers: replace(answers, nll=answers.nll + 0.002), "perplexity +0.200% against the same artifact on this machine"),
        (lambda answers: replace(answers, nll=answers.nll - 0.002), "exceeds 0.100% and 3 standard errors of 0.000% either way"),
        (lambda answers: replace(answers, nll=answers.nll * np.nan), "perplexity +nan%"),
    ],
)
def test_what_differs_from_this_machine_fails_by_name(job, devices, spoil, words):
    devices["other"] = Other(spoil=spoil)
    outcome = run_everywhere([job], Plan(("local", "other"), emulated_windows=3), silent)
    here, there = (result["device"] for result in outcome.results)
    assert here["passed"] and not there["passed"]
    assert (
        len(there["failures"]) == 1 and there["failures"][0].startswith("toy in onnxruntime on other: ") and words in there["failures"][0]
    )


def test_without_this_machine_among_the_devices_its_answers_are_made_all_the_same(job, devices):
    devices["other"] = Other(emulated=False)
    outcome = run_everywhere([job], Plan(("other",), limits=Limits(1.0, 0.0)), silent)
    (result,) = outcome.results
    assert result["device"]["passed"] and result["device"]["against_local"]["bit_equal"] == 1 and result["quality"]["tokens"] == 39


def test_a_device_out_of_reach_is_a_line_and_the_others_run(job, devices):
    devices["gone"] = DeviceUnavailable("no route\nto host; switch the board on")
    lines = []
    outcome = run_everywhere([job], Plan(("gone", "local")), lambda *line: lines.append(line))
    assert [result["device"]["device"] for result in outcome.results] == ["local"]
    assert outcome.skipped == [{"device": "gone", "runtime": None, "reason": "no route to host; switch the board on"}]
    assert ("gone", "skipped: no route to host; switch the board on") in lines


def test_a_device_lost_on_the_way_keeps_what_it_gave(job, devices):
    count = []

    def ask(job):
        count.append(1)
        if len(count) == 2:
            raise DeviceUnavailable("the line is dead; run again")

    devices["other"] = Other(emulated=False, ask=ask)
    outcome = run_everywhere([job, replace(job, run=replace(job.run, quality=False))], Plan(("other",)), silent)
    assert len(outcome.results) == 1 and outcome.results[0]["device"]["passed"]
    assert outcome.skipped[0]["reason"] == "the line is dead; run again"


def test_a_mistake_on_one_device_is_a_failed_row(job, devices):
    def ask(job):
        raise DeviceTestError("no room there; free some")

    devices["other"] = Other(emulated=False, ask=ask)
    outcome = run_everywhere([job], Plan(("local", "other")), silent)
    here, there = (result["device"] for result in outcome.results)
    assert here["passed"] and there["failures"] == ["toy in onnxruntime on other: no room there; free some"]


def test_a_runtime_that_a_device_cannot_have_is_left_out_and_told(job, devices):
    devices["other"] = Other(emulated=False)
    devices["other"].missing = {"onnxruntime": "no wheel for Python 3.13"}
    outcome = run_everywhere([job], Plan(("other",)), silent)
    skipped = {"device": "other", "runtime": "onnxruntime", "reason": "no wheel for Python 3.13"}
    assert outcome.results == [] and outcome.skipped == [skipped]


def test_zeros_on_one_device_fail_there_by_name(job, devices):
    """An artifact that answers with zeros on a board, as a runtime without a needed kernel would."""

    class Zeros(Other):
        def run(self, job):
            failed = {"passed": False, "failures": ["toy in onnxruntime on other: all-zero logits at window 0 token 10"]}
            result = Local.run(self, replace(job, run=replace(job.run, answers=None)))
            return {**result, "device": {**result["device"], "device": "other", **failed}}

    devices["other"] = Zeros()
    outcome = run_everywhere([job], Plan(("local", "other"), emulated_windows=1), silent)
    assert [result["device"]["passed"] for result in outcome.results] == [True, False]
    assert outcome.results[1]["device"]["against_local"] is None


def test_a_later_round_that_fails_fails_the_whole():
    device = {"prompts": [], "decode_ms": [1.0], "notes": [], "failures": [], "passed": True}
    device |= dict.fromkeys(("load_cold_ms", "load_ms", "first_token_ms", "first_token_cold_ms", "decode_ms_p50", "decode_ms_p90"), 1.0)
    device |= dict.fromkeys(("decode_ms_p99", "prefill_tokens_per_s", "decode_tokens_per_s", "baseline_rss_mb"), 1.0)
    device |= dict.fromkeys(("host_us_per_token", "load_rss_mb", "peak_rss_mb"), 1.0)
    worse = {**device, "decode_tokens_per_s": None, "failures": ["died by signal SIGILL"], "passed": False}
    found = merged([{"device": device}, {"device": {**device, "first_token_ms": 3.0}}, {"device": worse}])["device"]
    assert not found["passed"] and found["failures"] == ["died by signal SIGILL"] and found["first_token_ms"] == 2.0
    assert len(found["rounds"]) == 2


def test_noise_of_few_tokens_fails_nothing_and_a_real_difference_does():
    """Two of a hundred other first choices may be chance, twenty are not; the same for a change within its error."""
    found = Agreement(0.1, 0.5, 96, 0.98, 10.0, 0.004, 0.0015, 100, 1)
    assert missed(found, Limits()) == []
    assert len(missed(replace(found, top1=0.80), Limits())) == 1
    assert len(missed(replace(found, perplexity_change=-0.02), Limits())) == 1
    assert len(missed(replace(found, tokens=5120), Limits())) == 1, "over many tokens two of a hundred are no chance"


def test_a_mistaken_address_stops_before_anything_runs(job, monkeypatch):
    monkeypatch.setattr(Local, "run", lambda *_: pytest.fail("something ran"))
    for address in ("local?x=1", "arm64?core=4", "adb://x", "ssh://?threads=0"):
        with pytest.raises(DeviceTestError, match="; (give|add) "):
            run_everywhere([job], Plan(("local", address)), silent)


def test_an_address_of_no_kind_is_a_mistake():
    with (
        pytest.raises(DeviceTestError, match="device toaster://kitchen: no such kind; give local, arm64"),
        open_device("toaster://kitchen", silent),
    ):
        pass
