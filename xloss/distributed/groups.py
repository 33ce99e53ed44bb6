"""Process groups: sums, maxima and gathers over ranks, and what they are where there is one process."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
Announce = Callable[[str, Tensor], AbstractContextManager[None]]

announced: ContextVar[Announce] = ContextVar("announced", default=lambda name, value: nullcontext())
"""What surrounds each collective of tensors: nothing, or the announcement of ``agree.together``."""
_ALONE: ContextVar[bool] = ContextVar("alone", default=False)


@contextmanager
def alone() -> Iterator[None]:
    """Inside, this process is the only one: nothing is exchanged, and sums over ranks are its own.

    For batches whose denominators a framework has counted already, at places that ranks do not reach together.
    """
    token = _ALONE.set(True)
    try:
        yield
    finally:
        _ALONE.reset(token)


def world_size(group: dist.ProcessGroup | None = None) -> int:
    """Ranks in ``group`` (default: all), 1 where ``torch.distributed`` is not initialised, and under ``alone``."""
    if _ALONE.get():
        return 1
    return dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1


def all_reduce_sum(value: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sum of ``value`` over the ranks of ``group``; ``value`` itself where there is one rank."""
    if world_size(group) > 1:
        value = value.clone()
        with announced.get()("all_reduce_sum", value):
            dist.all_reduce(value, op=dist.ReduceOp.SUM, group=group)
    return value


def all_reduce_max(value: int, device: torch.device) -> int:
    """Largest ``value`` of all ranks. Waits for the device: call it where batches are built."""
    if world_size() == 1:
        return value
    found = torch.tensor(value, device=device)
    with announced.get()("all_reduce_max", found):
        dist.all_reduce(found, op=dist.ReduceOp.MAX)
    return int(found)


def default_device(group: dist.ProcessGroup | None = None) -> torch.device:
    """Where tensors stand that the ranks of ``group`` exchange."""
    return (
        torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else torch.device("cpu")
    )


def all_gather(values: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """``values [N]`` of every rank of ``group``, ``[ranks, N]``; N is the same on all."""
    values = values.contiguous()
    rows = [torch.empty_like(values) for _ in range(world_size(group))]
    with announced.get()("all_gather", values):
        dist.all_gather(rows, values, group=group)
    return torch.stack(rows)


def all_gather_object(value: T, group: dist.ProcessGroup | None = None) -> list[T]:
    """``value`` of every rank of ``group``, pickled on the way."""
    found: list[T] = [value] * world_size(group)
    dist.all_gather_object(found, value, group=group)
    return found
