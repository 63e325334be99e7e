"""Test one artifact in one runtime on this device. The exit code is the verdict: 0 passed, 1 failed, 2 cannot be tested so."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from device_tests.check import PROMPTS, CheckOptions, check
from device_tests.errors import DeviceTestError
from device_tests.gates import Gates, read_gates
from device_tests.result import write_result
from device_tests.sessions import RUNTIMES

EXAMPLE = """example:
  python -m device_tests --artifact onnx_static_int8.json --golden golden --runtime onnxruntime --threads 4 --out result.json"""


def main(arguments: list[str] | None = None) -> int:
    """Parse, check, write, print one line per failure."""
    given = parser().parse_args(arguments)
    try:
        options = CheckOptions(
            runtime=given.runtime,
            threads=given.threads,
            gates=read_gates(given.gates) if given.gates else Gates(),
            quality=given.quality or given.tokens is not None,
            windows=given.windows,
            tokens=given.tokens,
            answers=given.answers,
            timing=not given.no_timing,
            prompts=tuple(given.prompt_tokens or PROMPTS),
            decode_tokens=given.decode_tokens,
            device=given.device,
            packed=given.packed,
        )
        result = check(given.artifact, given.golden, options)
        write_result(given.out, result)
    except DeviceTestError as error:
        print(" ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing was written", file=sys.stderr)
        return 130
    for failure in result["device"]["failures"]:
        print(f"FAILED {failure}", file=sys.stderr)
    if result["device"]["passed"]:
        print(f"passed {result['artifact']} in {given.runtime} on {given.device}")
    return 0 if result["device"]["passed"] else 1


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(
        prog="python -m device_tests", description=__doc__, epilog=EXAMPLE, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    command.add_argument("--artifact", type=Path, required=True, help="JSON beside the model file")
    command.add_argument("--golden", type=Path, required=True, help="folder with golden.npz (and evaluation.npz for --quality)")
    command.add_argument("--runtime", choices=sorted(RUNTIMES), required=True)
    command.add_argument("--out", type=Path, required=True, help="where the result goes, as JSON")
    command.add_argument("--threads", type=int, default=CheckOptions.threads, help="threads of the runtime (default %(default)s)")
    command.add_argument("--gates", type=Path, help='JSON with limits, such as {"top1": 0.99, "max_abs_diff": null}')
    command.add_argument("--quality", action="store_true", help="also score perplexity, KL and top-1 on evaluation.npz")
    command.add_argument("--tokens", type=Path, help="also write the numbers of every scored token, as .npz; implies --quality")
    command.add_argument("--windows", type=int, help="score so many evaluation windows for --answers alone, without --quality")
    command.add_argument("--answers", type=Path, help="also write what other devices are compared by, as .npz")
    command.add_argument("--no-timing", action="store_true", help="replay only; no times and no memory")
    command.add_argument(
        "--prompt-tokens", type=int, action="append", help=f"prompt length to time beside the golden one's; may be given again {PROMPTS}"
    )
    command.add_argument("--decode-tokens", type=int, default=CheckOptions.decode_tokens, help="single tokens timed (default %(default)s)")
    command.add_argument(
        "--packed", type=Path, help="folder for the weights of an ONNX artifact as this machine's kernels want them: made once, then mapped"
    )
    command.add_argument("--device", default=CheckOptions.device, help="name of this device in the result (default %(default)s)")
    return command


if __name__ == "__main__":
    sys.exit(main())
