"""Which artifact stands on top of a report."""

import pytest

from pipeline.report_headline import ANSWER_TOKENS, answer_ms, lines


def entry(name: str, runtime: str, first_token_ms: float | None, tokens_per_s: float | None, size: int = 1000, **more) -> dict:
    device = {"device": "local", "runtime": runtime, "threads": 1, "passed": True, **more}
    device |= {"first_token_ms": first_token_ms, "decode_tokens_per_s": tokens_per_s}
    return {"name": name, "bytes_compressed": size, "devices": [device]}


def chosen(*artifacts: dict) -> list[tuple[str, str | None]]:
    """Name of the best artifact of each place, and of the fp32 one that it is held against."""
    names = [artifact["name"] for artifact in artifacts]
    found = lines({"artifacts": list(artifacts)})
    return [
        (names[int(line.artifact.split(".")[1])], names[int(line.fp32_artifact.split(".")[1])] if line.fp32_artifact else None)
        for line in found
    ]


def test_an_answer_is_its_first_token_and_the_others():
    assert answer_ms(10.0, 640.0) == 10.0 + 1000 * ANSWER_TOKENS / 640.0
    assert answer_ms(None, 640.0) == answer_ms(10.0, None) == float("inf")


def test_the_best_is_fast_and_small_and_held_against_fp32_of_its_runtime():
    fp32, quick, small = (
        entry("onnx_fp32", "onnxruntime", 1, 1e4),
        entry("onnx_a", "onnxruntime", 5, 1000, 1200),
        entry("onnx_b", "onnxruntime", 5, 900),
    )
    assert chosen(fp32, quick, small) == [("onnx_b", "onnx_fp32")]
    other = entry("tflite_c", "litert", 1, 5000, 10)
    assert chosen(fp32, quick, other) == [("tflite_c", None), ("onnx_a", "onnx_fp32")], "the best runtime comes first"


def test_what_failed_or_was_not_timed_comes_last():
    failed = entry("onnx_a", "onnxruntime", 1, 1e5, passed=False)
    assert chosen(failed, entry("onnx_b", "onnxruntime", 9, 10)) == [("onnx_b", None)] and chosen(failed) == [("onnx_a", None)]
    assert chosen(entry("onnx_a", "onnxruntime", None, None)) == []
    assert chosen(entry("onnx_fp32", "onnxruntime", 5, 100)) == [("onnx_fp32", None)], "fp32 stands for itself where there is no other"


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_devices_keep_the_report_s_order(order):
    artifacts = [entry("onnx_a", "onnxruntime", 5, 100), entry("onnx_a", "onnxruntime", 1, 1000, device="board")]
    found = lines({"artifacts": [artifacts[place] for place in order]})
    assert [line.artifact for line in found] == ["artifacts.0", "artifacts.1"]
