"""One column of the demo: a process with one artifact in one runtime. ``python -m pipeline.demo_worker '<order as JSON>'``.

Orders come as lines of JSON on standard input, events go as lines of JSON to standard output. A process of its own, because two
runtimes do not live well in one, and because its peak memory is then the model's. It ends when its input does, as when the server dies.
"""

import json
import os
import queue
import signal
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path
from typing import TextIO

from tokenizers import Tokenizer

from device_tests.artifact import read_artifact
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.sessions import import_runtime, open_artifact
from device_tests.timing import peak_rss_mb
from models.errors import UserError
from pipeline.streaming import GenerateOptions, OneByOne, Request, Written, prompt_ids, stream

SAY_EVERY_S = 0.03  # more often is more than an eye sees, and would cost the model its time


class Voice:
    """Writes events, and gathers pieces of text that come faster than anybody reads."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._run, self._gathered, self._said = out, 0, "", 0.0

    def say(self, event: str, **values) -> None:
        self._out.write(json.dumps({"event": event, "run": self._run, **values}) + "\n")
        self._out.flush()

    def begin(self, run: int) -> None:
        """All that follows belongs to ``run``."""
        self._run, self._gathered, self._said = run, "", 0.0

    def write(self, piece: Written) -> None:
        """Say a piece now, or together with the next ones."""
        self._gathered += piece.text
        now = time.perf_counter()
        if now - self._said >= SAY_EVERY_S:
            values = {**asdict(piece), "text": self._gathered, "peak_rss_mb": peak_rss_mb()}
            self._gathered, self._said = "", now
            self.say("text", **values)

    @property
    def rest(self) -> str:
        """What was gathered and not said."""
        return self._gathered


class Orders:
    """Reads orders while the model writes: what to complete waits in ``wanted``, and ``stopped`` is the last run to be stopped."""

    def __init__(self, source: TextIO) -> None:
        self.wanted: queue.Queue[dict | None] = queue.Queue()
        self.stopped = 0
        threading.Thread(target=self._read, args=(source,), daemon=True).start()

    def _read(self, source: TextIO) -> None:
        for line in source:
            order = json.loads(line)
            if "stop" in order:
                self.stopped = order["stop"]
            else:
                self.wanted.put(order)
        self.stopped = sys.maxsize
        self.wanted.put(None)


def work(order: dict, orders: Orders, voice: Voice) -> None:
    """Open the artifact and complete what is asked for until there are no more orders."""
    import_runtime(order["runtime"])
    started = time.perf_counter()
    artifact = read_artifact(Path(order["sidecar"]))
    session = open_artifact(artifact, order["runtime"], order["threads"])
    tokenizer = Tokenizer.from_file(order["tokenizer"])
    voice.say("ready", load_ms=1000 * (time.perf_counter() - started), peak_rss_mb=peak_rss_mb())
    while (asked := orders.wanted.get()) is not None:
        run = asked["run"]
        voice.begin(run)

        def emit(piece: Written, run: int = run) -> bool:
            voice.write(piece)
            return orders.stopped < run

        try:
            options = GenerateOptions(**{**asked["options"], "stop": tuple(asked["options"]["stop"])})
            request = Request(artifact, tokenizer, prompt_ids(tokenizer, asked["prompt"], artifact), options)
            session.reset()
            made = asdict(stream(OneByOne(session, options), request, emit))
            voice.say("done", **{**made, "text": voice.rest})
        except (UserError, DeviceTestError, ArtifactFailure) as error:
            voice.say("failed", message=str(error))


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the server, which then closes standard input
    events = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())  # what libraries print must not stand among the events
    voice = Voice(events)
    try:
        work(json.loads(sys.argv[1]), Orders(sys.stdin), voice)
    except (DeviceTestError, ArtifactFailure) as error:
        voice.say("broken", message=str(error))
    except BrokenPipeError:
        pass  # the server is gone, and nobody is left to tell
    sys.stderr.flush()
    os._exit(0)  # some runtimes crash in their exit handlers


if __name__ == "__main__":
    main()
