"""What a person should know of a stage that ended well, read from what it wrote: so a result of an earlier run is told of too."""

import json
from collections.abc import Callable
from pathlib import Path


def notes_of(stage: str, folder: Path) -> list[str]:
    """One line for each thing in a stage's record that went another way than asked for; most stages have none."""
    reader = READERS.get(stage)
    return reader(json.loads((folder / f"{stage}.json").read_text(encoding="utf-8"))) if reader else []


def of_prune(record: dict) -> list[str]:
    """Damping that was raised, and inputs that carried nothing."""
    method, lines = record["method"], []
    if raised := method.get("damped_more"):
        most = max(raised, key=raised.__getitem__)
        lines.append(
            f"second moments of {len(raised)} layers were not positive definite at prune.damping {method['damping']:g} and were damped"
            f" more, those of {most} with {raised[most]:g}; give more calibration windows to need less"
        )
    if dead := method.get("dead_inputs"):
        most = max(dead, key=dead.__getitem__)
        lines.append(f"{len(dead)} layers have inputs that are zero on all calibration text, {most} {dead[most]} of them")
    return lines


def of_recover(record: dict) -> list[str]:
    """Training that ended before its last step."""
    last = record["curve"][-1]["step"] if record["curve"] else 0
    kept = f"the model {'before it' if record['kept'] == 'before' else 'of ' + record['kept']} is kept"
    if record["diverged"]:
        steps, rate = record["settings"]["steps"], record["learning_rate"]
        return [f"diverged after step {last} of {steps} and was stopped; {kept}; set recover.learning_rate below {rate:g}"]
    if record["stopped_early"]:
        return [f"stopped at step {last} of {record['settings']['steps']}, as nothing was gained any more; {kept}"]
    return []


READERS: dict[str, Callable[[dict], list[str]]] = {"prune": of_prune, "recover": of_recover}
