"""How much ``pocketlm`` says: ``--quiet`` and ``--verbose``, before a command or among its options.

What a command was asked for goes to standard output. What it says meanwhile goes to standard error: a line per stage, and on a terminal
a bar with the time left. ``--quiet`` leaves out the latter; ``--verbose`` adds why a stage runs, where its result lies, and what a
broken stage's libraries printed. Errors are always told. Colours are rich's, which leaves them out where NO_COLOR is set.
"""

import logging
import os
import sys
from typing import Annotated

import typer
from rich.console import Console
from typer.core import TyperCommand, TyperGroup

from models.progress import PROGRESS_FD, shown_on

NOWHERE = "-1"  # as the descriptor of a terminal: no bar is drawn
told = Console(stderr=True, highlight=False, soft_wrap=True)
errors = Console(stderr=True, highlight=False, soft_wrap=True)


def tell(stage: str, state: str) -> None:
    """One line per stage; on a terminal the running stage is named too, where its progress bar stands."""
    if told.quiet or (state == "runs" and not told.is_terminal):
        return
    (shown_on() or told).print(f"  {stage:<12} {state}", markup=False)


def be_quiet(asked: bool) -> None:
    if asked:
        told.quiet = True
        os.environ[PROGRESS_FD] = NOWHERE


def be_verbose(asked: bool) -> None:
    if asked:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(logging.Formatter("    %(message)s"))
        logger = logging.getLogger("pipeline")
        logger.setLevel(logging.DEBUG)
        logger.handlers = [handler]


Quiet = Annotated[bool, typer.Option("--quiet", "-q", callback=be_quiet, expose_value=False, help="say nothing but results and errors")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", callback=be_verbose, expose_value=False, help="say why, and where results lie")]


class Commands(TyperGroup):
    """The commands, each of which takes the options of the whole program as well, so that they may stand before it or behind it."""

    def get_command(self, ctx: typer.Context, cmd_name: str) -> TyperCommand | None:
        """The command with those options behind its own."""
        command = super().get_command(ctx, cmd_name)
        shared = [param for param in self.params if param.name in ("quiet", "verbose")]
        if command is not None and shared[0] not in command.params:
            command.params = [*command.params, *shared]
        return command

    def invoke(self, ctx: typer.Context) -> object:
        """Run the command. Ctrl-C is told here, because typer would end without a word."""
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            errors.print("pocketlm: interrupted; what was finished is kept")
            raise typer.Exit(130) from None
