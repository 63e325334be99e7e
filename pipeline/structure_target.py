"""One share of the parameters to remove, split among layers, hidden size, FFN width and KV heads by what each is measured to cost.

Each kind is cut alone in a few steps and its KL divergence from the dense model measured on calibration windows. Every combination
of sizes that reaches the target is then priced as the sum over the kinds, the root of the KL running straight between the measured
steps, because KL grows with the square of a small disturbance. Sums know nothing of how kinds work together, so the cheapest
combinations, which differ in more than widths, are made and measured too.
"""

import copy
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, replace
from itertools import product

import numpy as np
import torch
from torch.nn import functional
from transformers import PreTrainedModel

from models.errors import UserError
from models.progress import track
from pipeline.importance import shrink
from pipeline.settings import PruneSettings
from pipeline.structure_sizes import WIDTH_MULTIPLE, ParameterCount, Sizes, hidden_choices, scales_by_layer, sizes_of

MEASURED_TOKENS = 1024  # on which costs are measured; few, because differences from the same dense logits show on few
STEP_SHARES = (0.03125, 0.125, 0.25, 0.5, 0.75, 1.0)  # of each kind removed, to the nearest size there is; 1: the smallest size
HIDDEN_CHOICES = 32  # hidden sizes priced beside each number of layers and KV heads; the FFN's width is solved for
TRIED = 6  # combinations that are made and measured before one is chosen


@dataclass(frozen=True)
class Cost:
    """What one kind cut alone to ``kept`` costs: ``kl`` in nats per token from the dense model."""

    kind: str
    kept: int
    parameters_removed: int
    kl: float


@dataclass(frozen=True)
class Combination:
    """Sizes with their predicted and, where made, measured KL in nats per token."""

    sizes: Sizes
    parameters: int
    predicted_kl: float
    kl: float | None = None


@dataclass(frozen=True)
class Target:
    """What was chosen to reach the share ``asked``, and all that was measured on the way."""

    asked: float
    sizes: Sizes
    costs: list[Cost]
    tried: list[Combination]
    measured_tokens: int
    left_out: dict[str, str] = field(default_factory=dict)  # kind -> why it stays whole

    def record(self) -> dict:
        """What prune.json says about it."""
        costs = [asdict(cost) | {"kl_per_million_parameters": 1e6 * cost.kl / cost.parameters_removed} for cost in self.costs]
        return asdict(self) | {"costs": costs}


def check_ways(settings: PruneSettings) -> None:
    """UserError where both a target and shares of single kinds are given."""
    given = [name for name in ("ffn", "kv_groups", "layers", "hidden") if getattr(settings, name)]
    if settings.target and given:
        value = getattr(settings, given[0])
        raise UserError(f"prune.target splits the removal itself, but prune.{given[0]} is {value}; set one of them to 0")


def reach_target(model: PreTrainedModel, windows: torch.Tensor, share: float) -> Target:
    """The sizes that remove ``share`` of the parameters or more at the least measured cost. ``model`` is not changed.

    ``windows`` int64 ``[count, seq]``; the first ``MEASURED_TOKENS`` tokens of them are measured on. UserError where no sizes reach it.
    """
    count, choices, left_out = ParameterCount.of(model), choices_of(model), kinds_left_out(model)
    dense = sizes_of(model)
    budget = int((1 - share) * count(dense))
    if next(combinations(model, choices, budget), None) is None:
        least = replace(dense, **{kind: sizes[-1] for kind, sizes in choices.items() if sizes})
        most = 1 - count(least) / count(dense)
        raise UserError(f"prune.target {share} is out of reach: the smallest sizes remove {most:.4f}; set it lower")
    judge = Judge(model, windows[: max(1, MEASURED_TOKENS // windows.shape[1])])
    costs = measure_costs(judge, choices)
    priced = [Combination(sizes, count(sizes), predicted_kl(sizes, dense, costs)) for sizes in combinations(model, choices, budget)]
    shortlist = track(cheapest_of_each(priced, dense), "trying combinations")
    tried = [replace(candidate, kl=judge.kl_of(candidate.sizes)) for candidate in shortlist]
    chosen = min(tried, key=lambda candidate: (candidate.kl, candidate.predicted_kl))
    return Target(share, chosen.sizes, costs, tried, judge.windows.numel(), left_out)


def choices_of(model: PreTrainedModel) -> dict[str, list[int]]:
    """Per kind the sizes below the dense one that the model can be cut to, falling; none where the family cannot say it."""
    dense = sizes_of(model)
    gpt2 = model.config.model_type == "gpt2"
    return {
        "layers": [] if scales_by_layer(model) else list(range(dense.layers - 1, 0, -1)),
        "hidden_size": [size for size in hidden_choices(model, dense.kv_heads) if size < dense.hidden_size],
        "ffn_size": list(range((dense.ffn_size - 1) // WIDTH_MULTIPLE * WIDTH_MULTIPLE, 0, -WIDTH_MULTIPLE)),
        "kv_heads": [] if gpt2 else list(range(dense.kv_heads - 1, 0, -1)),
    }


def kinds_left_out(model: PreTrainedModel) -> dict[str, str]:
    """The kinds that have no choices, and why."""
    reasons = {
        "layers": "attention is scaled by the layer's number" if scales_by_layer(model) else "there is one layer",
        "hidden_size": "a GPT-2 config cannot say it" if model.config.model_type == "gpt2" else "it is too small",
        "ffn_size": "it is too small",
        "kv_heads": "a GPT-2 config cannot say it" if model.config.model_type == "gpt2" else "there is one",
    }
    return {kind: reasons[kind] for kind, sizes in choices_of(model).items() if not sizes}


class Judge:
    """Measures how far cut copies of a model are from it, on few windows; holds the dense model's last hidden states of those."""

    def __init__(self, model: PreTrainedModel, windows: torch.Tensor):
        self.model, self.windows = model, windows
        self.states = _states(model, windows)

    def kl_of(self, sizes: Sizes) -> float:
        """KL divergence in nats per token of a copy cut down to ``sizes``."""
        smaller = copy.deepcopy(self.model)
        shrink(smaller, self.windows, sizes)
        return self.kl(smaller)

    @torch.no_grad()
    def kl(self, smaller: PreTrainedModel) -> float:
        """KL divergence in nats per token; the logits of one window at a time."""
        heads = self.model.get_output_embeddings(), smaller.get_output_embeddings()
        total = 0.0
        for states in zip(self.states, _states(smaller, self.windows), strict=True):  # [seq, hidden] each
            wanted, given = (head(state).log_softmax(-1) for head, state in zip(heads, states, strict=True))
            total += float(functional.kl_div(given, wanted, reduction="sum", log_target=True))
        return total / self.windows.numel()


@torch.no_grad()
def _states(model: PreTrainedModel, windows: torch.Tensor) -> torch.Tensor:
    """What the head reads, ``[count, seq, hidden]``."""
    return torch.cat([model.base_model(batch, use_cache=False).last_hidden_state for batch in windows.split(4)])


def measure_costs(judge: Judge, choices: dict[str, list[int]]) -> list[Cost]:
    """Each kind cut alone, at the steps of ``STEP_SHARES``."""
    dense, count = sizes_of(judge.model), ParameterCount.of(judge.model)
    steps = [(kind, kept) for kind, sizes in choices.items() for kept in steps_among(sizes, getattr(dense, kind))]
    costs = []
    for kind, kept in track(steps, "measuring sensitivity"):
        sizes = replace(dense, **{kind: kept})
        costs.append(Cost(kind, kept, count(dense) - count(sizes), judge.kl_of(sizes)))
    return costs


def steps_among(sizes: list[int], dense: int) -> list[int]:
    """The members of ``sizes`` nearest to the steps, falling, each once; all where they are few."""
    if len(sizes) <= len(STEP_SHARES):
        return sizes
    return sorted({min(sizes, key=lambda size: abs(size - (1 - share) * dense)) for share in STEP_SHARES}, reverse=True)


def combinations(model: PreTrainedModel, choices: dict[str, list[int]], budget: int) -> Iterator[Sizes]:
    """The sizes within ``budget`` parameters: few layers, heads and channels in all combinations, each with the widest FFN that fits."""
    dense, count = sizes_of(model), ParameterCount.of(model)
    for layers, kv_heads in product([dense.layers, *choices["layers"]], [dense.kv_heads, *choices["kv_heads"]]):
        for hidden_size in thinned(hidden_choices(model, kv_heads)):
            sizes = Sizes(layers, dense.ffn_size, kv_heads, hidden_size)
            ffn_size = count.widest_ffn(sizes, budget)
            if ffn_size > 0:
                yield replace(sizes, ffn_size=ffn_size)


def thinned(sizes: list[int]) -> list[int]:
    """At most ``HIDDEN_CHOICES`` of ``sizes``, evenly spread, the first and the last among them."""
    places = np.linspace(0, len(sizes) - 1, min(len(sizes), HIDDEN_CHOICES)).round().astype(int)
    return [sizes[place] for place in places]


def predicted_kl(sizes: Sizes, dense: Sizes, costs: list[Cost]) -> float:
    """The sum over the kinds of what was measured for each alone; never falling with what is removed, its root linear in between."""
    total = 0.0
    for kind in asdict(dense):
        measured = sorted(((cost.kept, cost.kl) for cost in costs if cost.kind == kind), reverse=True)
        removed = [0.0] + [1 - kept / getattr(dense, kind) for kept, _ in measured]
        roots = np.maximum.accumulate([0.0] + [max(kl, 0.0) ** 0.5 for _, kl in measured])  # rounding takes a KL of 0 below it
        total += float(np.interp(1 - getattr(sizes, kind) / getattr(dense, kind), removed, roots)) ** 2
    return total


def cheapest_of_each(priced: list[Combination], dense: Sizes) -> list[Combination]:
    """The cheapest combinations that differ in the number of layers or in which kinds are cut; of equal ones those that keep more."""
    best: dict[tuple[int, bool, bool], Combination] = {}
    for candidate in sorted(priced, key=_price):
        sizes = candidate.sizes
        best.setdefault((sizes.layers, sizes.hidden_size < dense.hidden_size, sizes.kv_heads < dense.kv_heads), candidate)
    return sorted(best.values(), key=_price)[:TRIED]


def _price(candidate: Combination) -> tuple[float, int]:
    return candidate.predicted_kl, -candidate.parameters
