"""Process groups: sums, maxima and gathers over ranks, and what they are where there is one process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from math import prod
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.errors import OptionError

T = TypeVar("T")
Ranks = DeviceMesh | dist.ProcessGroup | None
"""Some ranks: those of a mesh of any dimensions, of a process group, or (``None``) all of them."""


class Announced(Protocol):
    """What ranks do before a collective: ``agree.Meeting``."""

    def sum(self, value: Tensor, ranks: Ranks) -> Tensor | None:
        """The sum over the ranks, where the meeting takes it along."""
        ...

    def around(self, name: str, value: Tensor, ranks: Ranks) -> AbstractContextManager[None]:
        """Surrounds a collective."""
        ...


announced: ContextVar[Announced | None] = ContextVar("announced", default=None)
"""Set by ``agree.together``."""
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


def groups_of(ranks: Ranks) -> list[dist.ProcessGroup | None]:
    """Groups to reduce over one after the other to reduce over ``ranks``; none where that is one rank.

    A mesh of several dimensions has a group for each of them. That of the whole world takes the default group.
    """
    if _ALONE.get() or not (dist.is_available() and dist.is_initialized()):
        return []
    if dist.get_rank() not in ranks_in(ranks):
        raise OptionError(f"rank {dist.get_rank()} is not in the mesh or group given, {ranks}; give one that it is in")
    if isinstance(ranks, DeviceMesh):
        if ranks.size() == dist.get_world_size():
            return [None] if ranks.size() > 1 else []
        return [group for group in ranks.get_all_groups() if dist.get_world_size(group) > 1]
    return [ranks] if dist.get_world_size(ranks) > 1 else []


def ranks_in(ranks: Ranks) -> list[int]:
    """Numbers in the world of ``ranks``; ``[0]`` where ``torch.distributed`` is not initialised."""
    if not (dist.is_available() and dist.is_initialized()):
        return [0]
    if isinstance(ranks, DeviceMesh):
        found: list[int] = ranks.mesh.flatten().tolist()
        return found
    return list(range(dist.get_world_size())) if ranks is None else dist.get_process_group_ranks(ranks)


def world_size(ranks: Ranks = None) -> int:
    """How many ``ranks`` there are (default: all), 1 without ``torch.distributed`` initialised, and under ``alone``."""
    return prod(dist.get_world_size(group) for group in groups_of(ranks))


def all_reduce_sum(value: Tensor, ranks: Ranks = None) -> Tensor:
    """Sum of ``value`` over ``ranks``, on its device; ``value`` itself where there is one."""
    groups, meeting = groups_of(ranks), announced.get()
    if groups and meeting is not None and (found := meeting.sum(value, ranks)) is not None:
        return found
    for group in groups:
        sent = value.to(_device_for(value, group), copy=True)
        with _announced("all_reduce_sum", sent, ranks):
            dist.all_reduce(sent, op=dist.ReduceOp.SUM, group=group)
        value = sent.to(value.device)
    return value


def all_reduce_max(value: int, ranks: Ranks = None) -> int:
    """Largest ``value`` of all ``ranks``. Waits for the device: call it where batches are built."""
    for group in groups_of(ranks):
        found = torch.tensor(value, device=default_device(group))
        with _announced("all_reduce_max", found, ranks):
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        value = int(found)
    return value


def default_device(ranks: Ranks = None) -> torch.device:
    """Where tensors stand that ``ranks`` exchange."""
    groups = groups_of(ranks)
    if groups and dist.get_backend(groups[0]) == "nccl":
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def all_gather(values: Tensor, ranks: Ranks = None) -> Tensor:
    """``values`` of every rank of ``ranks``, ``[ranks, *shape]``, the shape being the same on all."""
    rows = values.unsqueeze(0)
    if not values.numel():
        return rows.expand(world_size(ranks), *values.shape)
    for group in reversed(groups_of(ranks)):  # the last dimension of a mesh is the one that runs fastest
        sent = rows.to(_device_for(rows, group)).contiguous()
        parts = [torch.empty_like(sent) for _ in range(dist.get_world_size(group))]
        with _announced("all_gather", sent, ranks):
            dist.all_gather(parts, sent, group=group)
        rows = torch.cat(parts).to(values.device)
    return rows


def all_gather_object(value: T, ranks: Ranks = None) -> list[T]:
    """``value`` of every rank of ``ranks``, pickled on the way."""
    found = [value]
    for group in reversed(groups_of(ranks)):
        lists: list[list[T]] = [found] * dist.get_world_size(group)
        dist.all_gather_object(lists, found, group=group)
        found = [each for part in lists for each in part]
    return found


def _announced(name: str, value: Tensor, ranks: Ranks) -> AbstractContextManager[None]:
    meeting = announced.get()
    return nullcontext() if meeting is None else meeting.around(name, value, ranks)


def _device_for(value: Tensor, group: dist.ProcessGroup | None) -> torch.device:
    """NCCL exchanges CUDA tensors only; a batch may be built on the CPU."""
    return default_device(group) if dist.get_backend(group) == "nccl" and not value.is_cuda else value.device
