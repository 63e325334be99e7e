"""What `pocketlm quality` prints: a row per artifact and runtime, their course over the window, and the worst windows as text."""

from pipeline.table import shown

QUALITY_COLUMNS = (
    "artifact", "runtime", "perplexity", "change", "KL", "KL 99.9 %", "KL max", "top-1", "top-5", "mean Δp", "RMS Δp", "verdict",
)  # fmt: skip
POSITION_COLUMNS = ("artifact", "runtime", "tokens", "perplexity", "change", "KL", "KL 99.9 %", "top-1", "top-5", "mean Δp", "RMS Δp")
CHARACTERS_BEFORE, CHARACTERS_AFTER = 240, 120  # of a worst window, around its worst token


def quality_rows(found: dict) -> list[tuple[str, ...]]:
    """One row per result; dashes where it did not run to its end."""
    lines = []
    for result in found["results"]:
        numbers = result["quality"] or {}
        first, *rest = shared(numbers)
        kl_max = shown(numbers.get("kl_max"), ".3g")
        verdict = "FAILED" if result["failures"] else "scored"
        lines.append((result["artifact"], result["runtime"], first, *rest[:3], kl_max, *rest[3:], verdict))
    return lines


def position_rows(found: dict) -> list[tuple[str, ...]]:
    """One row per result and bucket of tokens."""
    return [
        (result["artifact"], result["runtime"], f"{bucket['first_token']}-{bucket['last_token']}", *shared(bucket))
        for result in found["results"]
        for bucket in (result["quality"] or {"positions": []})["positions"]
    ]


def shared(numbers: dict) -> tuple[str, ...]:
    """Perplexity, its change, mean KL, 99.9 % KL, top-1, top-5, mean and RMS change of the right token's probability."""
    return (
        with_error(numbers, "perplexity", ".3f"),
        with_error(numbers, "perplexity_change", "+.3%", ".3%"),
        shown(numbers.get("kl"), ".3g"),
        shown(numbers.get("kl_tail"), ".3g"),
        shown(numbers.get("top1"), ".2%"),
        shown(numbers.get("top5"), ".2%"),
        with_error(numbers, "delta_p", "+.3%", ".3%"),
        shown(numbers.get("delta_p_rms"), ".2%"),
    )


def with_error(numbers: dict, name: str, form: str, error_form: str | None = None) -> str:
    """``value ± standard error``; the value alone where there is no error."""
    value, error = numbers.get(name), numbers.get(f"{name}_stderr")
    return shown(value, form) if error is None else f"{shown(value, form)} ± {format(error, error_form or form)}"


def caption(found: dict) -> str:
    """What the numbers are held against, and how exact that is."""
    reference = found["reference"]
    top_k = reference["top_k"]
    lost = " and ".join(
        f"{share:.1%} of the KL to {told}"
        for name, told in (("noise", "the same model with noise like int8's"), ("dense", "the dense model"))
        if (share := top_k["share_lost"].get(name)) is not None
    )
    return (
        f"Against the exported fp32 model in PyTorch: perplexity {reference['perplexity']:.3f} (the dense model's is "
        f"{reference['dense_perplexity']:.3f}), {reference['tokens']} tokens in {reference['windows']} windows of "
        f"{reference['window_tokens']}, the first {reference['prompt_tokens']} of each given; ± is one standard error, of a change the "
        f"paired one. KL in nats per token over the reference's {top_k['k']} likeliest tokens and one sum for the rest "
        f"({top_k['rest_probability']:.1%} of the probability): that shortcut misses {lost}."
    )


def worst_text(result: dict) -> list[str]:
    """The worst windows of a result, each a line of numbers and a line of text with the worst token marked."""
    lines = []
    for worst in (result["quality"] or {"worst_windows": []})["worst_windows"]:
        own = worst["statistics"]
        lines.append(
            f"window {worst['window']}: KL {own['kl']:.3g}, perplexity {shown(own['perplexity_change'], '+.2%')}, top-1 {own['top1']:.1%}; "
            f"worst token {worst['worst_token']}: KL {worst['worst_kl']:.3g}, right token {worst['reference_probability']:.3f} -> "
            f"{worst['probability']:.3f}"
        )
        if worst["token"] is None:
            lines.append(f"token ids {worst['ids']} (no tokenizer found; give --tokenizer for the text)")
            continue
        before, after = worst["before"][-CHARACTERS_BEFORE:], worst["after"][:CHARACTERS_AFTER]
        lines.append(printable(f"…{before}»{worst['token']}«{after}…"))
    return lines


def printable(text: str) -> str:
    """The text without what would steer a terminal; line ends and tabs as escapes, so that a window is one line."""
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in text)
