"""Which artifacts a bundle takes: the best of each format by answer and download, or what was asked for; always with a reason."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from models.errors import UserError
from pipeline.report import Artifact, Device, Report
from pipeline.report_headline import ANSWER_TOKENS
from pipeline.variants import check_variants, choose


def device(first_ms: float | None, rate: float | None, name: str = "local", runtime: str = "onnxruntime") -> Device:
    return Device(
        device=name, isa="x86_64", runtime=runtime, runtime_version="1", threads=1, first_token_ms=first_ms, decode_tokens_per_s=rate,
        passed=True,
    )  # fmt: skip


def artifact(name: str, megabytes: float, *devices: Device, passed: bool = True) -> Artifact:
    size = round(megabytes * 1e6)
    return Artifact(
        name=name, file=name, sha256="0" * 64, bytes=size, size_ratio=1, bytes_compressed=size, quality=None, devices=list(devices),
        passed=passed,
    )  # fmt: skip


def report(*artifacts: Artifact) -> Report:
    return Report.model_construct(artifacts=list(artifacts))


def test_the_smallest_product_of_answer_and_download_is_taken_and_numbers_are_told():
    chosen = choose(
        report(
            artifact("onnx_fp32", 18, device(10, 1000)),
            artifact("onnx_static_int8", 5, device(6, 1500)),
            artifact("onnx_hybrid_int8", 5, device(3, 3000)),
            artifact("tflite_fp32", 18, device(10, 700, runtime="litert"), device(20, 400, runtime="tflite")),
            artifact("tflite_static_int8", 5, device(7, 1200, runtime="litert"), device(30, 500, runtime="tflite")),
        ),
        None,
    )
    assert list(chosen.taken) == list(chosen.best) == ["onnx_hybrid_int8", "tflite_static_int8"]
    assert list(chosen.left_out) == ["onnx_fp32", "onnx_static_int8", "tflite_fp32"]
    assert (
        f"an answer of {ANSWER_TOKENS} tokens" in chosen.taken["onnx_hybrid_int8"] and "24 ms, 5.0 MB" in chosen.taken["onnx_hybrid_int8"]
    )
    assert "onnx_static_int8 49 ms, 5.0 MB" in chosen.taken["onnx_hybrid_int8"]
    assert chosen.left_out["onnx_fp32"].startswith("74 ms, 18.0 MB: onnx_hybrid_int8")


def test_the_runtime_that_answers_soonest_counts_on_the_first_device_that_timed():
    slow_elsewhere = artifact("tflite_fp32", 5, device(10, 1000, runtime="litert"), device(1, 1, name="ssh://pi"))
    slow_in_one = artifact("tflite_static_int8", 5, device(5, 2000, runtime="litert"), device(500, 1, runtime="tflite"))
    assert list(choose(report(slow_elsewhere, slow_in_one), None).taken) == ["tflite_static_int8"]


def test_where_nothing_was_timed_the_smaller_one_is_taken_and_a_timed_one_before_it():
    untimed = [artifact("onnx_fp32", 18, device(None, None)), artifact("onnx_static_int8", 5, device(None, None))]
    chosen = choose(report(*untimed), None)
    assert list(chosen.taken) == ["onnx_static_int8"] and "not timed" in chosen.taken["onnx_static_int8"]
    assert list(choose(report(*untimed, artifact("onnx_hybrid_int8", 50, device(9, 9))), None).taken) == ["onnx_hybrid_int8"]


def test_an_artifact_with_other_tensors_is_no_default_unless_it_is_alone():
    full = artifact("tflite_full_int8", 1, device(1, 9000))
    chosen = choose(report(artifact("tflite_fp32", 18, device(10, 700)), full), None)
    assert list(chosen.taken) == ["tflite_fp32"] and "for NPUs" in chosen.left_out["tflite_full_int8"]
    alone = choose(report(full), None)
    assert "the only one of its format" in alone.taken["tflite_full_int8"] and alone.best == ("tflite_full_int8",)


def test_what_is_asked_for_is_taken_and_the_best_of_it_comes_first():
    made = report(*(artifact(name, 5, device(1, rate)) for name, rate in (("onnx_fp32", 1), ("onnx_static_int8", 2), ("tflite_fp32", 1))))
    chosen = choose(made, ("onnx_fp32", "onnx_static_int8"))
    assert list(chosen.taken) == ["onnx_fp32", "onnx_static_int8"] and chosen.best == ("onnx_static_int8",)
    assert chosen.left_out == {"tflite_fp32": "not asked for with --variants"}
    assert len(choose(made, ("all",)).taken) == 3


def test_a_variant_that_is_not_made_is_told_before_any_work():
    check_variants(["all", "onnx_fp32"], ["onnx_fp32"])
    with pytest.raises(UserError, match="--variants onnx_int2: the recipe makes onnx_fp32, tflite_fp32; give some"):
        check_variants(["onnx_int2"], ["onnx_fp32", "tflite_fp32"])


COSTS = st.lists(st.tuples(st.floats(1, 1e4), st.floats(1, 1e4), st.floats(0.1, 1e4), st.booleans()), min_size=1, max_size=8)


@given(onnx=COSTS, tflite=COSTS)
def test_one_per_format_that_passed_and_none_better(onnx, tflite):
    made = {
        f"{form}_{place}": artifact(f"{form}_{place}", megabytes, device(first, rate), passed=passed)
        for form, costs in (("onnx", onnx), ("tflite", tflite))
        for place, (first, rate, megabytes, passed) in enumerate(costs)
    }
    chosen = choose(report(*made.values()), None)
    passed = {name: each for name, each in made.items() if each.passed}
    assert {*chosen.taken, *chosen.left_out} == set(passed) and not set(chosen.taken) & set(chosen.left_out)

    def product(each: Artifact) -> float:
        (one,) = each.devices
        return (one.first_token_ms + 1000 * ANSWER_TOKENS / one.decode_tokens_per_s) * each.bytes_compressed

    for form in ("onnx", "tflite"):
        own = {name: product(each) for name, each in passed.items() if name.startswith(form)}
        taken = [name for name in chosen.taken if name.startswith(form)]
        assert len(taken) == bool(own) and all(own[taken[0]] <= other for other in own.values())
