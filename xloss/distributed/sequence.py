"""Sequence parallelism: a sequence split over the ranks of a mesh, and gathered again."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.distributed import groups


def sp_split(tensor: Tensor, sp_mesh: DeviceMesh, pad: float, axis: int = -1) -> Tensor:
    """This rank's contiguous part of ``tensor`` along ``axis``, padded with ``pad`` to equal parts."""
    size, rank = sp_mesh.size(), sp_mesh.get_local_rank()
    part = -(-tensor.shape[axis] // size)
    missing = part * size - tensor.shape[axis]
    if missing:
        shape = list(tensor.shape)
        shape[axis] = missing
        tensor = torch.cat([tensor, tensor.new_full(shape, pad)], dim=axis)
    return tensor.narrow(axis, rank * part, part).contiguous()


def sp_gather(tensor: Tensor, sp_mesh: DeviceMesh) -> Tensor:
    """The parts ``[.., T]`` of all sequence-parallel ranks joined along the last axis (padding included)."""
    parts = [torch.empty_like(tensor) for _ in range(sp_mesh.size())]
    with groups.announced.get()("sp_gather", tensor):
        dist.all_gather(parts, tensor.contiguous(), group=sp_mesh.get_group())
    return torch.cat(parts, dim=-1)
