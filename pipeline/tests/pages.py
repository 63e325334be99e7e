"""What is asked of every page: that it is rendered without a fault, fits the screen, can be read, and tells the record's numbers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from playwright.sync_api import Browser, Page

from pipeline.report_numbers import FORMATS, MISSING, TOTALS, value_at, values_at

PHONE, DESKTOP = {"width": 390, "height": 844}, {"width": 1280, "height": 800}
SCREENS = [(size, scheme) for size in (PHONE, DESKTOP) for scheme in ("light", "dark")]
SCREEN_NAMES = [f"{'phone' if size is PHONE else 'desktop'}-{scheme}" for size, scheme in SCREENS]
LEAST_CONTRAST = 4.5  # WCAG 2.1, 1.4.3, for text of this size

# Boxes that stick out of the window, except for what scrolls in a box of its own.
STICKING_OUT = """() => [...document.body.querySelectorAll("*")].filter(element => {
  const scrolls = element.closest(".wide, pre, .text");
  return !(scrolls && scrolls !== element) && element.getClientRects().length && element.getBoundingClientRect().right > innerWidth + 0.5;
}).map(element => element.outerHTML.slice(0, 120))"""
# Texts of a drawing that stick out of it, or lie on another one.
TANGLED = """() => [...document.querySelectorAll("svg")].flatMap(svg => {
  const frame = svg.getBoundingClientRect();
  const texts = [...svg.querySelectorAll("text")].map(text => [text.textContent, text.getBoundingClientRect()]);
  const out = texts.filter(([, box]) => box.left < frame.left - 1 || box.right > frame.right + 1 || box.top < frame.top - 3);
  const over = texts.filter(([, a], i) => texts.slice(i + 1).some(([, b]) =>
    Math.min(a.right, b.right) - Math.max(a.left, b.left) > 1 && Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top) > 4));
  return [...out, ...over].map(([text]) => text);
})"""
# Tables that are made to fit a phone and still have to be pushed to be seen whole.
PUSHED = """() => [...document.querySelectorAll(".wide")]
  .filter(box => box.querySelector(".stack, .tight") && box.scrollWidth > box.clientWidth)
  .map(box => `${box.innerText.slice(0, 60)}: ${box.scrollWidth} in ${box.clientWidth}`)"""
# Texts with the colour that they have and the colour that they stand on.
TEXTS = """() => [...document.body.querySelectorAll("*")].filter(element => element.getClientRects().length && !element.closest("svg")
  && [...element.childNodes].some(node => node.nodeType === 3 && node.textContent.trim())).map(element => {
    let behind = element;
    while (behind.parentElement && getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
    const disabled = element.disabled === true;
    return [element.textContent.trim().slice(0, 60), getComputedStyle(element).color, getComputedStyle(behind).backgroundColor, disabled];
})"""


@contextmanager
def opened(browser: Browser, address: str, screen: dict, scheme: str) -> Iterator[tuple[Page, list[str]]]:
    """A page on a screen, and the list of what goes wrong there: errors in the console, and requests that leave ``address``."""
    context = browser.new_context(viewport=screen, color_scheme=scheme)
    page, faults = context.new_page(), []
    page.on("console", lambda message: faults.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: faults.append(str(error)))
    page.on("request", lambda request: None if request.url.startswith((address, "data:")) else faults.append(f"asked for {request.url}"))
    page.goto(address)
    try:
        yield page, faults
    finally:
        context.close()


def written(folder: Path, text: str) -> str:
    """The address of a page in a file."""
    file = folder / "page.html"
    file.write_text(text, encoding="utf-8")
    return file.as_uri()


def open_details(page: Page) -> None:
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")


def faults_of_layout(page: Page) -> list[str]:
    """What sticks out to the right, lies on something else, or cannot be read, with everything folded out or not."""
    width = page.evaluate("document.documentElement.scrollWidth")
    found = [] if width <= page.viewport_size["width"] else [f"the page is {width} pixels wide"]
    found += [f"sticks out: {each}" for each in page.evaluate(STICKING_OUT)]
    found += [f"tangled in a drawing: {each}" for each in page.evaluate(TANGLED)]
    if page.viewport_size["width"] == PHONE["width"]:
        found += [f"does not fit: {each}" for each in page.evaluate(PUSHED)]
    for text, ink, ground, disabled in page.evaluate(TEXTS):
        if not disabled and contrast(ink, ground) < LEAST_CONTRAST:
            found.append(f"contrast {contrast(ink, ground):.1f} of {text!r}")
    return found


def contrast(one: str, other: str) -> float:
    """Of two colours as a browser tells them (WCAG 2.1, contrast ratio)."""
    light, dark = sorted((luminance(one), luminance(other)), reverse=True)
    return (light + 0.05) / (dark + 0.05)


def luminance(colour: str) -> float:
    """Relative luminance of ``rgb(r, g, b)`` (WCAG 2.1)."""
    channels = [int(part) / 255 for part in colour.removeprefix("rgb(").removesuffix(")").split(", ")]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in channels]
    return sum(weight * part for weight, part in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def numbers_on(page: Page) -> list[tuple[dict, str]]:
    """Every number that stands on the page: what it says of itself, and what a person reads."""
    read = """elements => elements.map(element => [{...element.dataset, value: element.dataset.value ?? element.getAttribute("value")},
      element.textContent])"""
    return [(marks, text) for marks, text in page.eval_on_selector_all("[data-path]", read)]


def faults_of_numbers(page: Page, record: dict) -> list[str]:
    """Numbers whose raw value is not the record's, or whose text is not that value as it should be written."""
    found = []
    for marks, text in numbers_on(page):
        expected = worked_out(record, marks)
        should_read = MISSING if expected is None else FORMATS[marks["form"]](expected)
        if json.loads(marks["value"]) != expected or text != should_read:
            found.append(f"{marks}: reads {text}, the record says {expected}")
    return found


def worked_out(record: dict, marks: dict) -> float | None:
    """The value of a number by what it says of itself, from the record alone."""
    if "total" in marks:
        inside = marks["path"].startswith(("a.", "b.")) and marks["path"][0] in record
        values = values_at(record[marks["path"][0]], marks["path"][2:]) if inside else values_at(record, marks["path"])
        return None if not values or None in values else TOTALS[marks["total"]](values)
    value = value_at(record, marks["path"])
    if "over" not in marks:
        return value
    divisor = value_at(record, marks["over"])
    return value / divisor if value is not None and divisor else None
