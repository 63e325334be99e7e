"""The benchmark's arithmetic: ratios point the right way, and an int8 that is no gain is told."""

import copy
import json
import subprocess
import sys

import numpy as np
import pytest

from device_tests.devices.local import child_environment
from models.errors import GateError
from pipeline.bench import BENCH_COLUMNS, TORCH, bench_rows, missed, row_of, timed


def timing(first_token_ms: float, tokens_per_s: float) -> dict:
    return {"first_token_ms": first_token_ms, "decode_tokens_per_s": tokens_per_s, "load_ms": 5.0, "peak_rss_mb": 100.0}


@pytest.fixture
def found() -> dict:
    speeds = {
        TORCH: (20.0, 100.0, 24_000_000),
        "onnx_fp32 in onnxruntime": (10.0, 500.0, 20_000_000),
        "onnx_static_int8 in onnxruntime": (5.0, 1000.0, 5_000_000),
        "tflite_fp32 in litert": (12.0, 400.0, 20_000_000),
        "tflite_static_int8 in litert": (4.0, 800.0, 5_000_000),
    }
    rows = [row_of(label, 2, size, [timing(first, rate)] * 3) for label, (first, rate, size) in speeds.items()]
    return {"rows": rows, "rounds": 3, "how": ""}


def test_ratios_say_how_many_times_as_fast(found):
    rows = {line[0]: dict(zip(range(len(line)), line, strict=True)) for line in bench_rows(found)}
    assert all(len(line) == len(BENCH_COLUMNS) for line in rows.values())
    int8 = rows["onnx_static_int8 in onnxruntime"]
    assert (int8[4], int8[5], int8[7], int8[8]) == ("4.00", "2.00", "10.00", "2.00")


def test_medians_and_spread_are_over_rounds():
    row = row_of("x", 1, 10, [timing(1.0, 90.0), timing(3.0, 110.0), timing(2.0, 100.0)])
    assert row["first_token_ms"] == 2.0 and row["decode_tokens_per_s"] == 100.0
    assert row["decode_spread"] == pytest.approx(0.2)


def test_nothing_is_missed_when_int8_is_faster_and_smaller(found):
    assert missed(found) == []


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("first_token_ms", 11.0, "first token 0.91 x fp32"),
        ("decode_tokens_per_s", 499.0, "decode 1.00 x fp32"),
        ("bytes", 6_000_000, "0.300 of the bytes"),
    ],
)
def test_an_int8_that_is_no_gain_is_told(found, field, value, words):
    worse = copy.deepcopy(found)
    row = next(row for row in worse["rows"] if row["row"] == "onnx_static_int8 in onnxruntime")
    row[field] = value
    assert any(words in line for line in missed(worse))


def test_an_artifact_that_died_has_no_row_but_an_error():
    with pytest.raises(GateError, match="died by signal"):
        timed({"device": {"first_token_ms": None, "failures": ["x died by signal SIGSEGV"]}})


def test_eager_pytorch_is_timed_with_its_cache(checkpoints, tmp_path):
    np.save(tmp_path / "prompt.npy", np.arange(1, 17, dtype=np.int32))
    command = [sys.executable, "-m", "pipeline.torch_session", str(checkpoints["qwen3"]), str(tmp_path / "prompt.npy"), "8", "1"]
    done = subprocess.run(command, env=child_environment(1), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    measured = json.loads(done.stdout.splitlines()[-1])
    assert measured["prompt_tokens"] == 16 and len(measured["timing"]["decode_ms"]) == 8 and measured["decode_tokens_per_s"] > 0
