"""Progress with time left on a terminal, silence elsewhere.

A stage runs in a process of its own whose output goes to a log file. The runner hands that process the terminal's file
descriptor in ``POCKETLM_PROGRESS_FD``, so that the bar still reaches the person.
"""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
PROGRESS_FD = "POCKETLM_PROGRESS_FD"


def terminal() -> Console | None:
    """The console to draw on, or None when nobody is looking at one."""
    try:
        descriptor = int(os.environ.get(PROGRESS_FD, sys.stderr.fileno()))
    except (OSError, ValueError):  # stderr replaced by an object without a descriptor, as test runners do
        return None
    if not os.isatty(descriptor):
        return None
    return Console(file=os.fdopen(os.dup(descriptor), "w"), force_terminal=True)


def track(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items of ``iterable``, drawing a bar with the time left. ``total`` counts items when ``len`` cannot."""
    console = terminal()
    if console is None:
        yield from iterable
        return
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        yield from progress.track(iterable, total=total, description=description)
    console.file.close()
