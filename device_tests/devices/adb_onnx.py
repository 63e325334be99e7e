"""ONNX on a phone by ``onnxruntime_perf_test``: prompts and single tokens timed on real inputs. It writes no logits.

The inputs that it makes by itself (``-I``) are zeros, and an attention mask of zeros is refused by GroupQueryAttention. So the inputs
are files in ``test_data_set_0`` beside the model, each an ONNX TensorProto, in shapes that also say what is to be timed. Past and
present cannot be one buffer there: a step copies its cache, which a host loop of ours does not do.

Source of flags and formats: onnxruntime/test/perftest.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from device_tests.artifact import Artifact
from device_tests.check import PROMPTS, CheckOptions
from device_tests.devices.adb_runner import Measured, Runner, telling_line
from device_tests.devices.job import Run
from device_tests.errors import ArtifactFailure
from device_tests.timing import FIRST_TOKEN_REPEATS, WARM_UP_TOKENS
from device_tests.vectors import Vectors, read_rows

PROGRAM = "onnxruntime_perf_test"
DATA, TIMES = "test_data_set_0", "times.csv"
FLOAT, INT8, INT64 = 1, 3, 7  # TensorProto.DataType


@dataclass(frozen=True)
class PerfTest:
    """What ``onnxruntime_perf_test`` measured: ms, MB (10^6 bytes). ``first_ms`` comes in whole milliseconds."""

    load_ms: float
    first_ms: float
    samples_ms: list[float]
    peak_mb: float


def measure(runner: Runner, artifact: Artifact, golden: Vectors, run: Run, local: Path) -> Measured:
    """Time prompts, then single tokens after the golden prompt. ArtifactFailure when the artifact does not run."""
    window = next(read_rows(golden, ("windows",)))["windows"]
    longest = artifact.interface.context_tokens - 1
    first = min(golden.prompt_tokens, longest)
    lengths = sorted({first, *(length for length in run.prompts or PROMPTS if length <= longest)})
    decode_tokens = run.decode_tokens or CheckOptions.decode_tokens
    session = _Session(runner, artifact, run.threads, local)
    prompts = {length: session.time(np.resize(window, length), 0, FIRST_TOKEN_REPEATS) for length in lengths}
    decode = session.time(window[first : first + 1], first, WARM_UP_TOKENS + decode_tokens)
    fields = {**timing_fields(prompts, first, decode), "peak_rss_mb": max(decode.peak_mb, prompts[first].peak_mb)}
    notes = [
        f"parity was not tested: {PROGRAM} gives no logits",
        "past and present are two buffers there: a step also copies the cache, which a host loop can avoid",
        f"first calls come in whole milliseconds; memory is the peak that {PROGRAM} tells of itself or its VmHWM, whichever is larger",
    ]
    if artifact.prompt is not None:
        notes.append(f"prompts went through the decode graph: {PROGRAM} knows one graph, a host with both has the first token sooner")
    return Measured(fields, {}, notes, [])


class _Session:
    """Runs of one artifact."""

    def __init__(self, runner: Runner, artifact: Artifact, threads: int, local: Path) -> None:
        self._runner, self._artifact, self._threads, self._local = runner, artifact, threads, local

    def time(self, tokens: np.ndarray, past: int, times: int) -> PerfTest:
        """Time calls with ``tokens`` int ``[n]`` after ``past`` tokens in the cache."""
        link, folder = self._runner.link, self._runner.folder
        data = f"{folder}/{DATA}"
        link.shell(f"rm -rf {data} {folder}/{TIMES} && mkdir {data}")
        files = []
        for index, (name, values) in enumerate(inputs(self._artifact, tokens, past).items()):
            files.append(self._local / f"input_{index}.pb")
            files[-1].write_bytes(tensor_proto(name, values))
        link.push(files, data)
        said = self._runner.run(arguments(self._artifact.path.name, self._threads, times))
        written = f"{folder}/{TIMES}"
        csv = link.pull(written, self._local / TIMES).decode("utf-8", "replace") if link.has(written) else ""
        return read_perf_test(said.text, csv, times, said.peak_mb)


def inputs(artifact: Artifact, tokens: np.ndarray, past: int) -> dict[str, np.ndarray]:
    """Arrays of the ONNX tensor contract for ``tokens`` int ``[n]`` after ``past`` others; the cache's values are zeros."""
    sizes = artifact.interface
    cache = np.zeros((1, sizes.kv_heads, past, sizes.head_dim), dtype=artifact.cache_type)
    feeds = {
        "input_ids": tokens.astype(np.int64)[None],
        "attention_mask": np.ones((1, past + len(tokens)), dtype=np.int64),
    }
    feeds.update({f"past_key_values.{layer}.{kind}": cache for layer in range(sizes.layers) for kind in ("key", "value")})
    return feeds


def tensor_proto(name: str, values: np.ndarray) -> bytes:
    """An ONNX TensorProto: fields 1 dims, 2 data_type, 8 name, 9 raw_data (onnx.proto3)."""
    kind = {np.dtype(np.float32): FLOAT, np.dtype(np.int8): INT8, np.dtype(np.int64): INT64}[values.dtype]
    dims = b"".join(b"\x08" + _varint(size) for size in values.shape)
    raw = values.astype(values.dtype.newbyteorder("<")).tobytes()
    return dims + b"\x10" + _varint(kind) + b"\x42" + _varint(len(name)) + name.encode("ascii") + b"\x4a" + _varint(len(raw)) + raw


def arguments(model: str, threads: int, times: int) -> list[str]:
    """Flags of ``onnxruntime_perf_test``; the times of single calls go to a file, a summary to stdout."""
    return ["-e", "cpu", "-m", "times", "-r", str(times), "-x", str(threads), "-y", "1", model, TIMES]


def read_perf_test(text: str, csv: str, times: int, peak_mb: float | None) -> PerfTest:
    """Parse the summary and the file of times (``model,seconds,peak,cpu,run``). ArtifactFailure when they are something else."""
    load = re.search(r"Session creation time cost: ([0-9.e+-]+) s", text)
    first = re.search(r"First inference time cost: (\d+) ms", text)
    peak = re.search(r"Peak working set size: (\d+) bytes", text)
    rows = [line.split(",") for line in csv.splitlines() if line.count(",") >= 4]
    try:
        samples = [float(row[1]) * 1000 for row in rows]
    except ValueError:
        samples = []
    if not (load and first and peak and samples):
        raise ArtifactFailure(f"{PROGRAM} printed no timings ({telling_line(text)}); give the onnxruntime_perf_test of ONNX Runtime")
    if len(samples) != times or not all(math.isfinite(sample) and sample > 0 for sample in samples):
        raise ArtifactFailure(f"{PROGRAM} tells of {len(samples)} calls, {times} were wanted; its numbers cannot be believed")
    own = int(peak.group(1)) / 1e6
    return PerfTest(float(load.group(1)) * 1000, float(first.group(1)), samples, max(own, peak_mb or 0.0))


def timing_fields(prompts: dict[int, PerfTest], first: int, decode: PerfTest) -> dict[str, Any]:
    """The record's fields of time; ``first`` is the prompt whose times stand alone."""
    steps = decode.samples_ms[WARM_UP_TOKENS:]
    p50, p90, p99 = (float(value) for value in np.percentile(steps, (50, 90, 99)))
    timed = [
        {
            "tokens": length,
            "cold_ms": found.first_ms,
            "ms": float(np.median(found.samples_ms)),
            "samples_ms": found.samples_ms,
            "tokens_per_s": length / float(np.median(found.samples_ms)) * 1000,
        }
        for length, found in sorted(prompts.items())
    ]
    alone = next(prompt for prompt in timed if prompt["tokens"] == first)
    return {
        "load_ms": prompts[first].load_ms,
        "first_token_ms": alone["ms"],
        "first_token_cold_ms": alone["cold_ms"],
        "first_token_samples_ms": alone["samples_ms"],
        "prompt_tokens": first,
        "prompts": timed,
        "prefill_tokens_per_s": alone["tokens_per_s"],
        "decode_ms": steps,
        "decode_ms_p50": p50,
        "decode_ms_p90": p90,
        "decode_ms_p99": p99,
        "decode_tokens_per_s": len(steps) / sum(steps) * 1000,
    }


def _varint(value: int) -> bytes:
    """Protobuf's base-128 number."""
    parts = []
    while True:
        value, low = value >> 7, value & 0x7F
        parts.append(low | (0x80 if value else 0))
        if not value:
            return bytes(parts)
