"""The answer of ``pocketlm fit`` as tables for the terminal."""

from pipeline.fit import Fit, Question, devices

SIZE_COLUMNS = ("artifact", "bytes", "download", "bits/parameter", "read per token", "measured", "error")
KV_COLUMNS = ("context", "fp32", "fp16", "int8")
UNITS = ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB"))


def told_bytes(count: float) -> str:
    """Three or four digits in powers of ten."""
    size, unit = next(((size, unit) for size, unit in UNITS if count >= size), (1, "B"))
    return f"{told_number(count / size)} {unit}"


def told_number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"


def parameter_line(found: Fit) -> str:
    """The parameters and their split in one line."""
    counted = found.parameters
    parts = [f"{name} {value / counted.total:.2%}" for name, value in vars(counted).items() if value]
    return f"{found.name}: {counted.total:,} parameters ({', '.join(parts)}{'; head tied to the embedding' if found.shape.tied else ''})"


def size_rows(found: Fit) -> list[tuple[str, ...]]:
    """One row per format; a sparse one differs in its download alone."""
    compared = {item.artifact: item for item in found.compared}
    rows = []
    for size in found.sizes:
        item = compared.get(size.name)
        numbers = (
            told_bytes(size.disk),
            told_bytes(size.download),
            f"{size.bits_per_weight(found.shape):.2f}",
            told_bytes(size.read_per_token),
        )
        rows.append((size.name, *numbers, f"{item.measured:,}" if item else "-", f"{item.error:+.2%}" if item else "-"))
    return rows


def size_caption(found: Fit) -> str:
    """Which formats this project does not make at this size, and why."""
    reasons: dict[str, list[str]] = {}
    for size in found.sizes:
        if size.note and not size.sparsity:
            reasons.setdefault(size.note, []).append(size.name)
    return "\n".join(f"{reason}: {', '.join(names)}" for reason, names in reasons.items())


def kv_rows(found: Fit) -> list[tuple[str, ...]]:
    return [(str(tokens), *(told_bytes(kinds[kind]) for kind in KV_COLUMNS[1:])) for tokens, kinds in found.kv_cache.items()]


def device_columns() -> tuple[str, ...]:
    return ("artifact", *(device.name for device in devices()))


def device_rows(found: Fit) -> list[tuple[str, ...]]:
    """What the devices have, then tokens per second at most per format; a dash where a device cannot hold it."""
    answers = {(item.device, item.format): item for item in found.devices}
    rows = [
        ("memory, GiB", *(f"{device.memory_gib:g}" for device in devices())),
        ("GB/s", *(f"{device.bandwidth_gb_s:g} {device.kind}" for device in devices())),
    ]
    for size in found.sizes:
        if not size.sparsity:  # zeros change nothing in memory
            items = [answers[device.name, size.name] for device in devices()]
            rows.append((size.name, *(told_number(item.tokens_per_s) if item.fits else "-" for item in items)))
    return rows


def device_caption(found: Fit, question: Question) -> str:
    """What the numbers of the device table are."""
    held = f"weights and a cache of {max(found.kv_cache)} tokens in {question.memory_share:.0%} of the memory"
    return f"tokens/s at most: bandwidth over bytes read per token; -: does not hold {held}"
