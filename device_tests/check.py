"""One artifact in one runtime: check its bytes, measure, replay the golden vectors, score quality, judge."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Callable

import numpy as np

from device_tests.answers import Choices, write_answers
from device_tests.artifact import Artifact, read_artifact
from device_tests.cold_load import cold_load_ms
from device_tests.errors import ArtifactFailure, DeviceTestError
from device_tests.gates import Gates, judge
from device_tests.quality import Quality, score_session, summary, write_scores
from device_tests.replay import Replay, replay
from device_tests.result import DeviceRecord, environment, quality_record, replay_fields, timing_fields
from device_tests.sessions import Session, import_runtime, open_artifact
from device_tests.timing import measure
from device_tests.vectors import Vectors, open_evaluation, open_golden, read_rows

PROMPTS = (16, 64, 256)  # tokens; timed beside the golden prompt's length where the context holds them


@dataclass(frozen=True)
class CheckOptions:
    """What to do. ``prompts`` are lengths to time beside the golden prompt's; ``timing`` False only replays.

    ``tokens`` is the .npz that every scored token goes to; it needs ``quality``. ``windows`` bounds the evaluation windows that
    are scored; then ``quality`` is not told, because it is no whole one, and they serve ``answers`` alone: the .npz that other
    devices are compared by. ``packed`` keeps an ONNX artifact's packed weights, and then there is no cold load of the artifact.
    """

    runtime: str
    threads: int = 1
    gates: Gates = Gates()
    quality: bool = False
    windows: int | None = None
    tokens: Path | None = None
    answers: Path | None = None
    timing: bool = True
    prompts: tuple[int, ...] = PROMPTS
    decode_tokens: int = 128
    device: str = "local"
    packed: Path | None = None


def check(sidecar: Path, golden: Path, options: CheckOptions) -> dict[str, Any]:
    """The result as JSON values; ``device.passed`` is the verdict. DeviceTestError for a person's mistake."""
    if options.windows is not None and (options.answers is None or options.windows < 1):
        raise DeviceTestError(f"{options.windows} evaluation windows serve a comparison only; give 1 or more, and --answers")
    artifact = read_artifact(sidecar)
    vectors = open_golden(golden, artifact.interface)
    if options.quality or options.windows is not None:
        open_evaluation(golden, artifact.interface)  # a fault in it is told before the long work
    version = import_runtime(options.runtime)
    cold_ms = cold_load_ms(sidecar, options.runtime, options.threads) if options.timing and options.packed is None else None

    def load() -> Session:
        return open_artifact(artifact, options.runtime, options.threads, options.packed)

    result = check_artifact(artifact, vectors, options, version, load)
    result["device"]["load_cold_ms"] = cold_ms
    return result


def check_artifact(artifact: Artifact, golden: Vectors, options: CheckOptions, version: str, load: Callable[[], Session]) -> dict[str, Any]:
    """As ``check``, with the artifact read and the runtime imported; ``load`` opens it."""
    fields: dict[str, Any] = {}
    failures: list[str] = []
    quality = None
    try:
        session = _load_and_time(golden, options, load, fields)
        fields["notes"] = [*fields.get("notes", []), *session.notes]
        replayed = replay(session, golden)
        fields.update(replay_fields(replayed))
        quality = _score(session, artifact, golden, replayed, options)
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


def _score(session: Session, artifact: Artifact, golden: Vectors, replayed: Replay, options: CheckOptions) -> Quality | None:
    """Quality over all evaluation windows, if wanted; tokens and answers go to the files that are wanted."""
    answers, scores = replayed.answers, None
    if options.quality or options.windows is not None:
        choices = Choices()
        evaluation = open_evaluation(golden.path.parent, artifact.interface)
        scores = score_session(session, evaluation, choices, options.windows)
        chosen = np.array(choices.rows, dtype=np.int32).reshape(scores.nll.shape)
        answers = replace(answers, choice=chosen, nll=scores.nll, evaluated=True)
    if options.answers is not None:
        write_answers(options.answers, answers)
    if scores is not None and options.tokens is not None:
        write_scores(options.tokens, scores)
    return summary(scores) if scores is not None and options.windows is None else None


def _load_and_time(golden: Vectors, options: CheckOptions, load: Callable[[], Session], fields: dict[str, Any]) -> Session:
    """Open the artifact, timed or not; ``fields`` takes what was measured."""
    if not options.timing:
        return load()
    if min(options.prompts, default=1) < 1 or options.decode_tokens < 1:
        raise DeviceTestError("nothing to time; give at least one prompt token and one decode token")
    window = next(read_rows(golden, ("windows",)))["windows"]
    session, timing = measure(load, window[: golden.prompt_tokens], options.decode_tokens, options.prompts)
    fields.update(timing_fields(timing))
    return session
