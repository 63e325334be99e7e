"""The fresh process in which one stage runs: ``python -m pipeline.stage_process '<order as JSON>'``.

It writes how it ended to the pipe whose number the order names: ``done`` with its peak memory, ``user`` or ``gate`` with the
message of the error, ``bug`` with the exception.
"""

import ctypes
import importlib
import json
import os
import random
import signal
import sys
import traceback
from pathlib import Path

from device_tests.timing import peak_rss_mb
from models.errors import NO_ROOM, GateError, UserError

MALLOPT_MMAP_THRESHOLD, LARGE_BLOCK_BYTES = -3, 2**20  # mallopt(3)
MESSAGE_LIMIT = 8192  # characters: what the parent reads only at the end must fit a pipe


def run(order: dict) -> dict:
    """Run the stage that ``order`` names and return how it ended."""
    try:
        random.seed(0)
        module, name = order["settings_class"]
        settings = getattr(importlib.import_module(module), name).model_validate(order["settings"])
        inputs = {keyword: Path(path) for keyword, path in order["inputs"].items()}
        importlib.import_module(order["module"]).run(settings, Path(order["out"]), **inputs)
        return {"ended": "done", "peak_rss_mb": peak_rss_mb()}
    except UserError as error:
        return {"ended": "user", "message": str(error)[:MESSAGE_LIMIT]}
    except GateError as error:
        return {"ended": "gate", "message": str(error)[:MESSAGE_LIMIT]}
    except OSError as error:
        traceback.print_exc()
        if error.errno in NO_ROOM:
            return {"ended": "user", "message": "no room left on the disk; free some and run again, finished stages are kept"}
        return {"ended": "bug", "message": f"{type(error).__name__}: {error}"}
    except Exception as error:  # the border of the process: whatever it is, it is told to the parent and logged whole
        traceback.print_exc()
        first_line = (str(error).splitlines() or [""])[0][:MESSAGE_LIMIT]
        return {"ended": "bug", "message": f"{type(error).__name__}: {first_line}"}


def return_large_blocks() -> None:
    """Have glibc's ``malloc`` give every large block back to the system as soon as it is freed. Elsewhere there is no such call.

    By itself it keeps freed blocks of up to 32 MB, as most matrices are: gigabytes of a process that holds a model several times, one
    after another.
    """
    option = getattr(ctypes.CDLL(None), "mallopt", None)
    if option is not None:
        option(MALLOPT_MMAP_THRESHOLD, LARGE_BLOCK_BYTES)


def die_with_parent() -> None:
    """Ask the kernel to kill this process when the runner dies: two writers in one draft folder would mix their results."""
    set_parent_death_signal = 1  # PR_SET_PDEATHSIG, prctl(2)
    ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)


def main() -> None:
    die_with_parent()
    order = json.loads(sys.argv[1])
    if order["module"].startswith("exporters."):  # training frees and wants the same blocks in every step
        return_large_blocks()
    outcome = run(order)
    with os.fdopen(order["said"], "w") as pipe:
        json.dump(outcome, pipe)
    sys.stdout.flush()
    sys.stderr.flush()
    # Some of the libraries crash in their exit handlers; the result is written, so nothing is left to do.
    os._exit(0 if outcome["ended"] == "done" else 1)


if __name__ == "__main__":
    main()
