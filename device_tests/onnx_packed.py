"""An artifact's graphs with their weights as this machine's kernels want them, in a folder: packed once, and mapped from then on.

ONNX Runtime copies every matrix into memory in an order of its own. It can also write what it made of a graph and of its weights to
disk and map that (``session.save_external_prepacked_constant_initializers``). Then no weight is in the process's own memory: the pages
are the system's, which drops and reads them again as it needs. It takes more than three times the artifact on disk.

Packed weights are right for one runtime and one processor only, so both are in the folder's name. ONNX Runtime compares only some of the
bytes with what its kernels would make, so their hashes lie beside them and are checked before every opening.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path

from device_tests.artifact import Artifact, sha256_of
from device_tests.errors import ArtifactFailure, DeviceTestError

DECODE, PROMPT, SUMS = "decode.onnx", "prompt.onnx", "sha256.json"
LEAST_BYTES = 1024  # smaller initializers stay in the graph's file
CPU_INFO = Path("/proc/cpuinfo")
TELLING = ("model name", "flags", "Features", "CPU implementer", "CPU architecture", "CPU variant", "CPU part")


def packed_place(folder: Path, artifact: Artifact, version: str) -> Path:
    """Where the artifact's packed form for this processor and ONNX Runtime ``version`` lies, or will lie. DeviceTestError without /proc."""
    try:
        text = CPU_INFO.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise DeviceTestError(
            f"{CPU_INFO}: cannot be read, so nobody knows for which processor weights were packed; leave out --packed"
        ) from error
    lines = [line for line in text.split("\n\n")[0].splitlines() if line.split("\t")[0].split(":")[0].strip() in TELLING]
    digest = hashlib.sha256("\n".join([artifact.sha256, version, *lines]).encode()).hexdigest()
    return Path(folder) / f"{artifact.name}-{digest[:16]}"


def save_to(options, graph: Path) -> None:
    """Have a session that is opened with ``options`` write itself and its weights to ``graph`` and a file beside it."""
    options.optimized_model_filepath = str(graph)
    options.log_severity_level = 3  # it warns that the file is for this machine, which is what is wanted
    entries = {
        "session.optimized_model_external_initializers_file_name": f"{graph.stem}.data",
        "session.optimized_model_external_initializers_min_size_in_bytes": str(LEAST_BYTES),
        "session.save_external_prepacked_constant_initializers": "1",
    }
    for key, value in entries.items():
        options.add_session_config_entry(key, value)


def check(place: Path) -> None:
    """ArtifactFailure, naming the file, unless every file in ``place`` is as it was packed."""
    try:
        sums = json.loads((place / SUMS).read_text(encoding="utf-8"))
        spoilt = [name for name, digest in sums.items() if sha256_of(place / name) != digest]
    except (OSError, ValueError, AttributeError) as error:
        raise ArtifactFailure(f"{place}: its hashes cannot be checked ({error})") from error
    if spoilt or not {DECODE} <= sums.keys():
        raise ArtifactFailure(f"{place}: {', '.join(spoilt) or DECODE} is not as it was packed")


def make(place: Path, pack) -> None:
    """Fill ``place``, whole or not at all; ``pack(folder)`` writes the graphs there. DeviceTestError where the folder cannot be written."""
    draft = place.with_name(f"{place.name}.{os.getpid()}.draft")
    try:
        draft.mkdir(parents=True)
        pack(draft)
        sums = {path.name: sha256_of(path) for path in draft.iterdir()}
        (draft / SUMS).write_text(json.dumps(sums), encoding="utf-8")
        os.replace(draft, place)
    except OSError as error:
        if not place.is_dir():  # else another process was quicker
            raise DeviceTestError(f"{place}: cannot be written ({error.strerror}); give another folder, or leave out --packed") from error
    finally:
        shutil.rmtree(draft, ignore_errors=True)
