"""Where a model's rotary module and function are, what tables they amount to, and how they are taken over.

transformers decoders compute cos and sin once per forward in a ``...RotaryEmbedding`` module and hand them to
``apply_rotary_pos_emb`` in every attention. Taken over, the module answers with its whole table and the function hands q and k
on (the attention operator rotates them) or rotates them by an operator. Whether that is right is proved by the caller.
"""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Literal
from unittest.mock import patch

import torch
from torch import nn
from transformers import PreTrainedModel

from exporters.gqa_calls import Table
from models.errors import UserError

FUNCTION = "apply_rotary_pos_emb"
LENGTH_DEPENDENT = ("dynamic", "longrope")  # frequencies that change with the length: no table can hold them


@dataclass(frozen=True)
class Rotation:
    """``place``: inside the attention operator, in an operator of its own, in plain operators, or nowhere; ``fallback``: why not
    the place before. ``reversed_sign``: the model turns the other way round, so sin changes its sign."""

    place: Literal["attention", "operator", "plain", "none"]
    interleaved: bool = False
    reversed_sign: bool = False
    fallback: str | None = None


def rotary_modules(model: PreTrainedModel) -> dict[str, nn.Module]:
    """The modules that compute cos and sin, by name. UserError where their frequencies depend on the length."""
    found = {name: module for name, module in model.named_modules() if type(module).__name__.endswith("RotaryEmbedding")}
    for module in found.values():
        kinds = getattr(module, "rope_type", "default")
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            if kind in LENGTH_DEPENDENT:
                raise UserError(f"rotary type {kind!r} changes with the length; use a checkpoint with a fixed rotary type")
    return found


def rotates(model: PreTrainedModel) -> bool:
    """Whether the model rotates in the way that can be taken over."""
    return bool(rotary_modules(model)) and hasattr(_modeling(model), FUNCTION)


def rotary_tables(model: PreTrainedModel, calls: list[tuple], context_tokens: int) -> dict[tuple, Table]:
    """cos and sin of every position, each ``[context_tokens, rotated / 2]``, for each distinct one of ``calls``.

    A call is the module's name and what it is asked beside positions: a kind of layer, in families that have two.
    """
    modules, tables = rotary_modules(model), {}
    for call in dict.fromkeys(calls):
        name, *extras = call
        with torch.no_grad():
            whole = modules[name](torch.zeros(1), torch.arange(context_tokens)[None], *extras)  # each [1, context, rotated]
        cos, sin = (_one_of_each_pair(table[0]).contiguous() for table in whole)
        tables[call] = cos, sin
    return tables


def table_names(calls: list[tuple]) -> dict[tuple, str]:
    """What the tables of each call are called in the graph, in front of ``cos_cache`` and ``sin_cache``."""
    if len(calls) == 1:
        return {calls[0]: ""}
    modules = len({call[0] for call in calls})
    return {call: "_".join([call[0].replace(".", "_")] * (modules > 1) + [*map(str, call[1:])]) + "_" for call in calls}


@contextmanager
def recorded_calls(model: PreTrainedModel) -> Iterator[list[tuple]]:
    """A list that fills with what the rotary modules are asked."""
    calls: list[tuple] = []

    def recorder(name: str, original: Callable):
        def forward(values, position_ids, *extras):
            calls.append((name, *extras))
            return original(values, position_ids, *extras)

        return forward

    with taken_over(model, recorder):
        yield calls


@contextmanager
def taken_over(model: PreTrainedModel, answer: Callable[[str, Callable], Callable], rotate: Callable | None = None) -> Iterator[None]:
    """Inside, rotary modules answer as ``answer(name, original)`` does, and ``rotate(tensors, cos, sin, heads_axis)`` rotates."""
    modeling = _modeling(model)
    with ExitStack() as stack:
        for name, module in rotary_modules(model).items():
            bound = _in_one_order(module.forward, answer(name, module.forward))
            stack.enter_context(patch.object(module, "forward", bound))
        if rotate is not None:
            stack.enter_context(patch.object(modeling, FUNCTION, _rotary_function(getattr(modeling, FUNCTION), rotate)))
        yield


def _in_one_order(original: Callable, wanted: Callable) -> Callable:
    """``wanted`` called with positional arguments alone, in the order of ``original``'s signature."""
    signature = inspect.signature(original)

    def forward(*args, **kwargs):
        bound = signature.bind(*args, **kwargs)
        return wanted(*bound.args, *bound.kwargs.values())

    return forward


def _rotary_function(original: Callable, rotate: Callable) -> Callable:
    """A function with ``original``'s signature: q and k, or a single tensor, in front of cos and sin."""
    signature = inspect.signature(original)
    rotated = list(signature.parameters)[: list(signature.parameters).index("cos")]

    def function(*args, **kwargs):
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        values = given.arguments
        tensors = [values[name] for name in rotated]
        turned = rotate(tensors, values["cos"], values["sin"], values.get("unsqueeze_dim", 1))
        return turned[0] if len(turned) == 1 else tuple(turned)

    return function


def _one_of_each_pair(table: torch.Tensor) -> torch.Tensor:
    """``[context, rotated / 2]``: tables hold each angle twice, in two halves or side by side, or once."""
    if table.shape[-1] % 2:
        return table
    first, second = table.chunk(2, dim=-1)
    if torch.equal(first, second):
        return first
    if torch.equal(table[:, ::2], table[:, 1::2]):
        return table[:, ::2]
    return table


def _modeling(model: PreTrainedModel):
    return sys.modules[type(model).__module__]
