"""A stand-in for onnxruntime_perf_test, for tests: its flags, its words and its files, and below them the real runtime on this machine.

It follows onnxruntime/test/perftest: inputs are the ``input_N.pb`` of ``test_data_set_0`` beside the model, one call warms up, and
each call's seconds go to the result file as ``model,seconds,peak,cpu,run``. STAND_IN_PERF_TEST changes it: ``newer`` (the summary's
present wording), ``garbage`` (another program), ``few`` (stops early and says nothing of it).
"""

from __future__ import annotations

import getopt
import os
import resource
import sys
import time
from pathlib import Path

import numpy as np
import onnxruntime

from device_tests.tests.toy import TensorProto, numpy_helper

KIND = os.environ.get("STAND_IN_PERF_TEST", "")


def main(words: list[str]) -> int:
    if KIND == "garbage":
        print("Hello, world")
        return 0
    given, positional = getopt.getopt(words, "e:m:r:x:y:")
    flags = dict(given)
    if flags["-e"] != "cpu" or flags["-m"] != "times" or len(positional) != 2:
        print("See 'onnxruntime_perf_test --help'.", file=sys.stderr, end="")
        return 255
    model, times_file = Path(positional[0]), Path(positional[1])
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = int(flags["-x"]), int(flags["-y"])
    options.log_severity_level = 4
    print(f"Setting intra_op_num_threads to {flags['-x']}")
    start = time.perf_counter()
    try:
        session = onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # as main.cc prints it
        print(error, file=sys.stderr)
        return 255
    load_s = time.perf_counter() - start
    feeds = read_inputs(model.resolve().parent / "test_data_set_0")
    for needed in session.get_inputs():
        if needed.name not in feeds:
            print(f"there is no test input data for input {needed.name} and model {model.resolve().parent.name}")
            print("Run failed:failed to initialize.")
            return 255
    seconds = []
    for _ in range(1 + (3 if KIND == "few" else int(flags["-r"]))):
        start = time.perf_counter()
        try:
            session.run(None, feeds)
        except Exception as error:
            print(f"Run failed:{error}")
            return 255
        seconds.append(time.perf_counter() - start)
    tell(load_s, seconds[0], seconds[1:])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    with times_file.open("a", encoding="utf-8") as file:
        file.writelines(f"{model.resolve().parent.name},{value:.6g},{peak},98,{run}\n" for run, value in enumerate(seconds[1:]))
    return 0


def read_inputs(folder: Path) -> dict[str, np.ndarray]:
    """Tensors by name; the files are numbered without a gap."""
    feeds = {}
    for place in range(len(list(folder.glob("input_*.pb")))):
        tensor = TensorProto.FromString((folder / f"input_{place}.pb").read_bytes())
        feeds[tensor.name] = numpy_helper.to_array(tensor)
    return feeds


def tell(load_s: float, first_s: float, seconds: list[float]) -> None:
    total = sum(seconds)
    mean = f"Average inference time cost{' total' if KIND == 'newer' else ''}: {total / len(seconds) * 1000:.6f} ms"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(f"Session creation time cost: {load_s:.6g} s\nFirst inference time cost: {first_s * 1000:.0f} ms")
    print(f"Total inference time cost: {total:.6g} s\nTotal inference requests: {len(seconds)}\n{mean}")
    print(f"Total inference run time: {total:.6g} s\nNumber of inferences per second: {len(seconds) / total:.6g} ")
    print(f"Avg CPU usage: 98 %\nPeak working set size: {peak} bytes")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
