"""Jinja templates, read one way: a value that is missing is an error, and lines of control leave no blank lines."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).resolve().parent / "templates"


def environment(folder: Path = TEMPLATES, **options) -> Environment:
    """Templates of ``folder``; ``options`` are jinja2's own. Pages want ``autoescape=True``, texts must not have it."""
    return Environment(loader=FileSystemLoader(folder), undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, **options)
