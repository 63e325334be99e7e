"""Static int8 TFLite whose dearest layers are dynamic: their weights stay int8, their inputs are quantised in each call.

Made only where the static file misses its targets. Then every layer that is static is measured alone, all others in float,
in LiteRT; and as few as it takes become dynamic, dearest first.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from exporters.tflite_coverage import is_dynamic
from exporters.tflite_parity import Feeds, TextAgreement, check_agreement_in, replay
from exporters.tflite_replay import RUNTIMES
from exporters.tflite_structure import Operator
from models.progress import track

FED_SEQUENCES, FED_STEPS = 8, 96  # what targets are judged on: prompts of validation text, and tokens after each
MEASURED_SEQUENCES = 2  # of them, what a single layer is measured on


@dataclass(frozen=True)
class LayerCost:
    """What is lost when this layer alone is static int8: mean KL in nats per token, share of equal first choices."""

    name: str
    kl: float
    top1: float


@dataclass(frozen=True)
class Judge:
    """Validation text and the fp32 file's logits on it. ``expected`` ``[sequences, steps + 1, vocab]``."""

    feeds: Feeds
    expected: np.ndarray

    @classmethod
    def of(cls, parent: Path, windows: np.ndarray, context_tokens: int) -> "Judge":
        """``windows`` int ``[n, tokens]``, cut to the context; half of a short window is prompt."""
        tokens = windows[:FED_SEQUENCES, :context_tokens]
        steps = min(FED_STEPS, tokens.shape[1] // 2)
        feeds = Feeds(tokens, np.full(len(tokens), tokens.shape[1] - steps, np.int32))
        return cls(feeds, replay(parent, "litert", feeds).logits)

    def worst(self, path: Path) -> TextAgreement:
        """The runtime in which ``path`` agrees least; GateError for a dead one."""
        found = [check_agreement_in(path, runtime, self.feeds, self.expected) for runtime in RUNTIMES]
        return max(found, key=lambda agreement: agreement.kl)

    def alone(self, path: Path) -> TextAgreement:
        """A quicker look, in LiteRT."""
        feeds = Feeds(self.feeds.tokens[:MEASURED_SEQUENCES], self.feeds.prompt_tokens[:MEASURED_SEQUENCES])
        return check_agreement_in(path, "litert", feeds, self.expected[:MEASURED_SEQUENCES])


def layer_of(operator: Operator) -> str:
    """A linear layer's module, the same in prefill and decode and in both parts of a split layer.

    Tensors are called ``signature/number/module``, and ``/inner`` and the like behind it where equalising took them apart. The
    head's output is called after the signature's own.
    """
    return operator.outputs[0].name.split("/")[2].removeprefix(f"{operator.signature}_")


def static_layers(found: list[Operator], dynamic: tuple[str, ...]) -> tuple[str, ...]:
    """Linear layers that ``dynamic`` patterns leave static, in order."""
    linear = [operator for operator in found if operator.name == "FULLY_CONNECTED" and not is_dynamic(operator, dynamic)]
    return tuple(dict.fromkeys(layer_of(operator) for operator in linear))


def layer_costs(layers: tuple[str, ...], write_alone: Callable[[str], Path], judge: Judge) -> tuple[LayerCost, ...]:
    """Dearest first. ``write_alone`` makes the file in which one layer is static int8 and all others are float."""
    costs = []
    for name in track(layers, "tflite int8: measuring layers"):
        found = judge.alone(write_alone(name))
        costs.append(LayerCost(name, found.kl, found.top1))
    return tuple(sorted(costs, key=lambda cost: (-cost.kl, cost.name)))


def more_dynamic(dynamic: tuple[str, ...], costs: tuple[LayerCost, ...]) -> Iterator[tuple[str, ...]]:
    """``dynamic`` and ever more of the dearest layers: one, two, four, all."""
    count = 1
    while count < 2 * len(costs):
        yield (*dynamic, *(cost.name for cost in costs[:count]))
        count *= 2
