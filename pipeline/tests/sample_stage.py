"""A stage that costs nothing and ends in every way that a stage can end: the runner's tests run it for real."""

import errno
import os
import signal
import time
from pathlib import Path
from typing import Literal

from models.errors import GateError, UserError
from models.progress import track
from models.settings import StageSettings


class SampleSettings(StageSettings):
    value: int = 1
    ends: Literal["well", "user", "gate", "bug", "killed", "disk", "fills", "sleeps", "resumes", "counts"] = "well"
    calls: Path | None = None


def run(settings: SampleSettings, out: Path, **inputs: Path) -> None:
    if settings.calls:
        with settings.calls.open("a") as file:
            file.write(f"{settings.value}\n")
    (out / "result.txt").write_text(str(settings.value + sum(int((path / "result.txt").read_text()) for path in inputs.values())))
    failures = {
        "user": UserError("value is wrong; take another"),
        "gate": GateError("0.5 over the limit 0.1"),
        "bug": KeyError("surprise"),
        "disk": OSError(errno.ENOSPC, "No space left on device"),
    }
    if settings.ends in failures:
        raise failures[settings.ends]
    if settings.ends == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if settings.ends == "fills":
        fill_disk(out / "large")
    if settings.ends == "sleeps":
        time.sleep(60)
    if settings.ends == "counts":
        for _ in track(range(8), "counting"):
            print("a library says what nobody asked")
            time.sleep(0.3)  # the bar is drawn ten times a second, and estimates from what it saw
    if settings.ends == "resumes":
        resume(out / ".resume")


def fill_disk(path: Path) -> None:
    """Writes until nothing is left, then fails as a library does that does not say why."""
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(b"x" * 4096)
        except OSError as error:
            raise RuntimeError("could not write the model") from error


def resume(folder: Path) -> None:
    """Dies the first time, after it has left something to resume from; goes on from there the second time."""
    if not folder.is_dir():
        folder.mkdir()
        (folder / "half.txt").write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)
    assert (folder / "half.txt").read_text() == "half"
