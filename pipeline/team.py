"""The processes that train one model together: this one alone, or one for each GPU of this machine, tied together by accelerate.

Every process holds the whole model and computes on its share of the windows; what they found is added up, so that all take the
same step. The process that calls is the first of them, and the only one that writes and draws.
"""

import os
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from datetime import timedelta

import torch
from accelerate import PartialState
from accelerate.utils import check_cuda_p2p_ib_support, patch_environment, reduce
from torch import multiprocessing

SILENCE = timedelta(minutes=10)  # after which a process that waits for a lost one gives up


class Team:
    """What one process knows of its team: the device that it computes on, its rank, how many there are."""

    def __init__(self, state: PartialState | None = None):
        alone = "cuda" if torch.cuda.is_available() else "cpu"
        self.device = state.device if state else torch.device(alone)
        self.rank = state.process_index if state else 0
        self.size = state.num_processes if state else 1

    def share(self, windows: torch.Tensor) -> torch.Tensor:
        """This process's part of ``windows`` ``[count, seq]``; may be empty."""
        return windows[self.rank :: self.size].to(self.device)

    def add_up(self, number: float) -> float:
        """The sum of all processes' numbers, the same in each of them."""
        return number if self.size == 1 else reduce(torch.tensor(number, dtype=torch.float64, device=self.device), "sum").item()

    def add_up_gradients(self, parameters: list[torch.Tensor]) -> None:
        """Give every process the sum of all gradients: one exchange for all of them."""
        if self.size == 1:
            return
        gradients = [parameter.grad if parameter.grad is not None else torch.zeros_like(parameter) for parameter in parameters]
        summed = reduce(torch.cat([gradient.reshape(-1) for gradient in gradients]), "sum")
        for parameter, part in zip(parameters, summed.split([gradient.numel() for gradient in gradients]), strict=True):
            parameter.grad = part.view_as(parameter)

    def precision(self, asked: str = "auto") -> torch.dtype:
        """What the large products are computed in; ``auto``: bfloat16 on a GPU that has it in hardware, else float32."""
        if asked != "auto":
            return getattr(torch, asked)
        fast = self.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if fast else torch.float32

    def autocast(self, asked: str = "auto"):
        """Mixed precision while computing a loss; weights, gradients and optimiser stay fp32."""
        dtype = self.precision(asked)
        return nullcontext() if dtype == torch.float32 else torch.autocast(self.device.type, dtype=dtype)


def processes() -> int:
    """How many there will be: one per GPU, or one."""
    return max(1, torch.cuda.device_count())


@contextmanager
def team(work: Callable, arguments: tuple) -> Iterator[Team]:
    """Start ``work(*arguments, team)`` in every other process and give this one its place; they end when the block does.

    RuntimeError when one of the others broke.
    """
    count = processes()
    if count == 1:
        yield Team()
        return
    port = free_port()
    context = multiprocessing.get_context("spawn")
    others = [context.Process(target=serve, args=(work, arguments, rank, count, port), daemon=True) for rank in range(1, count)]
    for process in others:
        process.start()
    try:
        with joined(0, count, port) as mine:
            yield mine
        for process in others:
            process.join()
    finally:
        for process in others:
            process.terminate()
    broken = [rank for rank, process in enumerate(others, 1) if process.exitcode]
    if broken:
        raise RuntimeError(f"training process {broken[0]} of {count} ended with code {others[broken[0] - 1].exitcode}")


def serve(work: Callable, arguments: tuple, rank: int, count: int, port: int) -> None:
    """The whole life of one of the other processes."""
    threading.Thread(target=leave_with_parent, daemon=True).start()
    with joined(rank, count, port) as mine:
        work(*arguments, mine)


def leave_with_parent() -> None:
    """End this process as soon as the first one is gone, however it went: nobody would use what it computes."""
    multiprocessing.parent_process().join()
    os._exit(1)


@contextmanager
def joined(rank: int, count: int, port: int) -> Iterator[Team]:
    """While active this process is number ``rank`` of ``count`` that meet at a port of this machine."""
    place = {"rank": rank, "local_rank": rank, "world_size": count, "local_world_size": count}
    with ExitStack() as stack:
        stack.enter_context(patch_environment(**place, master_addr="127.0.0.1", master_port=port))
        on_gpus = torch.cuda.is_available()
        if on_gpus and not check_cuda_p2p_ib_support():
            stack.enter_context(patch_environment(nccl_p2p_disable=1, nccl_ib_disable=1))
        state = PartialState(cpu=not on_gpus, timeout=SILENCE)
        stack.callback(PartialState._reset_state)
        stack.callback(state.destroy_process_group)
        yield Team(state)


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]
