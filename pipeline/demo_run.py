"""The demo's processes, one per column, and one completion at a time over all of them."""

import json
import logging
import queue
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from device_tests.devices.local import child_environment
from pipeline.demo_columns import Column
from pipeline.streaming import GenerateOptions

WORKER = ("-m", "pipeline.demo_worker")
PATIENCE_S = 1.0  # between signs of life, so that a page that was closed is noticed
CLOSING_S = 3.0
ENDED = ("done", "failed", "broken")
logger = logging.getLogger(__name__)
BETWEEN_RUNS = 0  # what a process says of itself and not of a run


class Worker:
    """The process of one column. It is started when it is first needed and again after it died."""

    def __init__(self, column: Column, tokenizer: Path, threads: int, heard: "queue.SimpleQueue[dict]") -> None:
        self.column, self._heard, self._threads = column, heard, threads
        self._order = {"sidecar": str(column.sidecar), "runtime": column.runtime, "threads": threads, "tokenizer": str(tokenizer)}
        self.process: subprocess.Popen | None = None
        self._writing = threading.Lock()

    def start(self) -> None:
        """Have a process, which opens its artifact at once."""
        if self.process is not None and self.process.poll() is None:
            return
        words = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
        self.process = subprocess.Popen(
            [sys.executable, *WORKER, json.dumps(self._order)], env=child_environment(self._threads),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=words, text=True, encoding="utf-8",
        )  # fmt: skip
        threading.Thread(target=self._listen, args=(self.process, words), daemon=True).start()

    def _listen(self, process: subprocess.Popen, words) -> None:
        with words:
            for line in process.stdout:
                self._heard.put({"worker": self, "process": process, **json.loads(line)})
            code = process.wait()
            words.seek(0)
            last = (words.read().strip().splitlines() or [""])[-1]
        how = f"signal {signal.Signals(-code).name}" if code < 0 else f"code {code}"
        message = f"its process ended with {how}: {last}".rstrip(": ")
        self._heard.put({"worker": self, "process": process, "event": "broken", "run": BETWEEN_RUNS, "message": message})

    def order(self, order: dict) -> None:
        """Send an order; one to a process that is gone is lost, and its end is heard instead."""
        with self._writing:
            try:
                self.process.stdin.write(json.dumps(order) + "\n")
                self.process.stdin.flush()
            except (BrokenPipeError, ValueError):  # it died, or it was closed
                logger.info("%s is gone and was not told %s", self.column.artifact, order)

    def close(self) -> None:
        """End the process: it goes when its orders end, and is killed if it does not."""
        if self.process is None:
            return
        try:
            self.process.stdin.close()
        except BrokenPipeError:
            logger.info("%s was gone before it was closed", self.column.artifact)
        try:
            self.process.wait(CLOSING_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


class Demo:
    """All columns. One completion at a time: a second one meanwhile would take the first one's processors."""

    def __init__(self, columns: tuple[Column, ...], tokenizer: Path, threads: int) -> None:
        self._heard: queue.SimpleQueue[dict] = queue.SimpleQueue()
        self.columns = columns
        self._workers = [Worker(column, tokenizer, threads, self._heard) if column.sidecar else None for column in columns]
        self._busy, self._run, self._stopped = threading.Lock(), 0, 0

    def start(self) -> None:
        """Start every process, so that the first completion need not wait for it."""
        for worker in filter(None, self._workers):
            worker.start()

    def stop(self) -> None:
        """End the completion that is going on, in every column."""
        self._stopped = self._run
        for worker in filter(None, self._workers):
            worker.order({"stop": self._run})

    def close(self) -> None:
        """End every process."""
        for worker in filter(None, self._workers):
            worker.close()

    @contextmanager
    def completion(self, prompt: str, options: GenerateOptions, in_turn: bool) -> Iterator[Iterator[tuple[str, dict]] | None]:
        """What happens while all columns complete ``prompt``, at once or in turn; None while somebody else has them.

        Events are a name and its values, of which ``column`` is the place of the column; ``alive`` comes when nothing did for a while.
        However the caller leaves this, the columns are stopped first.
        """
        if not self._busy.acquire(blocking=False):
            yield None
            return
        running: set[Worker] = set()
        try:
            self._run += 1
            yield self._events({"run": self._run, "prompt": prompt, "options": orders_of(options)}, in_turn, running)
        finally:
            self._stop_and_drain(running)
            self._busy.release()

    def _events(self, order: dict, in_turn: bool, running: set[Worker]) -> Iterator[tuple[str, dict]]:
        waiting = [worker for worker in self._workers if worker]
        while waiting or running:
            if self._stopped >= self._run:
                waiting.clear()
            while waiting and not (in_turn and running):
                worker = waiting.pop(0)
                worker.start()
                running.add(worker)
                worker.order(order)
                yield "begun", {"column": self._workers.index(worker)}
            if running:
                yield from self._next(running)

    def _next(self, running: set[Worker]) -> Iterator[tuple[str, dict]]:
        """The next event of this run, if any comes soon. A process that broke has ended its part."""
        try:
            event = self._heard.get(timeout=PATIENCE_S)
        except queue.Empty:
            yield "alive", {}
            return
        worker, process, kind, run = (event.pop(key) for key in ("worker", "process", "event", "run"))
        if worker not in running or process is not worker.process or run not in (self._run, BETWEEN_RUNS):
            return
        if kind in ENDED:
            running.discard(worker)
        yield kind, {"column": self._workers.index(worker), **event}

    def _stop_and_drain(self, running: set[Worker]) -> None:
        """Nobody listens any more: let what still runs come to its end, so that the next run starts with idle processes."""
        if running:
            self.stop()
        while running:
            for _ in self._next(running):
                pass


def orders_of(options: GenerateOptions) -> dict:
    """The options that a process is told; the others are for a terminal."""
    return {name: getattr(options, name) for name in ("max_tokens", "temperature", "top_k", "top_p", "seed", "stop")}
