"""One artifact in one runtime: check its bytes, measure, replay the golden vectors, score quality, judge."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Callable

import numpy as np

from device_tests.artifact import Artifact, read_artifact
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.gates import Gates, judge
from device_tests.quality import Quality, score_session, summary, write_scores
from device_tests.replay import replay
from device_tests.result import DeviceRecord, environment, quality_record, replay_fields, timing_fields
from device_tests.sessions import Session, import_runtime, open_artifact
from device_tests.timing import measure
from device_tests.vectors import Vectors, open_evaluation, open_golden, read_rows


@dataclass(frozen=True)
class CheckOptions:
    """What to do. ``prompt_tokens`` None times the golden prompt's length; ``timing`` False only replays.

    ``tokens`` is the .npz that every scored token goes to; it needs ``quality``.
    """

    runtime: str
    threads: int = 1
    gates: Gates = Gates()
    quality: bool = False
    tokens: Path | None = None
    timing: bool = True
    prompt_tokens: int | None = None
    decode_tokens: int = 128
    device: str = "local"


def check(sidecar: Path, golden: Path, options: CheckOptions) -> dict[str, Any]:
    """The result as JSON values; ``device.passed`` is the verdict. DeviceTestError for a person's mistake."""
    artifact = read_artifact(sidecar)
    vectors = open_golden(golden, artifact.interface)
    if options.quality:
        open_evaluation(golden, artifact.interface)  # a fault in it is told before the long work
    version = import_runtime(options.runtime)
    return check_artifact(artifact, vectors, options, version, lambda: open_artifact(artifact, options.runtime, options.threads))


def check_artifact(artifact: Artifact, golden: Vectors, options: CheckOptions, version: str, load: Callable[[], Session]) -> dict[str, Any]:
    """As ``check``, with the artifact read and the runtime imported; ``load`` opens it."""
    fields: dict[str, Any] = {}
    failures: list[str] = []
    quality = None
    try:
        session = _load_and_time(golden, options, load, fields)
        replayed = replay(session, golden)
        fields.update(replay_fields(replayed))
        quality = _score(session, open_evaluation(golden.path.parent, artifact.interface), options) if options.quality else None
        failures = judge(options.gates, replayed, quality)
    except ArtifactFailure as failure:
        failures = [" ".join(str(failure).split())]
    record = DeviceRecord(
        device=options.device,
        isa=os.uname().machine,
        runtime=options.runtime,
        runtime_version=version,
        threads=options.threads,
        environment=environment(),
        passed=not failures,
        failures=[f"{artifact.name} in {options.runtime} on {options.device}: {failure}" for failure in failures],
        **fields,
    )
    return {
        "artifact": artifact.name,
        "sha256": artifact.sha256,
        "device": asdict(record),
        "quality": quality_record(quality) if quality else None,
    }


def _score(session: Session, evaluation: Vectors, options: CheckOptions) -> Quality:
    """Quality over the evaluation windows; every token goes to ``options.tokens`` where that is wanted."""
    scores = score_session(session, evaluation)
    if options.tokens is not None:
        write_scores(options.tokens, scores)
    return summary(scores)


def _load_and_time(golden: Vectors, options: CheckOptions, load: Callable[[], Session], fields: dict[str, Any]) -> Session:
    """Open the artifact, timed or not; ``fields`` takes what was measured."""
    if not options.timing:
        return load()
    window = next(read_rows(golden, ("windows",)))["windows"]
    wanted = golden.prompt_tokens if options.prompt_tokens is None else options.prompt_tokens
    if wanted < 1 or options.decode_tokens < 1:
        raise DeviceTestError("nothing to time; give at least one prompt token and one decode token")
    session, timing = measure(load, np.resize(window, wanted), options.decode_tokens)
    fields.update(timing_fields(timing))
    return session
