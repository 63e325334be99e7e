"""Greedy text of a large model with a small one ahead: exact, and fewer passes over the large model's weights.

The draft, a pruned sibling with the same tokenizer, goes some tokens ahead. The model then sees all of them in one call, keeps as many
as it would have chosen itself, and adds one of its own: the text is the model's greedy text whatever the draft says, the draft only
decides how fast it comes (Leviathan et al. 2023, arXiv:2211.17192, for temperature 0).
"""

from __future__ import annotations

import numpy as np

from device_tests.errors import DeviceTestError
from device_tests.sessions import Session


class Speculator:
    """Both sessions hold the same text. ``proposed`` and ``accepted`` count the draft's tokens."""

    def __init__(self, model: Session, draft: Session, ahead: int) -> None:
        """``ahead``: tokens that the draft goes ahead. DeviceTestError where the two cannot work together."""
        if model.interface.vocab_size != draft.interface.vocab_size:
            sizes = f"{draft.interface.vocab_size} tokens and the model {model.interface.vocab_size}"
            raise DeviceTestError(f"the draft knows {sizes}; give a pruned sibling of the same model as draft")
        for session, what in ((model, "the model"), (draft, "the draft")):
            if not hasattr(session, "score"):
                raise DeviceTestError(f"{what} gives logits of the last token alone, and a draft needs all of them; use --runtime onnx")
        self.proposed = self.accepted = 0
        self._model, self._draft, self._ahead = model, draft, ahead
        self._unseen: list[int] = []  # by the draft
        self._ready: list[int] = []

    def first(self, ids: np.ndarray) -> int:
        """The token after the prompt ``ids`` int ``[n]``. Both sessions may hold the beginning of the prompt already."""
        logits = self._model.prefill(ids[self._model.position :])
        self._draft.prefill(ids[self._draft.position :])
        return int(logits.argmax())

    def next(self, token: int) -> int:
        """The token after ``token``, which was the last one given."""
        if not self._ready:
            self._round(token)
        return self._ready.pop(0)

    def _round(self, token: int) -> None:
        """Let the draft go ahead, let the model judge, and take both back to what was kept."""
        position = self._model.position
        self._unseen.append(token)
        guesses = self._guess(min(self._ahead, *(s.interface.context_tokens - position - 1 for s in (self._model, self._draft))))
        choices = self._model.score(np.array([token, *guesses])).argmax(axis=1)  # [1 + guesses]
        kept = 0
        while kept < len(guesses) and guesses[kept] == choices[kept]:
            kept += 1
        self.proposed, self.accepted = self.proposed + len(guesses), self.accepted + kept
        self._ready = [int(choice) for choice in choices[: kept + 1]]
        self._model.rewind(position + 1 + kept)
        if guesses:
            seen = min(kept, len(guesses) - 1)  # the draft was not fed the last of its own
            self._draft.rewind(position + 1 + seen)
            self._unseen = guesses[seen:kept]

    def _guess(self, count: int) -> list[int]:
        guesses: list[int] = []
        if count > 0:
            guesses.append(int(self._draft.prefill(np.array(self._unseen)).argmax()))
        while 0 < len(guesses) < count:
            guesses.append(int(self._draft.step(guesses[-1]).argmax()))
        return guesses
