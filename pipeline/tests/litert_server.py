"""The real LiteRT behind the stand-in for its Java classes: ``litert_server.py MODEL THREADS``, calls on stdin, answers on stdout.

Strings are as Java's DataOutput writes them (two bytes of length, UTF-8), tensors are raw bytes in the order of their names.
"""

import struct
import sys

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def main(model: str, threads: int) -> None:
    interpreter = Interpreter(model_path=model, num_threads=threads)
    interpreter.allocate_tensors()
    runners = {key: interpreter.get_signature_runner(key) for key in interpreter.get_signature_list()}
    out = sys.stdout.buffer
    for key, runner in runners.items():
        for side, details in (("input", runner.get_input_details()), ("output", runner.get_output_details())):
            for name, tensor in details.items():
                shape = ",".join(str(int(size)) for size in tensor["shape"])
                say(out, "\t".join((side, key, name, np.dtype(tensor["dtype"]).name, shape)))
    say(out, "")
    out.flush()
    while length := sys.stdin.buffer.read(2):
        runner = runners[sys.stdin.buffer.read(struct.unpack(">H", length)[0]).decode()]
        feeds = {}
        for name, tensor in sorted(runner.get_input_details().items()):
            shape, dtype = [int(size) for size in tensor["shape"]], np.dtype(tensor["dtype"])
            count = int(np.prod(shape)) * dtype.itemsize
            feeds[name] = np.frombuffer(sys.stdin.buffer.read(count), dtype).reshape(shape)
        results = runner(**feeds)
        for name in sorted(results):
            out.write(results[name].tobytes())
        out.flush()


def say(out, text: str) -> None:
    data = text.encode()
    out.write(struct.pack(">H", len(data)) + data)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
