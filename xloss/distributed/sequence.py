"""Sequence parallelism: a sequence split over the ranks of a mesh, and gathered again."""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.distributed.groups import all_gather, ranks_in
from xloss.errors import OptionError, ShapeError

Order = Literal["contiguous", "head_tail"]


def sp_places(length: int, size: int, order: Order = "contiguous") -> Tensor:
    """Positions of a sequence of ``length`` tokens that each of ``size`` ranks holds, ``[size, part]``; -1 is padding.

    ``contiguous``: rank r holds part r of ``size`` equal ones. ``head_tail``: parts r and ``2 size - 1 - r`` of
    ``2 size``, so that under causal attention all work as much (torch's ``context_parallel``).
    """
    if order not in get_args(Order):
        raise OptionError(f"order must be one of {get_args(Order)}; got {order!r}")
    parts = size if order == "contiguous" else 2 * size
    part = -(-length // parts)
    places = torch.arange(part * parts).reshape(parts, part)
    places = places.masked_fill(places >= length, -1)
    return places if order == "contiguous" else torch.cat([places[:size], places[size:].flip(0)], 1)


def mesh_places(length: int, sp_mesh: DeviceMesh, order: Order = "contiguous") -> Tensor:
    """``sp_places`` for the ranks of a mesh, which must stand in ascending order: collectives have them in that."""
    ranks = ranks_in(sp_mesh)
    if ranks != sorted(ranks):
        raise OptionError(f"sp_mesh must hold its ranks in ascending order; got {ranks}")
    return sp_places(length, sp_mesh.size(), order)


def take_places(tensor: Tensor, places: Tensor, pad: float, axis: int = -1) -> Tensor:
    """``tensor`` at ``places`` along ``axis``; ``pad`` where a place is -1."""
    shape = [1] * tensor.ndim
    shape[axis] = places.numel()
    found = tensor.index_select(axis, places.clamp(min=0)) if tensor.shape[axis] else tensor.narrow(axis, 0, 0)
    return found.masked_fill((places < 0).reshape(shape), pad)


def inverse_places(places: Tensor) -> Tensor:
    """Where each token of the whole stands in the parts of all ranks joined, ``[ranks, part]`` to ``[T]``."""
    flat = places.flatten()
    held = (flat >= 0).nonzero().flatten()
    return held[flat[held].argsort()]


def join_parts(parts: Tensor, inverse: Tensor, axis: int = -1) -> Tensor:
    """Parts of all ranks ``[ranks, *part]`` as the whole, along the ``axis`` of a part."""
    return torch.cat(parts.unbind(), dim=axis).index_select(axis, inverse)


def sp_split(tensor: Tensor, sp_mesh: DeviceMesh, pad: float, axis: int = -1, order: Order = "contiguous") -> Tensor:
    """This rank's part of ``tensor`` along ``axis``, padded with ``pad`` at its end to equal parts."""
    places = mesh_places(tensor.shape[axis], sp_mesh, order)[sp_mesh.get_local_rank()]
    return take_places(tensor, places.to(tensor.device), pad, axis)


def sp_gather(
    tensor: Tensor, sp_mesh: DeviceMesh, axis: int = -1, order: Order = "contiguous", length: int | None = None
) -> Tensor:
    """The parts of all sequence-parallel ranks joined along ``axis``, in the order of the sequence; no gradient.

    ``length``: tokens of the sequence, without padding; default: padding stays. Undoes ``sp_split`` of that order.
    """
    whole = tensor.shape[axis] * sp_mesh.size()
    places = mesh_places(whole if length is None else length, sp_mesh, order).to(tensor.device)
    if places.shape[1] != tensor.shape[axis]:
        raise ShapeError(
            f"a sequence of length={length} in order={order!r} has parts of {places.shape[1]} tokens on "
            f"{sp_mesh.size()} ranks; got {tuple(tensor.shape)} along axis {axis}"
        )
    return join_parts(all_gather(tensor.detach(), sp_mesh), inverse_places(places), axis)


class GatherParts(torch.autograd.Function):
    """``[.., part]`` of this rank to ``[.., T]`` of all, one all-gather. Backward: the gradient at its own ``places``.

    Right where every rank computes the same of the whole: each then holds the whole gradient, and takes its part.
    """

    @staticmethod
    def forward(ctx: Any, part: Tensor, places: Tensor, inverse: Tensor, sp_mesh: DeviceMesh) -> Tensor:
        ctx.save_for_backward(places)
        return join_parts(all_gather(part, sp_mesh), inverse)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        (places,) = ctx.saved_tensors
        return take_places(grads[0], places, 0), None, None, None
