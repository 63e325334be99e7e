"""Which numbers of a report stand on top: the best artifact, by the rule that picks a bundle's files, and what it is held against."""

from dataclasses import dataclass

from pipeline.report_numbers import devices_of

ANSWER_TOKENS = 64  # the length of answer by which artifacts are compared


@dataclass(frozen=True)
class Line:
    """One runtime on one device: the paths of the best artifact there, and of the fp32 one in the same place where there is one."""

    artifact: str
    device: str
    fp32_artifact: str | None
    fp32_device: str | None


def answer_ms(first_token_ms: float | None, decode_tokens_per_s: float | None) -> float:
    """Milliseconds of an answer of ``ANSWER_TOKENS``; infinite where it was not timed."""
    if not first_token_ms or not decode_tokens_per_s:
        return float("inf")
    return first_token_ms + 1000 * ANSWER_TOKENS / decode_tokens_per_s


def lines(report: dict) -> list[Line]:
    """For every runtime on every device that was timed, the best artifact; fp32 ones only where there is no other.

    Devices in the report's order, the best first.
    """
    places: dict[tuple, list[tuple[str, dict, str, dict]]] = {}
    for found in devices_of(report):
        device = found[3]
        if device["decode_tokens_per_s"] is not None:
            places.setdefault((device["device"], device["runtime"], device["threads"]), []).append(found)
    devices = list(dict.fromkeys(place[0] for place in places))
    chosen = [(devices.index(place[0]), *best_of(entries)) for place, entries in places.items()]
    return [line for _, _, line in sorted(chosen, key=lambda entry: entry[:2])]


def best_of(entries: list[tuple[str, dict, str, dict]]) -> tuple[float, Line]:
    """The entry of one place whose answer and download are smallest together, with their product (ms times bytes)."""
    fp32 = next((entry for entry in entries if is_fp32(entry[1])), None)
    small = [entry for entry in entries if not is_fp32(entry[1])] or entries
    passed = [entry for entry in small if entry[3]["passed"]] or small
    best = min(passed, key=cost)
    return cost(best), Line(best[0], best[2], *((fp32[0], fp32[2]) if fp32 and fp32 is not best else (None, None)))


def cost(entry: tuple[str, dict, str, dict]) -> float:
    return answer_ms(entry[3]["first_token_ms"], entry[3]["decode_tokens_per_s"]) * entry[1].get("bytes_compressed", 1)


def is_fp32(artifact: dict) -> bool:
    return artifact["name"].endswith("_fp32")
