"""What adb, Android and the benchmark programs print, as they print it, and what is read from it."""

from pathlib import Path

import numpy as np
import pytest

from device_tests.artifact import Artifact
from device_tests.devices import DeviceUnavailable
from device_tests.devices.adb import parse
from device_tests.devices.adb_benchmark_model import read_benchmark
from device_tests.devices.adb_link import listed
from device_tests.devices.adb_onnx import inputs, read_perf_test, tensor_proto
from device_tests.devices.adb_phone import battery_c, memory_mb, properties_of, thermal_status
from device_tests.devices.adb_runner import check_runner, telling_line
from device_tests.devices.tests.stand_in_phone import BATTERY, MEMORY, PROPERTIES, THERMAL, elf_header
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.tests.toy import INTERFACE, TensorProto, numpy_helper

OLD_BENCHMARK = """STARTING!
Log parameter values verbosely: [0]
Num threads: [1]
Graph: [/data/local/tmp/albert_base.tflite]
#threads used for CPU inference: [1]
Loaded model /data/local/tmp/albert_base.tflite
INFO: Initialized TensorFlow Lite runtime.
The input model file size (MB): 11.983
Initialized session in 20.283ms.
Running benchmark for at least 1 iterations and at least 0.5 seconds but terminate if exceeding 150 seconds.
count=2 first=339304 curr=266325 min=266325 max=339304 avg=302814 std=36489

Running benchmark for at least 50 iterations and at least 1 seconds but terminate if exceeding 150 seconds.
count=50 first=266601 curr=266931 min=265837 max=268116 avg=266473 std=419

Inference timings in us: Init: 20283, First inference: 339304, Warmup (avg): 302814, Inference (avg): 266473
Memory footprint delta from the start of the tool (MB): init=6.70312 overall=63.4023
"""
NEW_BENCHMARK = """INFO: STARTING!
INFO: Signature to run: [decode]
INFO: Use xnnpack: [1]
INFO: Created TensorFlow Lite XNNPACK delegate for CPU.
INFO: XNNPACK delegate created.
INFO: Explicitly applied XNNPACK delegate, and the model graph will be partially executed by the delegate w/ 1 delegate kernels.
INFO: Initialized session in 614.333ms.
INFO: count=1 curr=905463 p5=905463 median=905463 p95=905463
INFO: count=50 first=1900416 curr=1898333 min=1898007 max=1906121 avg=1.89964e+06 std=1549 p5=1898333 median=1899281 p95=1904305
INFO: Inference timings in us: Init: 614333, First inference: 905463, Warmup (avg): 905463, Inference (avg): 1.89964e+06
"""
PERF_TEST = """Setting intra_op_num_threads to 1
Session creation time cost: 0.217932 s
First inference time cost: 196 ms
Total inference time cost: 0.49481 s
Total inference requests: 5
Average inference time cost total: 98.961997 ms
Total inference run time: 0.494854 s
Number of inferences per second: 10.104
Avg CPU usage: 11 %
Peak working set size: 271122432 bytes
"""
TIMES = "".join(f"run,{seconds},271122432,11,{run}\n" for run, seconds in enumerate((0.0958204, 0.1, 0.0995086, 0.101519, 1e-3)))


@pytest.mark.parametrize(
    ("lines", "expected"),
    [
        ("", {}),
        ("39181FDJG000AB         device usb:1-4 product:shiba model:Pixel_8 transport_id:2\n", {"39181FDJG000AB": "device"}),
        ("39181FDJG000AB         unauthorized usb:1-4 transport_id:2\n", {"39181FDJG000AB": "unauthorized"}),
        ("emulator-5554          offline transport_id:1\n10.0.0.5:5555 device\n", {"emulator-5554": "offline", "10.0.0.5:5555": "device"}),
        ("????????????           no permissions (missing udev rules? user is in the plugdev group)\n", {"????????????": "no permissions"}),
    ],
)  # fmt: skip
def test_lists_of_phones(lines, expected):
    daemon = "* daemon not running; starting now at tcp:5037\n* daemon started successfully\n"
    assert listed(f"{daemon}List of devices attached\n{lines}\n") == expected


def test_words_of_android():
    assert properties_of(PROPERTIES.format(abi="arm64-v8a"))["ro.product.model"] == "Pixel 8"
    assert battery_c(BATTERY) == 31.4
    assert battery_c("08-11 18:34:14.721  Sending ACTION_BATTERY_CHANGED: voltage:4120, temperature:345\n") is None, "an older one"
    assert battery_c("  temperature: -52\n") == -5.2 and battery_c("Can't find service: battery") is None
    assert thermal_status(THERMAL.format(status=3)) == 3, "not the mStatus of a cached sensor"
    assert thermal_status("Can't find service: thermalservice") is None
    assert memory_mb(MEMORY, "MemTotal") == pytest.approx(7949.66) and memory_mb("", "MemTotal") is None


def test_timings_of_an_old_benchmark_model():
    found = read_benchmark(OLD_BENCHMARK)
    assert (found.init_ms, found.first_ms, found.mean_ms, found.median_ms, found.count) == (20.283, 339.304, 266.473, None, 50)
    assert found.delegate is None and found.unknown_flags == ()


def test_timings_of_a_new_benchmark_model():
    found = read_benchmark(NEW_BENCHMARK)
    assert (found.init_ms, found.first_ms, found.mean_ms, found.median_ms, found.count) == (614.333, 905.463, 1899.64, 1899.281, 50)
    assert found.delegate.startswith("Explicitly applied XNNPACK delegate") and found.delegate.endswith("1 delegate kernels.")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Hello\n", r"printed no timings \(Hello\)"),
        ("ERROR: Failed to load model x\nERROR: Benchmarking failed.\n", "Failed to load model x"),
        ("Unconsumed cmdline flags: --signature_to_run_for=decode --output_filepath=o\n" + OLD_BENCHMARK, "know --signature_to_run_for;"),
        (OLD_BENCHMARK.replace("(avg): 266473", "(avg): 0"), "cannot be believed"),
    ],
)  # fmt: skip
def test_another_benchmark_model_is_told_in_one_line(text, words):
    with pytest.raises(ArtifactFailure, match=words) as told:
        read_benchmark(text)
    assert "\n" not in str(told.value)


def test_a_build_without_outputs_is_no_failure():
    found = read_benchmark("Unconsumed cmdline flags: --output_filepath=outputs.bin --use_xnnpack=true\n" + OLD_BENCHMARK)
    assert found.unknown_flags == ("--output_filepath", "--use_xnnpack")


def test_timings_of_perf_test():
    found = read_perf_test(PERF_TEST, TIMES + "\nMin Latency: 0.0958204 s\n", 5, 12.5)
    assert (found.load_ms, found.first_ms) == (pytest.approx(217.932), 196.0)
    assert found.samples_ms == pytest.approx([95.8204, 100.0, 99.5086, 101.519, 1.0]) and found.peak_mb == pytest.approx(271.122432)
    assert read_perf_test(PERF_TEST, TIMES, 5, 300.0).peak_mb == 300.0


@pytest.mark.parametrize(
    ("text", "csv", "words"),
    [
        ("Hello\n", TIMES, r"printed no timings \(Hello\)"),
        (PERF_TEST, "", "printed no timings"),
        (PERF_TEST, TIMES.replace("0.1,", "soon,"), "printed no timings"),
        (PERF_TEST, TIMES.splitlines()[0], "tells of 1 calls, 5 were wanted"),
        (PERF_TEST, TIMES.replace("0.1,", "0,"), "cannot be believed"),
    ],
)
def test_another_perf_test_is_told_in_one_line(text, csv, words):
    with pytest.raises(ArtifactFailure, match=words):
        read_perf_test(text, csv, 5, None)


@pytest.mark.parametrize("past", [0, 1, 300])
def test_inputs_are_tensors_that_onnx_reads(past):
    artifact = Artifact("toy", "onnx", Path("toy.onnx"), "", 0, INTERFACE)
    tokens = np.array([3, 47, 0])
    fed = {}
    for name, values in inputs(artifact, tokens, past).items():
        tensor = TensorProto.FromString(tensor_proto(name, values))
        assert tensor.name == name
        fed[name] = numpy_helper.to_array(tensor)
        assert fed[name].dtype == values.dtype and np.array_equal(fed[name], values)
    assert fed["input_ids"].tolist() == [[3, 47, 0]] and fed["attention_mask"].tolist() == [[1] * (past + 3)]
    assert fed["past_key_values.1.value"].shape == (1, INTERFACE.kv_heads, past, INTERFACE.head_dim) and len(fed) == 6


def with_loader(machine: int, loader: str) -> bytes:
    """A 64-bit program that asks for a dynamic loader."""
    segment = np.array([3 | 4 << 32, 120, 0, 0, len(loader) + 1, 0, 1], dtype="<u8").tobytes()
    return elf_header(machine) + segment + loader.encode() + bytes(9)


def old_arm_program(loader: str) -> bytes:
    """A 32-bit ARM program that asks for a dynamic loader."""
    head = bytearray(elf_header(40))
    head[4] = 1
    head[28:32] = (64).to_bytes(4, "little")
    head[42:46] = (32).to_bytes(2, "little") + (1).to_bytes(2, "little")
    return bytes(head) + np.array([3, 96, 0, 0, len(loader) + 1, 0, 4, 1], dtype="<u4").tobytes() + loader.encode() + b"\0"


def test_programs_that_fit_the_phone(tmp_path):
    path = tmp_path / "benchmark_model"
    for data, abis in (
        (with_loader(183, "/system/bin/linker64"), ["arm64-v8a", "armeabi-v7a"]),
        (old_arm_program("/system/bin/linker"), ["arm64-v8a", "armeabi-v7a"]),
        (elf_header(62, headers=0), ["x86_64"]),
    ):
        path.write_bytes(data)
        check_runner(path, abis, "adb://X")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (elf_header(62, headers=0), r"built for x86_64, adb://X runs arm64-v8a, armeabi-v7a; give the binary that was built for arm64-v8a"),
        (elf_header(20, headers=0), "built for another processor"),
        (with_loader(183, "/lib/ld-linux-aarch64.so.1"), r"built for Linux \(/lib/ld-linux-aarch64.so.1\), not for Android"),
        (old_arm_program("/lib/ld-linux-armhf.so.3"), "not for Android"),
        (b"#!/bin/sh\nexit 0\n" + bytes(64), "no ELF file"),
        (b"", "no ELF file"),
        (None, "cannot be read"),
    ],
)
def test_a_program_that_does_not_fit_is_told_in_one_line(tmp_path, data, words):
    path = tmp_path / "benchmark_model"
    if data is not None:
        path.write_bytes(data)
    with pytest.raises(DeviceUnavailable, match=words) as told:
        check_runner(path, ["arm64-v8a", "armeabi-v7a"], "adb://X")
    assert "\n" not in str(told.value)


def test_the_line_that_tells_the_most():
    assert telling_line("VmHWM:\t 10 kB\nINFO: STARTING!\nERROR: Didn't find op\nERROR: Benchmarking failed.\n") == "ERROR: Didn't find op"
    assert telling_line("one\ntwo\n") == "two" and telling_line("VmHWM:\t 10 kB\n") == ""


def test_addresses(tmp_path):
    program = tmp_path / "bench mark&model"
    program.touch()
    quoted = str(program).replace(" ", "%20").replace("&", "%26")
    found = parse(f"adb://192.168.1.5:5555?threads=4&benchmark_model={quoted}&library={quoted}")
    assert (found.serial, found.threads, found.programs, found.libraries) == (
        "192.168.1.5:5555", 4, {"benchmark_model": program}, (program,)
    )  # fmt: skip
    for address in (f"adb://?onnxruntime_perf_test={quoted}", f"adb?onnxruntime_perf_test={quoted}"):
        assert parse(address).serial == "" and parse(address).threads is None


@pytest.mark.parametrize(
    ("query", "words"),
    [
        ("", "no program to run there; add benchmark_model=PATH or onnxruntime_perf_test=PATH"),
        ("?threads=4", "no program to run there"),
        ("?threads=0", "threads=0 is unknown; give threads=4"),
        ("?benchmark=/bin/true", "benchmark=/bin/true is unknown"),
        ("?benchmark_model=", "benchmark_model= is unknown"),
        ("?benchmark_model=/nowhere/bm", "no file /nowhere/bm"),
    ],
)
def test_wrong_addresses_are_told_in_one_line(query, words):
    with pytest.raises(DeviceTestError, match=words):
        parse(f"adb://X{query}")
