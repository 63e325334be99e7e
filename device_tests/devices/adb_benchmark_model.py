"""The command line of TFLite's ``benchmark_model`` and what it prints. Source: tflite/tools/benchmark of LiteRT."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from device_tests.devices.adb_runner import telling_line
from device_tests.devices.tflite_file import Signature
from device_tests.errors import ArtifactFailure

PROGRAM = "benchmark_model"
OUTPUTS = "outputs.bin"
MAY_BE_UNKNOWN = {"--output_filepath", "--use_xnnpack"}  # an older build, or one without XNNPACK


@dataclass(frozen=True)
class Pace:
    """Calls before and during the timing; at least ``seconds`` are timed, so that the memory can be watched."""

    warm_up: int
    timed: int
    seconds: float


@dataclass(frozen=True)
class Benchmark:
    """What ``benchmark_model`` measured, in ms. ``median_ms`` is None in builds that print none; ``delegate`` is its word on XNNPACK."""

    init_ms: float
    first_ms: float
    mean_ms: float
    median_ms: float | None
    count: int
    unknown_flags: tuple[str, ...]
    delegate: str | None


def arguments(model: str, key: str, signature: Signature, threads: int, pace: Pace) -> list[str]:
    """Flags of ``benchmark_model``. XNNPACK is asked for by name: asked for by default, 2.14 leaves it out of signatures."""
    inputs = signature.inputs
    files = ",".join(f"{tensor.name.replace(':', '::')}:{tensor.key}.bin" for tensor in inputs)
    return [
        f"--graph={model}",
        f"--signature_to_run_for={key}",
        f"--num_threads={threads}",
        "--use_xnnpack=true",
        f"--warmup_runs={pace.warm_up}",
        "--warmup_min_secs=0",
        f"--num_runs={pace.timed}",
        f"--min_secs={pace.seconds:g}",
        "--max_secs=100000",  # the deadline is ours
        f"--input_layer={','.join(tensor.name for tensor in inputs)}",
        f"--input_layer_shape={':'.join(','.join(map(str, tensor.shape)) for tensor in inputs)}",
        f"--input_layer_value_files={files}",
        f"--output_filepath={OUTPUTS}",
    ]


def unknown_flags(text: str) -> tuple[str, ...]:
    """The flags that this build leaves aside. ArtifactFailure when nothing can be told without them."""
    told = re.search(r"Unconsumed cmdline flags: (.*)", text)
    flags = tuple(word.split("=")[0] for word in told.group(1).split()) if told else ()
    missing = sorted(set(flags) - MAY_BE_UNKNOWN)
    if missing:
        raise ArtifactFailure(f"{PROGRAM} does not know {', '.join(missing)}; give a newer one, and that of TFLite's Interpreter API")
    return flags


def read_benchmark(text: str) -> Benchmark:
    """Parse what ``benchmark_model`` prints. ArtifactFailure when it is something else, or knows too few flags."""
    number = r"([0-9.e+]+)"
    pattern = rf"Inference timings in us: Init: {number}, First inference: {number}, Warmup \(avg\): {number}, Inference \(avg\): {number}"
    found = re.search(pattern, text)
    counts = re.findall(r"^(?:INFO: )?(count=\d+ .*)$", text, re.MULTILINE)
    if not found or not counts:
        raise ArtifactFailure(f"{PROGRAM} printed no timings ({telling_line(text)}); give the benchmark_model of LiteRT or TFLite")
    flags = unknown_flags(text)
    statistics = dict(re.findall(rf"(\w+)={number}", counts[-1]))
    microseconds = [float(value) for value in found.groups()]
    if not all(math.isfinite(value) and value > 0 for value in microseconds):
        raise ArtifactFailure(f"{PROGRAM} says that calls take no time ({found.group(0)}); its numbers cannot be believed")
    delegate = re.search(r"^.*XNNPACK delegate.*(?:applied|executed).*$", text, re.MULTILINE)
    return Benchmark(
        init_ms=microseconds[0] / 1000,
        first_ms=microseconds[1] / 1000,
        mean_ms=microseconds[3] / 1000,
        median_ms=float(statistics["median"]) / 1000 if "median" in statistics else None,
        count=int(statistics["count"]),
        unknown_flags=flags,
        delegate=delegate.group(0).replace("INFO: ", "").strip() if delegate else None,
    )
