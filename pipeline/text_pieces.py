"""Token ids in, pieces of text out as they become certain: never half a character, nothing past a stop text."""

from tokenizers import Tokenizer

UNFINISHED = "\ufffd"  # what a decoder writes for the bytes of a character that is not whole yet


class TextStream:
    """Ids in, text out, never half a character: text is held back while it ends in the mark of unfinished bytes."""

    def __init__(self, tokenizer: Tokenizer, prompt: list[int]):
        self.tokenizer = tokenizer
        self.ids = prompt[-1:]  # some tokenizers drop a leading space at the start of a text: one token before keeps it
        self.shown = self.decoded()

    def decoded(self) -> str:
        return self.tokenizer.decode(self.ids, skip_special_tokens=False)

    def push(self, token: int) -> str:
        """The text that became whole with ``token``."""
        self.ids.append(token)
        text = self.decoded()
        if text.endswith(UNFINISHED):
            return ""
        piece = text[len(self.shown) :]
        self.ids, self.shown = self.ids[-1:], self.tokenizer.decode(self.ids[-1:], skip_special_tokens=False)
        return piece

    def finish(self) -> str:
        """What was held back, unfinished bytes as U+FFFD."""
        return self.decoded()[len(self.shown) :]


class StopAt:
    """Lets text through up to the first of ``stops`` that is complete, and holds back an end that may be the beginning of one.

    ``found`` is the stop text that was met. An empty stop stops nothing.
    """

    def __init__(self, stops: tuple[str, ...]):
        self.found: str | None = None
        self._stops = tuple(stop for stop in stops if stop)
        self._held = ""

    def push(self, piece: str) -> str:
        """What of the text so far is certain to come before any stop text, and was not given before."""
        if self.found is not None:
            return ""
        text, self._held = self._held + piece, ""
        met = [(text.index(stop), stop) for stop in self._stops if stop in text]
        if met:
            place, self.found = min(met)
            return text[:place]
        held = max((common_end(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """What was held back and has become no stop text."""
        rest, self._held = self._held, ""
        return rest


def common_end(text: str, stop: str) -> int:
    """How many characters at the end of ``text`` are the beginning of ``stop``, but not all of it."""
    longest = min(len(text), len(stop) - 1)
    return next((count for count in range(longest, 0, -1) if text.endswith(stop[:count])), 0)
