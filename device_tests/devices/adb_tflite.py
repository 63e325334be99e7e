"""TFLite on a phone by ``benchmark_model``: both signatures timed on real inputs, and their logits compared where it writes them.

Left to itself the program feeds random numbers, and a random ``last`` or position lies outside the graph's tables. So each input is
a file, the same arrays that a host loop feeds: ``TfliteSession`` makes them, and takes a run of the program for a call of a
signature. Newer builds write the outputs to a file (``--output_filepath``); with older ones parity stays untested and the record
says so.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from device_tests.answers import golden_answers
from device_tests.artifact import Artifact, sha256_of
from device_tests.check import CheckOptions
from device_tests.devices.adb_benchmark_model import OUTPUTS, PROGRAM, Benchmark, Pace, arguments, read_benchmark, unknown_flags
from device_tests.devices.adb_runner import POLL_S, Measured, Runner
from device_tests.devices.job import Run
from device_tests.devices.tflite_file import Signature, Tensor, read_signatures
from device_tests.errors import ArtifactFailure
from device_tests.gates import judge
from device_tests.replay import Place, Replay, teacher_forced
from device_tests.tflite_calls import InterpreterCalls
from device_tests.tflite_session import TfliteSession, signatures_of
from device_tests.timing import FIRST_TOKEN_REPEATS, WARM_UP_TOKENS
from device_tests.token_statistics import kl_full, log_softmax, mean_estimate
from device_tests.vectors import Vectors, read_rows

COMPARED_STEPS = 2  # decode steps after each golden prompt; each is a process of its own


class PhoneInterpreter:
    """An interpreter for ``TfliteSession`` whose signatures run on the phone, a fresh process per call.

    ``last`` is the latest call's benchmark, ``no_outputs`` why its results are zeros and no answers, ``peak_mb`` the largest VmHWM.
    """

    def __init__(self, runner: Runner, model: Path, local: Path, threads: int) -> None:
        """``local`` is an empty folder here for what goes to the phone and comes back."""
        self.pace = Pace(1, 1, 0.0)
        self.last: Benchmark | None = None
        self.no_outputs: str | None = None
        self.peak_mb: float | None = None
        self._runner, self._model, self._local, self._threads = runner, model, local, threads
        self._signatures = read_signatures(model)
        self._sent: dict[str, str] = {}

    def get_signature_runner(self, key: str) -> PhoneSignature:
        """The signature of that name."""
        if key not in self._signatures:
            raise ArtifactFailure(f"{self._model.name} has no signature {key}; export the artifact again")
        return PhoneSignature(self, key, self._signatures[key])

    def call(self, key: str, signature: Signature, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Run a signature; its outputs by name, zeros where the program does not write them."""
        self._send(signature.inputs, feeds)
        self._runner.link.shell(f"rm -f {self._runner.folder}/{OUTPUTS}")
        said = self._runner.run(arguments(self._model.name, key, signature, self._threads, self.pace), unknown_flags)
        self.last = read_benchmark(said.text)
        if said.peak_mb is not None:
            self.peak_mb = max(said.peak_mb, self.peak_mb or 0.0)
        if self.last.count < self.pace.timed:
            raise ArtifactFailure(f"{PROGRAM} timed {self.last.count} calls of {key}, {self.pace.timed} were wanted; give it more time")
        data = self._outputs(signature)
        results, start = {}, 0
        for tensor in signature.outputs:
            part = data[start : start + tensor.bytes]
            results[tensor.key] = np.frombuffer(part, dtype=tensor.dtype).reshape(tensor.shape)
            start += tensor.bytes
        return results

    def _send(self, inputs: list[Tensor], feeds: dict[str, np.ndarray]) -> None:
        """Write the inputs to files and push those that are not there as they are."""
        changed = []
        for tensor in inputs:
            path = self._local / f"{tensor.key}.bin"
            path.write_bytes(np.ascontiguousarray(feeds[tensor.key], dtype=tensor.dtype).tobytes())
            digest = sha256_of(path)
            if self._sent.get(path.name) != digest:
                changed.append(path)
                self._sent[path.name] = digest
        self._runner.link.push(changed, self._runner.folder)

    def _outputs(self, signature: Signature) -> bytes:
        wanted = sum(tensor.bytes for tensor in signature.outputs)
        remote = f"{self._runner.folder}/{OUTPUTS}"
        if self.last is not None and "--output_filepath" in self.last.unknown_flags:
            self.no_outputs = f"this build of {PROGRAM} does not write outputs"
        elif not self._runner.link.has(remote):
            self.no_outputs = f"{PROGRAM} wrote no outputs"
        else:
            data = self._runner.link.pull(remote, self._local / OUTPUTS)
            if len(data) == wanted:
                return data
            self.no_outputs = f"{PROGRAM} wrote {len(data)} bytes of outputs, the signature has {wanted}"
        return bytes(wanted)


class PhoneSignature:
    """One signature of a ``PhoneInterpreter``, described and called as a runtime's."""

    def __init__(self, interpreter: PhoneInterpreter, key: str, signature: Signature) -> None:
        """Made by ``get_signature_runner``."""
        self._interpreter, self._key, self._signature = interpreter, key, signature

    def get_input_details(self) -> dict[str, dict[str, Any]]:
        """Name, shape, type and quantization of each input."""
        return {tensor.key: _details(tensor) for tensor in self._signature.inputs}

    def get_output_details(self) -> dict[str, dict[str, Any]]:
        """Name, shape, type and quantization of each output."""
        return {tensor.key: _details(tensor) for tensor in self._signature.outputs}

    def __call__(self, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        """Outputs by name."""
        return self._interpreter.call(self._key, self._signature, feeds)


def measure(runner: Runner, artifact: Artifact, golden: Vectors, run: Run, local: Path) -> Measured:
    """Time a chunk of the prompt and single tokens, then compare logits. ArtifactFailure when the artifact does not run."""
    interpreter = PhoneInterpreter(runner, artifact.path, local, run.threads)
    session = TfliteSession(artifact, InterpreterCalls(interpreter, signatures_of(artifact)))
    window = next(read_rows(golden, ("windows",)))["windows"]
    prompt = timed_prompt(golden.prompt_tokens, artifact.interface.prefill_tokens)
    interpreter.pace = Pace(1, FIRST_TOKEN_REPEATS, 1.0)
    session.prefill(window[:prompt])
    prefill = interpreter.last
    interpreter.pace = Pace(WARM_UP_TOKENS, run.decode_tokens or CheckOptions.decode_tokens, 1.0)
    session.step(int(window[prompt]))
    decode = interpreter.last
    interpreter.pace = Pace(1, 1, 0.0)
    fields = {**timing_fields(prefill, decode, prompt), "peak_rss_mb": interpreter.peak_mb}
    notes = [
        f"times are {PROGRAM}'s own, of the calls alone: the choice of a token and the copy into the cache are not in them",
        f"one call of prefill takes {prompt} tokens; a prompt in several calls was not timed",
        f"memory is the process's VmHWM, read every {POLL_S:g} s",
    ]
    if prefill.median_ms is None:
        notes.append(f"this build of {PROGRAM} prints no median: times are means")
    environment = {"delegate": decode.delegate or f"{PROGRAM} says nothing of XNNPACK"}
    if interpreter.no_outputs:
        notes.append(f"parity was not tested: {interpreter.no_outputs}")
        return Measured(fields, environment, notes, [])
    found = compare(session, golden)
    fields.update(max_abs_diff=found.max_abs_diff, kl=max(0.0, found.kl.value), top1=found.top1, golden_tokens=found.tokens)
    notes.append(f"parity was tested on {found.tokens} golden tokens: after each prompt and {COMPARED_STEPS} steps; no greedy text")
    return Measured(fields, environment, notes, judge(run.gates, found, None))


def timed_prompt(tokens: int, lengths: tuple[int, ...]) -> int:
    """The longest prompt up to ``tokens`` that goes in a single call without padding; where there is none, what the shortest takes."""
    return max((length for length in lengths if length <= tokens), default=min(tokens, *lengths))


def compare(session: TfliteSession, golden: Vectors) -> Replay:
    """The first rows of each golden window against the reference's. ArtifactFailure for broken logits."""
    rows = min(1 + COMPARED_STEPS, golden.sizes["R"])
    read = [(row["windows"], row["logits"][:rows]) for row in read_rows(golden, ("windows", "logits"))]
    windows = np.stack([window for window, _ in read])
    reference = np.stack([logits for _, logits in read])  # [windows, rows, vocab]
    logits = np.stack([teacher_forced(session, window, golden.prompt_tokens, rows, index) for index, window in enumerate(windows)])
    difference = np.abs(logits - reference).max(axis=-1)
    window, token = np.unravel_index(int(difference.argmax()), difference.shape)
    return Replay(
        max_abs_diff=float(difference.max()),
        worst=Place(int(window), golden.prompt_tokens - 1 + int(token)),
        kl=mean_estimate(kl_full(log_softmax(reference), log_softmax(logits))),
        top1=float(np.mean(logits.argmax(axis=-1) == reference.argmax(axis=-1))),
        tokens=difference.size,
        greedy_prefixes=[],
        greedy_tokens=0,
        answers=golden_answers(logits, windows, golden.prompt_tokens),
    )


def timing_fields(prefill: Benchmark, decode: Benchmark, prompt: int) -> dict[str, Any]:
    """The record's fields of time. No percentile but the median, and no sample: the program prints none."""
    first = prefill.mean_ms if prefill.median_ms is None else prefill.median_ms
    timed = {"tokens": prompt, "cold_ms": prefill.first_ms, "ms": first, "samples_ms": [], "tokens_per_s": prompt / first * 1000}
    return {
        "load_ms": prefill.init_ms,
        "first_token_ms": first,
        "first_token_cold_ms": prefill.first_ms,
        "prompt_tokens": prompt,
        "prompts": [timed],
        "prefill_tokens_per_s": prompt / first * 1000,
        "decode_ms_p50": decode.median_ms,
        "decode_tokens_per_s": 1000 / decode.mean_ms,
    }


def _details(tensor: Tensor) -> dict[str, Any]:
    shape = np.array(tensor.shape, dtype=np.int32)
    return {"name": tensor.name, "shape": shape, "dtype": tensor.dtype.type, "quantization": tensor.quantization}
