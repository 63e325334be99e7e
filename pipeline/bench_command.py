"""The command ``pocketlm bench``: sizes into subjects, one run after the other, and what is left in the folder of results."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

from models.errors import UserError
from pipeline.bench import BenchPlan, Subject, bench
from pipeline.bench_record import missed
from pipeline.bench_report import PAGE, page, write_size
from pipeline.bench_sizes import DEMO_SIZE, recipe_of, size_named
from pipeline.recipe import Recipe


@dataclass(frozen=True)
class Request:
    """What was asked for: names of sizes, or a recipe of the user's own; ``overrides`` are of the form table.key=value."""

    sizes: tuple[str, ...]
    recipe: Recipe | None
    overrides: tuple[str, ...]


def run(request: Request, work: Path, out: Path, plan: BenchPlan, tell: Callable[[str, str], None]) -> tuple[dict, list[str]]:
    """Measure every size; each is saved as soon as it is done. Returns the record and what int8 does not hold."""
    if request.recipe is not None and request.sizes:
        raise UserError("--size names the model already; leave out --size, or --recipe, --model and the texts")
    record, lines = {}, []
    for name in request.sizes or (DEMO_SIZE,):
        subject = subject_of(name, request, work)
        tell(subject.name, subject.about)
        size = bench(subject, work, replace(plan, only=(*plan.only, *subject.only)), tell)
        record = write_size(size, out)
        write_page(record, out)
        lines += missed(size)
    return record, lines


def subject_of(name: str, request: Request, work: Path) -> Subject:
    """A named size, or the user's recipe, whose weights are taken for trained ones."""
    if request.recipe is not None:
        return Subject(request.recipe.name, f"the model {request.recipe.name}", request.recipe, trained=True)
    size = size_named(name)
    return Subject(name, size.about, recipe_of(size, work, list(request.overrides)), size.config is None, size.limit_s, size.only)


def write_page(record: dict, out: Path) -> None:
    """``bench.md`` and its plots."""
    from pipeline.bench_plots import write_plots  # matplotlib takes a second, and tests of the rest need none

    (out / PAGE).write_text(page(record, write_plots(record, out)), encoding="utf-8")
