"""What is common to every row of the benchmark: the order that its process is given, the common timing loop, the answer.

The peers' own environments import this too: the standard library, numpy and ``device_tests`` only.
"""

import json
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np

from device_tests.artifact import Interface
from device_tests.quality import evaluate
from device_tests.result import quality_record, timing_fields
from device_tests.sessions import Session
from device_tests.timing import measure
from device_tests.vectors import open_evaluation

# Imports and checks what an order needs, and returns what opens the model: the opening alone is the load time.
Prepare = Callable[["Order"], Callable[[], Session]]


@dataclass(frozen=True)
class Order:
    """What to time: ``model`` is what the row opens (a sidecar, a folder, a file), ``prompt`` int32 ``[n]`` as .npy.

    ``lengths`` are prompt lengths beside the prompt's own. ``golden`` is the folder whose evaluation windows are scored after the
    timing, None where quality is not asked for. ``interface`` has the sizes of the checkpoint; artifacts bring their own.
    """

    model: str
    threads: int
    prompt: str
    decode_tokens: int
    lengths: tuple[int, ...] = ()
    golden: str | None = None
    runtime: str | None = None
    interface: dict | None = None

    @property
    def sizes(self) -> Interface:
        return Interface(**self.interface)

    @staticmethod
    def parse(text: str) -> "Order":
        """From JSON; a key that there is not is an error."""
        values = json.loads(text)
        return Order(**{**values, "lengths": tuple(values.get("lengths", ()))})

    def as_json(self) -> str:
        return json.dumps({field.name: getattr(self, field.name) for field in fields(self)})


def answer(prepare: Prepare, order: Order) -> dict:
    """Time and, if asked for, score: the fields of ``timing_fields``, ``quality`` (None: not asked for) and its seconds, ``notes``."""
    prompt = np.load(order.prompt, allow_pickle=False)
    session, timing = measure(prepare(order), prompt, order.decode_tokens, order.lengths)
    found = {**timing_fields(timing), "timing": asdict(timing), "context_tokens": session.interface.context_tokens, "quality": None}
    start = time.perf_counter()
    if order.golden is not None:
        found["quality"] = quality_record(evaluate(session, open_evaluation(Path(order.golden), session.interface)))
    found["scoring_s"] = time.perf_counter() - start
    found["notes"] = [*found["notes"], *getattr(session, "notes", [])]
    return found


def main(prepare: Prepare, text: str) -> None:
    """Answer the order with one line of JSON, the last that is printed; exit code 1 with the reason as the last line of stderr."""
    try:
        found = answer(prepare, Order.parse(text))
    except Exception as error:  # the border of the process: what a runtime says is the row's reason
        traceback.print_exc()
        print(f"{type(error).__name__}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)
    print(json.dumps(found))
