"""The benchmark: what runs when, what a row that gives nothing says, ratios that point the right way, an int8 that is no gain."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest

from device_tests.devices.local import child_environment
from models.errors import GateError
from pipeline import bench, bench_rows
from pipeline.bench import BenchPlan, Feed, Subject, time_rounds
from pipeline.bench_child import Order
from pipeline.bench_record import FP32, Runs, missed, row_record
from pipeline.bench_report import BENCH_COLUMNS, full_columns, full_rows, page, read_record, write_size
from pipeline.bench_report import bench_rows as short_rows
from pipeline.bench_rows import TORCH, Row, artifact_rows, matches, torch_row
from pipeline.fit_shape import shape_of_config
from pipeline.recipe import load_recipe
from pipeline.stages import ARTIFACT_OF_STAGE

INTERFACE = {
    "vocab_size": 50, "layers": 1, "kv_heads": 1, "head_dim": 8, "context_tokens": 64, "prefill_tokens": None, "bos_token_id": 0,
    "eos_token_id": 0,
}  # fmt: skip


def timing(first_token_ms: float, tokens_per_s: float, load_ms: float = 5.0) -> dict:
    return {
        "first_token_ms": {"32": first_token_ms / 4, "128": first_token_ms}, "decode_tokens_per_s": tokens_per_s, "load_ms": load_ms,
        "peak_rss_mb": 100.0, "notes": [],
    }  # fmt: skip


def measured(label: str, first: float, rate: float, size: int, bandwidth: float = 10.0) -> dict:
    group = bench_rows.PYTORCH if label == TORCH else bench_rows.OURS
    return row_record(Runs(Row(label, group, bytes=size, bytes_read_per_token=size), 2, [timing(first, rate)] * 3), bandwidth)


@pytest.fixture
def size() -> dict:
    speeds = {
        TORCH: (20.0, 100.0, 24_000_000),
        FP32: (10.0, 500.0, 20_000_000),
        "onnx_static_int8 in onnxruntime": (5.0, 1000.0, 5_000_000),
        "tflite_fp32 in litert": (12.0, 400.0, 20_000_000),
        "tflite_static_int8 in litert": (4.0, 800.0, 5_000_000),
    }
    hung = row_record(Runs(Row("tflite_fp32 in tflite", bench_rows.OURS), 2, failure="no result after 7 s"), 10.0)
    absent = row_record(Runs(Row("llama.cpp Q8_0", bench_rows.PEER, missing="not installed; run: make bench-peers"), 2), 10.0)
    genai = row_record(Runs(Row("onnxruntime-genai int8 block 128", bench_rows.PEER, version="9.9"), 2, [timing(9.0, 90.0)]), 10.0)
    board = {"cpu": "a processor", "cores": 2, "cpu_flags": ["avx2"], "memory_mb": 1.0, "system": "x", "kernel": "y", "python": "3"}
    return {
        "name": "demo", "about": "a model", "how": "quickly", "threads": [2], "parameters": 5, "stages": [], "measured_at": "today",
        "environment": {**board, "isa": "x86_64", "versions": {"torch": "2"}, "load_average": [1.0, 2.0, 3.0]},
        "bandwidth_gb_s": {"2": {"median": 10.0, "rounds": [10.0]}},
        "rows": [*(measured(label, *numbers) for label, numbers in speeds.items()), hung, absent, genai],
    }  # fmt: skip


def test_ratios_say_how_many_times_as_fast(size):
    rows = {line[0]: line for line in short_rows(size)}
    assert all(len(line) == len(BENCH_COLUMNS) for line in rows.values())
    int8 = rows["onnx_static_int8 in onnxruntime"]
    assert (int8[4], int8[5], int8[7], int8[8]) == ("4.00", "2.00", "10.00", "2.00")


def test_bytes_times_speed_over_bandwidth_is_the_share_of_memory(size):
    int8 = next(row for row in size["rows"] if row["row"] == "onnx_static_int8 in onnxruntime")
    assert int8["read_gb_s"] == pytest.approx(5.0) and int8["bandwidth_share"] == pytest.approx(0.5)
    line = dict(zip(full_columns(size), full_rows(size)[2], strict=True))
    assert (line["MB read/token"], line["GB/s"], line["of memory"]) == ("5.0", "5.00", "50%")
    assert (line["first token ms, 32"], line["first token ms, 128"], line["prefill tokens/s"]) == ("1.2", "5.0", "25600")


def test_rows_without_a_result_are_there_and_say_why(size):
    lines = {line[0]: line for line in full_rows(size)}
    assert lines["tflite_fp32 in tflite"][-1] == "no result after 7 s" and lines["tflite_fp32 in tflite"][4] == "-"
    assert lines["llama.cpp Q8_0"][-1] == "not installed; run: make bench-peers"
    text = page({"sizes": {"demo": size}}, [])
    assert "no result after 7 s" in text and "make bench-peers" in text and "a processor" in text
    assert "onnxruntime-genai 9.9." in text and "when it ended: 3.0" in text


def test_medians_and_spread_are_over_rounds():
    row = row_record(Runs(Row("x", bench_rows.OURS, bytes=10), 1, [timing(1.0, 90.0), timing(3.0, 110.0), timing(2.0, 100.0)]), None)
    assert row["first_token_ms"]["128"] == 2.0 and row["decode_tokens_per_s"] == 100.0
    assert row["decode_spread"] == pytest.approx(0.2) and row["first_token_spread"] == pytest.approx(1.0)


def test_nothing_is_missed_when_int8_is_faster_and_smaller(size):
    assert missed(size) == []


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("first_token_ms", {"128": 11.0}, "first token 0.91 x fp32"),
        ("decode_tokens_per_s", 499.0, "decode 1.00 x fp32"),
        ("bytes", 6_000_000, "0.300 of the bytes"),
        ("failure", "died by signal SIGSEGV", "no result: died by signal"),
    ],
)
def test_an_int8_that_is_no_gain_is_told(size, field, value, words):
    worse = copy.deepcopy(size)
    row = next(row for row in worse["rows"] if row["row"] == "onnx_static_int8 in onnxruntime")
    row[field] = value
    assert any(words in line for line in missed(worse))


def test_one_size_replaces_itself_alone(size, tmp_path):
    write_size({**size, "name": "other"}, tmp_path)
    write_size(size, tmp_path)
    write_size({**size, "about": "newer"}, tmp_path)
    sizes = read_record(tmp_path)["sizes"]
    assert list(sizes) == ["other", "demo"] and sizes["demo"]["about"] == "newer" and sizes["other"]["about"] == "a model"


def standin(name: str) -> Row:
    return Row(name, bench_rows.PEER, (sys.executable, "-m", "pipeline.tests.standin_peer", "time"), name)


@pytest.fixture
def log(tmp_path, monkeypatch):
    monkeypatch.setenv("STANDIN_LOG", str(tmp_path / "log"))
    return lambda: (tmp_path / "log").read_text().splitlines()


def test_rounds_go_over_all_rows_and_a_row_without_a_result_is_not_run_again(log, tmp_path, monkeypatch):
    np.save(tmp_path / "prompt.npy", np.arange(1, 9, dtype=np.int32))
    feed = Feed(tmp_path / "prompt.npy", tmp_path, INTERFACE)
    monkeypatch.setattr(bench, "bandwidth_here", lambda threads: 10.0 * threads)
    rows = [standin("a"), standin("breaks"), standin("b"), Row("gone", bench_rows.PEER, missing="not installed")]
    subject = Subject("x", "x", None, trained=False)
    found, bandwidth = time_rounds(rows, feed, BenchPlan((1, 2), 2, 4, prompts=(4,)), subject, lambda *_: None)
    assert log() == ["a 1", "breaks 1", "b 1", "a 2", "breaks 2", "b 2", "a 1", "b 1", "a 2", "b 2"]
    records = {(each.row.label, each.threads): row_record(each, None) for each in found}
    assert len(records) == 8 and bandwidth == {1: [10.0, 10.0], 2: [20.0, 20.0]}
    assert records["breaks", 1]["failure"].endswith("RuntimeError: it broke)") and records["breaks", 1]["decode_tokens_per_s"] is None
    assert records["gone", 2]["failure"] == "not installed"
    assert set(records["a", 2]["first_token_ms"]) == {"4", "8"} and records["a", 2]["notes"] == ["2 threads"]


def test_a_row_that_hangs_is_stopped_and_says_so(log, tmp_path, monkeypatch):
    np.save(tmp_path / "prompt.npy", np.arange(1, 9, dtype=np.int32))
    monkeypatch.setattr(bench, "bandwidth_here", lambda threads: None)
    subject = Subject("x", "x", None, trained=False, limit_s=3)
    found, _ = time_rounds([standin("hangs")], Feed(tmp_path / "prompt.npy", tmp_path, INTERFACE), BenchPlan(), subject, lambda *_: None)
    assert found[0].failure == "no result after 3 s" and len(log()) == 1


def test_more_threads_may_take_some_times_as_long_and_then_hang():
    before, after = Runs(Row("x", "ours"), 1, wall_s=[4.0, 6.0]), Runs(Row("x", "ours"), 2)
    assert bench.limit_of(before, before, 600) == 600 and bench.limit_of(before, after, 600) == 50
    assert bench.limit_of(before, after, 30) == 30 and bench.limit_of(Runs(Row("x", "ours"), 1), after, 600) == 600


def test_every_artifact_that_a_stage_makes_has_rows_and_one_that_fails_says_why(monkeypatch, tmp_path):
    def run_stages(recipe, work, tell, goals):
        raise GateError(f"{goals[0]}: no good")

    monkeypatch.setattr(bench_rows, "run_stages", run_stages)
    recipe = load_recipe(None, ['artifacts=["onnx_fp32", "tflite_fp32"]'])
    rows, _ = artifact_rows(recipe, tmp_path, (), lambda *_: None)
    assert [(row.label, row.missing) for row in rows] == [
        ("onnx_fp32", "not made: onnx: no good"), ("tflite_fp32", "not made: tflite: no good"),
    ]  # fmt: skip
    assert all(bench_rows.labels_of(name) for name in ARTIFACT_OF_STAGE.values()), "an artifact's name begins with its format"
    assert [row.label for row in artifact_rows(recipe, tmp_path, ("litert",), lambda *_: None)[0]] == ["tflite_fp32"]


@pytest.mark.parametrize(
    ("only", "found"), [((), True), (("INT8 in",), True), (("onnx_*int8*runtime",), True), (("tflite",), False), (("int8", "int4"), False)]
)
def test_only_is_a_part_of_a_name_or_a_pattern(only, found):
    assert matches("onnx_static_int8 in onnxruntime", only) is found


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt2"])
def test_pytorch_reads_every_weight_but_the_rows_it_picks(checkpoints, family):
    from models.checkpoint import load_model

    config = json.loads((checkpoints[family] / "config.json").read_text())
    model = load_model(checkpoints[family])
    picked = model.transformer.wpe.weight.numel() if family == "gpt2" else 0
    expected = 4 * (sum(weight.numel() for weight in model.parameters()) - picked)
    assert torch_row(checkpoints[family], shape_of_config(config, family)).bytes_read_per_token == expected


def test_eager_pytorch_is_timed_with_its_cache(checkpoints, tmp_path):
    np.save(tmp_path / "prompt.npy", np.arange(1, 17, dtype=np.int32))
    order = Order(str(checkpoints["qwen3"]), 1, str(tmp_path / "prompt.npy"), 8, lengths=(4,))
    command = [sys.executable, "-m", "pipeline.torch_session", order.as_json()]
    done = subprocess.run(command, env=child_environment(1), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert [prompt["tokens"] for prompt in found["prompts"]] == [4, 16] and found["quality"] is None
    assert found["prompt_tokens"] == 16 and len(found["timing"]["decode_ms"]) == 8 and found["decode_tokens_per_s"] > 0
