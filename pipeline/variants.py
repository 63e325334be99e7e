"""Which of the measured artifacts go into a bundle: those that were asked for, else the best of each format."""

from collections.abc import Iterable
from dataclasses import dataclass

from models.errors import UserError
from pipeline.report import Artifact, Report
from pipeline.report_headline import ANSWER_TOKENS, answer_ms

ALL = "all"
OTHER_TENSORS = ("tflite_full_int8",)  # its inputs, outputs and cache are int8: hosts written for the others cannot feed it
ASKED = "asked for with --variants"


@dataclass(frozen=True)
class Choice:
    """Why each artifact is in the bundle or not, by name, in the report's order; ``best`` are those of ``taken`` to begin with."""

    taken: dict[str, str]
    left_out: dict[str, str]
    best: tuple[str, ...]


@dataclass(frozen=True)
class Cost:
    """What a person feels of an artifact: the wait for an answer (infinite where none was timed), and the download."""

    name: str
    answer_ms: float
    download_bytes: int

    @property
    def product(self) -> tuple[bool, float]:
        """Smaller is better: milliseconds times bytes, and where no time is known the bytes alone, behind all that were timed."""
        timed = self.answer_ms < float("inf")
        return not timed, self.download_bytes * (self.answer_ms if timed else 1)

    def told(self) -> str:
        size = f"{self.download_bytes / 1e6:.1f} MB"
        return f"{self.answer_ms:.0f} ms, {size}" if self.answer_ms < float("inf") else f"not timed, {size}"


def check_variants(asked: Iterable[str], made: Iterable[str]) -> None:
    """UserError for a variant that the recipe does not make: told before any work."""
    made = list(made)
    for name in asked:
        if name != ALL and name not in made:
            raise UserError(f"--variants {name}: the recipe makes {', '.join(made)}; give some of them or all, or add it to artifacts")


def choose(report: Report, asked: tuple[str, ...] | None) -> Choice:
    """The artifacts of a report that go into the bundle.

    Without ``asked`` it is one per format among those that passed: the one whose answer of ``ANSWER_TOKENS`` tokens, in its best
    runtime, times its download is smallest. That is the most answers per second and megabyte.
    """
    passed = [artifact for artifact in report.artifacts if artifact.passed]
    if asked:
        taken = {each.name: ASKED for each in passed if each.name in asked or ALL in asked}
        rest = {each.name: "not " + ASKED for each in passed if each.name not in taken}
        return Choice(taken, rest, tuple(best_of([each for each in passed if each.name in taken])))
    best = best_of(passed)
    taken, left_out = {}, {}
    for artifact in passed:
        others = [cost_of(each) for each in passed if format_of(each) == format_of(artifact) and each is not artifact]
        if artifact.name in best:
            taken[artifact.name] = why(cost_of(artifact), others)
        else:
            left_out[artifact.name] = why_not(cost_of(artifact), next(cost for cost in others if cost.name in best))
    return Choice(taken, left_out, tuple(best))


def best_of(artifacts: list[Artifact]) -> list[str]:
    """The artifact of each format whose answer and download are smallest together."""
    names = []
    for form in dict.fromkeys(format_of(each) for each in artifacts):
        costs = [cost_of(each) for each in artifacts if format_of(each) == form]
        usual = [cost for cost in costs if cost.name not in OTHER_TENSORS] or costs
        names.append(min(usual, key=lambda cost: cost.product).name)
    return names


def why(best: Cost, others: list[Cost]) -> str:
    """The reason for the default's choice, with the numbers."""
    if not others:
        return f"the only one of its format that was made ({best.told()})"
    rest = "; ".join(f"{cost.name} {cost.told()}" for cost in others)
    return f"an answer of {ANSWER_TOKENS} tokens and the download are smallest together: {best.told()} ({rest})"


def why_not(cost: Cost, best: Cost) -> str:
    """The reason for leaving an artifact out."""
    if cost.name in OTHER_TENSORS and best.name not in OTHER_TENSORS:
        return "its inputs, outputs and cache are int8, for NPUs; a host of its own is needed"
    return f"{cost.told()}: {best.name} ({best.told()}) answers more for its megabytes"


def cost_of(artifact: Artifact) -> Cost:
    """Of the runtime that answers soonest on the first device that timed the artifact."""
    timed = [device for device in artifact.devices if device.first_token_ms and device.decode_tokens_per_s]
    first = [device for device in timed if device.device == timed[0].device]
    soonest = min((answer_ms(device.first_token_ms, device.decode_tokens_per_s) for device in first), default=float("inf"))
    return Cost(artifact.name, soonest, artifact.bytes_compressed)


def format_of(artifact: Artifact) -> str:
    """onnx or tflite: what an artifact's name begins with."""
    return artifact.name.split("_")[0]
