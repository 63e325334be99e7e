"""Load an artifact whose files are not in the page cache, in a process of its own: ``python -m device_tests.cold_load``.

Linux drops a file's clean pages when it is asked to (posix_fadvise); whether it really did shows in the bytes that the process then
reads from storage. Where it did not (a RAM disk, another system) there is no cold load to tell of.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

from device_tests.artifact import read_artifact, read_json
from device_tests.errors import DeviceTestError
from device_tests.sessions import import_runtime, open_artifact

LEAST_SHARE_READ = 0.5  # of the artifact's bytes; less was not cold
TIMEOUT_S = 600.0


def cold_load_ms(sidecar: Path, runtime: str, threads: int) -> float | None:
    """Milliseconds to open the artifact from storage; None where that cannot be measured here."""
    command = [sys.executable, "-m", "device_tests.cold_load", str(sidecar), runtime, str(threads)]
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
        return json.loads(done.stdout)["load_cold_ms"] if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None  # the artifact itself is judged by the process that asks


def storage_bytes_read() -> int | None:
    """Bytes that this process has fetched from storage so far; None where the system does not tell."""
    try:
        lines = Path("/proc/self/io").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


def forget(path: Path) -> None:
    """Ask the system to drop the file's pages."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def main(arguments: list[str]) -> int:
    """Print ``{"load_cold_ms": number or null}`` for a sidecar, a runtime and a number of threads."""
    sidecar, runtime, threads = Path(arguments[0]), arguments[1], int(arguments[2])
    try:
        artifact = read_artifact(sidecar)
        import_runtime(runtime)
    except DeviceTestError as error:
        print(error, file=sys.stderr)
        return 2
    for file in read_json(sidecar, "the artifact's JSON")["files"]:
        forget(sidecar.parent / file["path"])
    before = storage_bytes_read()
    start = time.perf_counter()
    open_artifact(artifact, runtime, threads)
    elapsed = (time.perf_counter() - start) * 1000
    after = storage_bytes_read()
    cold = before is not None and after is not None and after - before >= LEAST_SHARE_READ * artifact.bytes
    print(json.dumps({"load_cold_ms": elapsed if cold else None}))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
