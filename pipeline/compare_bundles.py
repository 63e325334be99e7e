"""Two bundles as wholes: their sizes, quality and cost side by side, and what differs in how they were made."""

from collections.abc import Iterator

from pipeline.report_numbers import FORMATS, MISSING

BUNDLE_COLUMNS = ("row", "number", "A", "B", "B / A")
SETTING_COLUMNS = ("row", "A", "B")
# (what a person reads, key, form of pipeline.report_numbers) of the model, of each artifact, of each stage
MODEL = (
    ("dense model", "parameters", "model.parameters", "millions"),
    ("dense model", "fp32 size", "model.bytes_fp32", "megabytes"),
    ("dense model", "perplexity", "reference.perplexity", "perplexity"),
    ("pruned model", "parameters", "pruned.parameters", "millions"),
    ("pruned model", "perplexity", "pruned.perplexity", "perplexity"),
)
ARTIFACT = (
    ("size on disk", "bytes", "megabytes"),
    ("download", "bytes_compressed", "megabytes"),
    ("perplexity", "quality.perplexity", "perplexity"),
    ("perplexity change", "quality.perplexity_change", "change"),
    ("top-1", "quality.top1", "agreement"),
    ("KL", "quality.kl", "scientific"),
)
STAGE = (("time", "seconds", "duration"), ("peak memory", "peak_rss_mb", "mb"), ("disk", "disk_mb", "disk_mb"))
NO_RATIO = ("change", "agreement", "scientific")  # a quotient of such numbers says nothing


def whole(first: dict, second: dict) -> list[dict]:
    """One entry per number: ``row``, ``number``, ``form``, ``a``, ``b``, ``ratio``; null where one of the two has no such number."""
    found = [entry(row, number, form, (at(first, path), at(second, path))) for row, number, path, form in MODEL]
    for name, pair in by_name(first["artifacts"], second["artifacts"], "name"):
        found += [entry(name, number, form, tuple(at(one, path) for one in pair)) for number, path, form in ARTIFACT]
    for name, pair in by_name(first["stages"], second["stages"], "stage"):
        found += [entry(f"stage {name}", number, form, tuple(at(one, path) for one in pair)) for number, path, form in STAGE]
    return found


def by_name(first: list[dict], second: list[dict], key: str) -> Iterator[tuple[str, tuple[dict | None, dict | None]]]:
    """What is called the same in both lists, then what only the second has; None where there is nothing of that name."""
    mine, theirs = ({item[key]: item for item in items} for items in (first, second))
    for name in dict.fromkeys([*mine, *theirs]):
        yield name, (mine.get(name), theirs.get(name))


def at(record: dict | None, path: str) -> float | None:
    """The number at ``path``, None where something on the way is missing."""
    for step in path.split("."):
        if record is None:
            return None
        record = record.get(step)
    return record


def entry(row: str, number: str, form: str, values: tuple[float | None, float | None]) -> dict:
    a, b = values
    ratio = b / a if a and b is not None and form not in NO_RATIO else None
    return {"row": row, "number": number, "form": form, "a": a, "b": b, "ratio": ratio}


def settings_that_differ(first: dict, second: dict) -> list[dict]:
    """``key``, ``a`` and ``b`` of every setting of the recipes, and every version, that is not the same in both; null: not there."""
    pairs = ((flat(first["recipe"]), flat(second["recipe"]), ""), (first["versions"], second["versions"], "version of "))
    return [
        {"key": f"{before}{key}", "a": mine.get(key), "b": theirs.get(key)}
        for mine, theirs, before in pairs
        for key in dict.fromkeys([*mine, *theirs])
        if mine.get(key) != theirs.get(key)
    ]


def flat(table: dict, above: str = "") -> dict:
    """Nested tables as one, keys joined by dots."""
    found = {}
    for key, value in table.items():
        found |= flat(value, f"{above}{key}.") if isinstance(value, dict) else {f"{above}{key}": value}
    return found


def notes(first: dict, second: dict) -> list[str]:
    """What must not be compared, one line each."""
    found = []
    if first["model"]["sha256"] != second["model"]["sha256"]:
        found.append("the dense models are different ones: perplexity tells which bundle writes better, its change tells less")
    if first["text"]["evaluation"].get("sha256") != second["text"]["evaluation"].get("sha256"):
        found.append("they were judged on different text: their perplexities do not compare")
    elif first["text"]["evaluation"]["kind"] != "file" or first["reference"]["tokens"] != second["reference"]["tokens"]:
        found.append("they may have been judged on different windows: their perplexities may not compare")
    return found


def bundle_rows(entries: list[dict]) -> list[tuple[str, ...]]:
    """The numbers as text."""
    return [
        (each["row"], each["number"], *(told(each[key], each["form"]) for key in "ab"), told(each["ratio"], "times")) for each in entries
    ]


def told(value: float | None, form: str) -> str:
    return MISSING if value is None else FORMATS[form](value)


def setting_rows(entries: list[dict]) -> list[tuple[str, ...]]:
    """The settings as text."""
    return [(each["key"], *(MISSING if each[key] is None else str(each[key]) for key in "ab")) for each in entries]
