"""One of our artifacts in one runtime, timed for the benchmark: ``python -m pipeline.bench_artifact <order>``.

Nothing but numpy and the runtime is imported, so that the peak memory is theirs. ``Order.model`` is the artifact's sidecar.
"""

import sys
from collections.abc import Callable
from pathlib import Path

from device_tests.artifact import read_artifact
from device_tests.sessions import Session, import_runtime, open_artifact
from pipeline.bench_child import Order, main


def prepare(order: Order) -> Callable[[], Session]:
    """Import the runtime and check the artifact's bytes."""
    artifact = read_artifact(Path(order.model))
    import_runtime(order.runtime)
    return lambda: open_artifact(artifact, order.runtime, order.threads)


if __name__ == "__main__":
    main(prepare, sys.argv[1])
