"""Progress with time left on a terminal, silence elsewhere.

A stage runs in a process of its own whose output goes to a log file. The runner hands that process the terminal's file
descriptor in ``POCKETLM_PROGRESS_FD``, so that the bar still reaches the person.
"""

import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

Item = TypeVar("Item")
PROGRESS_FD = "POCKETLM_PROGRESS_FD"
_drawn_on: list[Console] = []  # consoles of the bars that this process draws


def terminal() -> Console | None:
    """The console to draw on, or None when nobody is looking at one."""
    try:
        descriptor = int(os.environ.get(PROGRESS_FD, sys.stderr.fileno()))
    except (OSError, ValueError):  # stderr replaced by an object without a descriptor, as test runners do
        return None
    if not os.isatty(descriptor):
        return None
    return Console(file=os.fdopen(os.dup(descriptor), "w"), force_terminal=True, highlight=False, soft_wrap=True)


def shown_on() -> Console | None:
    """Where this process draws a bar now, None where it draws none: lines that are printed there stand above the bar."""
    return _drawn_on[-1] if _drawn_on else None


@contextmanager
def bar(console: Console) -> Iterator[Progress]:
    """A bar on ``console`` that is gone when the block ends."""
    columns = (TextColumn("  {task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    _drawn_on.append(console)
    try:
        # not redirected: what libraries print meanwhile would go to the terminal, and not to the stage's log
        with Progress(*columns, console=console, transient=True, redirect_stdout=False, redirect_stderr=False) as progress:
            yield progress
    finally:
        _drawn_on.remove(console)
        console.file.close()


def track(iterable: Iterable[Item], description: str, total: int | None = None) -> Iterator[Item]:
    """Yield the items of ``iterable``, drawing a bar with the time left. ``total`` counts items when ``len`` cannot."""
    console = terminal()
    if console is None:
        yield from iterable
        return
    with bar(console) as progress:
        yield from progress.track(iterable, total=total, description=description)


@contextmanager
def meter(description: str, total: int) -> Iterator[Callable[[int], None]]:
    """A bar with the time left for work that is no loop of ours: what is yielded moves it on by so many of ``total``."""
    console = terminal()
    if console is None:
        yield lambda count: None
        return
    with bar(console) as progress:
        task = progress.add_task(description, total=total)
        yield lambda count: progress.advance(task, count)
