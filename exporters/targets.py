"""What mixed precision aims at, the same for ONNX and TFLite."""

from dataclasses import dataclass
from typing import Protocol


class Measured(Protocol):
    """Against fp32: share of equal first choices, and change of perplexity as a fraction."""

    top1: float
    perplexity_change: float


class Settings(Protocol):
    """The settings of a stage that knows mixed precision."""

    mixed_precision: bool
    least_top1: float | None
    largest_perplexity_change: float | None


@dataclass(frozen=True)
class Targets:
    """What must hold against fp32; None is not asked for."""

    top1: float | None
    perplexity_change: float | None

    def missed(self, found: Measured) -> list[str]:
        """One phrase for each target that ``found`` misses."""
        phrases = []
        if self.top1 is not None and not found.top1 >= self.top1:
            phrases.append(f"top-1 {found.top1:.4f} is below {self.top1:.4f}")
        if self.perplexity_change is not None and not found.perplexity_change <= self.perplexity_change:
            phrases.append(f"perplexity change {found.perplexity_change:+.3%} exceeds {self.perplexity_change:+.3%}")
        return phrases

    @classmethod
    def of(cls, settings: Settings) -> "Targets":
        """What a stage's settings aim at; nothing where mixed precision is off."""
        if not settings.mixed_precision:
            return cls(None, None)
        return cls(settings.least_top1, settings.largest_perplexity_change)
