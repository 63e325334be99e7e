"""Hidden states of two models side by side: which layers belong together, and how far their outputs are apart."""

import json
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
from transformers import PreTrainedModel

from models.errors import UserError
from models.families import decoder_layers


def shared_layers(teacher: PreTrainedModel, student: PreTrainedModel, prune: Path) -> tuple[tuple[int, int], ...]:
    """Pairs of teacher's and student's number of every layer that both have, by what prune.json says was removed.

    UserError where the hidden sizes differ: there is nothing to compare then.
    """
    sizes = teacher.config.hidden_size, student.config.hidden_size
    if sizes[0] != sizes[1]:
        raise UserError(f"recover.hidden_weight compares hidden states, but their sizes are {sizes[0]} and {sizes[1]}; set it to 0")
    removed = {entry["layer"] for entry in json.loads((prune / "prune.json").read_text(encoding="utf-8"))["removed_layers"]}
    kept = [number for number in range(len(decoder_layers(teacher))) if number not in removed]
    return tuple(zip(kept, range(len(decoder_layers(student))), strict=True))


@contextmanager
def layer_outputs(model: PreTrainedModel, layers: list[int]) -> Iterator[dict[int, torch.Tensor]]:
    """While active the returned dict holds what each of ``layers`` gave last, ``[batch, seq, hidden]``."""
    seen = {}

    def keep(number: int):
        return lambda module, inputs, output: seen.__setitem__(number, output[0] if isinstance(output, tuple) else output)

    with ExitStack() as stack:
        for number in layers:
            handle = decoder_layers(model)[number].register_forward_hook(keep(number))
            stack.callback(handle.remove)
        yield seen


def relative_error(wanted: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
    """Mean over tokens of ``|given - wanted|^2 / |wanted|^2``, both ``[batch, seq, hidden]``.

    Token by token, because the first token's state is often a hundred times as long as the others'.
    """
    wanted, given = wanted.float(), given.float()
    length = wanted.square().sum(-1).clamp_min(torch.finfo(torch.float32).tiny)  # [batch, seq]
    return ((given - wanted).square().sum(-1) / length).mean()
