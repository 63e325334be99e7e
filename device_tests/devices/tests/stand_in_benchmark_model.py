"""A stand-in for LiteRT's benchmark_model, for tests: its flags and its words, and below them the real interpreter on this machine.

It follows tflite/tools/benchmark: unknown flags are warned of and left aside, inputs go to a signature's graph in the graph's order,
a file of another length is fatal, and the outputs are written one after the other in the graph's order. STAND_IN_BENCHMARK changes
it: ``old`` (a build without --output_filepath and without percentiles), ``older`` (without signatures too), ``compiled`` (the program
of the CompiledModel API, which has the same name and feeds random numbers), ``zeros`` (kernels that answer zeros), ``illegal`` (dies by
SIGILL), ``silent`` (prints nothing).
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from ai_edge_litert import schema_py_generated as schema
from ai_edge_litert.interpreter import Interpreter

KIND = os.environ.get("STAND_IN_BENCHMARK", "")
FLAGS = {
    "graph", "num_threads", "num_runs", "min_secs", "max_secs", "warmup_runs", "warmup_min_secs", "use_xnnpack", "input_layer",
    "input_layer_shape", "input_layer_value_files", "signature_to_run_for", "output_filepath",
}  # fmt: skip
INPUTS = {"input_layer", "input_layer_shape", "input_layer_value_files"}
UNKNOWN = {
    "old": {"output_filepath"},
    "older": {"output_filepath", "signature_to_run_for"},
    "compiled": {"output_filepath", "use_xnnpack", *INPUTS},
}


def say(words: str) -> None:
    print(f"INFO: {words}", flush=True)


def fatal(words: str) -> None:
    print(f"FATAL: {words}", file=sys.stderr, flush=True)
    os.abort()


def main(words: list[str]) -> int:
    flags = dict(word[2:].partition("=")[::2] for word in words)
    known = FLAGS - UNKNOWN.get(KIND, set())
    say("STARTING!")
    strangers = [word for word in words if word[2:].partition("=")[0] not in known]
    if strangers:
        print(f"WARN: Unconsumed cmdline flags: {' '.join(strangers)}")
    misbehave()
    say(f"Graph: [{flags['graph']}]")
    say(f"Signature to run: [{flags['signature_to_run_for']}]")
    start = time.perf_counter()
    try:
        interpreter = Interpreter(model_path=flags["graph"], num_threads=int(flags["num_threads"]))
        interpreter.allocate_tensors()
    except (ValueError, RuntimeError) as error:
        print(f"ERROR: {error}\nERROR: Failed to load model {flags['graph']}\nERROR: Benchmarking failed.", file=sys.stderr)
        return 1
    init_us = (time.perf_counter() - start) * 1e6
    say(f"Loaded model {flags['graph']}")
    delegated = "the model graph will be partially executed by the delegate w/ 2 delegate kernels."
    say(f"Explicitly applied XNNPACK delegate, and {delegated}")
    key = flags["signature_to_run_for"]
    graph, inputs, outputs = graph_of(flags["graph"], key)
    runner = interpreter.get_signature_runner(key)
    feeds = read_inputs(flags, runner, graph, inputs)
    warm_up = timed(runner, feeds, int(flags["warmup_runs"]), float(flags["warmup_min_secs"]), flags)
    calls = timed(runner, feeds, int(flags["num_runs"]), float(flags["min_secs"]), flags)
    means = f"Warmup (avg): {np.mean(warm_up):g}, Inference (avg): {np.mean(calls):g}"
    say(f"Inference timings in us: Init: {init_us:.0f}, First inference: {warm_up[0]}, {means}")
    say("Memory footprint delta from the start of the tool (MB): init=6.70312 overall=63.4023")
    if "output_filepath" in known:
        results = runner(**feeds)
        if KIND == "zeros":
            results = {name: np.zeros_like(value) for name, value in results.items()}
        Path(flags["output_filepath"]).write_bytes(b"".join(results[name].tobytes() for name in outputs))
    return 0


def misbehave() -> None:
    if KIND == "illegal":
        os.kill(os.getpid(), signal.SIGILL)
    if KIND == "silent":
        sys.exit(0)
    if KIND == "compiled":
        print("ERROR: [benchmark_litert_model.h:205] Run failed\nERROR: Benchmarking failed.", file=sys.stderr)
        sys.exit(1)


def graph_of(path: str, key: str) -> tuple[object, list[str], list[str]]:
    """A signature's graph, and the signature's names of its inputs and outputs in the graph's order."""
    model = schema.Model.GetRootAsModel(Path(path).read_bytes(), 0)
    for place in range(model.SignatureDefsLength()):
        definition = model.SignatureDefs(place)
        if definition.SignatureKey().decode() == key:
            graph = model.Subgraphs(definition.SubgraphIndex())
            inputs = {definition.Inputs(i).TensorIndex(): definition.Inputs(i).Name() for i in range(definition.InputsLength())}
            outputs = {definition.Outputs(i).TensorIndex(): definition.Outputs(i).Name() for i in range(definition.OutputsLength())}
            ordered = [inputs[index].decode() for index in graph.InputsAsNumpy()]
            return graph, ordered, [outputs[index].decode() for index in graph.OutputsAsNumpy()]
    return fatal(f"no signature {key}")


def read_inputs(flags: dict[str, str], runner: object, graph: object, inputs: list[str]) -> dict[str, np.ndarray]:
    details = runner.get_input_details()
    names, shapes = flags["input_layer"].split(","), flags["input_layer_shape"].split(":")
    files = [entry.replace("::", "\0").split(":") for entry in flags["input_layer_value_files"].split(",")]
    if not len(names) == len(shapes) == len(files) == len(inputs):
        fatal(f"Inputs mismatch: Model inputs #:{len(names)} expected: {len(inputs)}")
    feeds = {}
    for place, key in enumerate(inputs):
        tensor = graph.Tensors(graph.Inputs(place)).Name().decode()
        if tensor != names[place] or files[place][0].replace("\0", ":") != tensor:
            fatal(f"Tensor # {place} is named {tensor} but flags call it {names[place]}")
        if [int(size) for size in shapes[place].split(",")] != list(details[key]["shape"]):
            fatal(f"Input tensor #{place} has another shape")
        data = Path(files[place][1]).read_bytes()
        wanted = int(np.prod(details[key]["shape"])) * np.dtype(details[key]["dtype"]).itemsize
        if len(data) != wanted:
            fatal(f"The size of {files[place][1]} is {len(data)} bytes. It should be {wanted} bytes.")
        feeds[key] = np.frombuffer(data, details[key]["dtype"]).reshape(details[key]["shape"])
    return feeds


def timed(runner: object, feeds: dict, runs: int, seconds: float, flags: dict[str, str]) -> list[int]:
    """Microseconds of each call, told as the tool tells them."""
    limit = f"terminate if exceeding {flags['max_secs']} seconds."
    say(f"Running benchmark for at least {runs} iterations and at least {seconds:g} seconds but {limit}")
    times: list[int] = []
    begin = time.perf_counter()
    while len(times) < runs or time.perf_counter() - begin < seconds:
        start = time.perf_counter()
        runner(**feeds)
        times.append(max(1, int((time.perf_counter() - start) * 1e6)))
    spread = f"first={times[0]} curr={times[-1]} min={min(times)} max={max(times)} avg={np.mean(times):g} std={np.std(times):.0f}"
    told = f"count={len(times)} curr={times[-1]}" if len(times) == 1 else f"count={len(times)} {spread}"
    if KIND not in UNKNOWN:
        told += " p5={:.0f} median={:.0f} p95={:.0f}".format(*np.percentile(times, (5, 50, 95)))
    say(told)
    return times


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
