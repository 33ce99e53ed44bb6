"""Batches of one optimizer step, from input items to calibrated kwargs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.distributed import Ranks, TokenRanks, ranks_in
from xloss.errors import OptionError, ShapeError
from xloss.losses.model import BaseLossKwargs, TokenBatch
from xloss.losses.split import bounds_without_padding

if TYPE_CHECKING:
    from xloss.losses.base import BaseLossContext

Kwargs = TypeVar("Kwargs", bound=BaseLossKwargs)


def kwargs_of(item: TokenBatch, kwargs_cls: type[Kwargs]) -> Kwargs:
    """Kwargs with the fields of an item, split as it is."""

    def made(source: TokenBatch) -> Kwargs:
        shared = type(source).model_fields.keys() & kwargs_cls.model_fields.keys()
        return kwargs_cls(**{name: getattr(source, name) for name in shared})

    kwargs = made(item)
    if item.split is not None:
        item.split.update(item)
        kwargs.join_split(item.split.of(made(item.split.whole)))
    return kwargs


def calibrate_all(
    cls: type[BaseLossContext[Any]],
    kwargs_list: Sequence[BaseLossKwargs],
    loss_cfg: Any,
    cu_seq_lens_list: Sequence[Tensor] | None,
    sp_mesh: DeviceMesh | None,
    data_mesh: Ranks,
) -> None:
    """Calibrate the kwargs of a step in place, each as a whole, and count their live rows."""
    sp_mesh = _checked_sp_mesh(kwargs_list, sp_mesh)
    if sp_mesh is not None and not set(ranks_in(sp_mesh)) <= set(ranks_in(data_mesh)):
        raise OptionError(
            f"data_mesh must hold the ranks of sp_mesh, {ranks_in(sp_mesh)}, whose tokens are distinct too, as "
            f'mesh["dp", "sp"] does; got ranks {ranks_in(data_mesh)}'
        )
    if cu_seq_lens_list is not None and len(cu_seq_lens_list) != len(kwargs_list):
        raise ShapeError(f"cu_seq_lens_list has {len(cu_seq_lens_list)} entries for {len(kwargs_list)} micro-batches")
    wholes = []
    for i, kwargs in enumerate(kwargs_list):
        if kwargs.split is not None:
            kwargs.check()
            kwargs.split.update(kwargs)
            if cu_seq_lens_list is not None:
                bounds = bounds_without_padding(cu_seq_lens_list[i], kwargs.split)
                cu_seq_lens_list = [*cu_seq_lens_list[:i], bounds, *cu_seq_lens_list[i + 1 :]]
        wholes.append(kwargs.whole)
    ranks = TokenRanks(data_mesh, counts=sp_mesh is None or sp_mesh.get_local_rank() == 0)
    cls.calibrate(wholes, loss_cfg, cu_seq_lens_list, ranks)
    ranks.reduce()  # where there is no micro-batch, none asked for the sums
    for kwargs in kwargs_list:
        kwargs.take_calibrated()
        ctx = cls(loss_cfg, kwargs)
        if ctx.needs_whole() and kwargs.split is not None:
            ctx.whole().find_rows()
        ctx.find_rows()


def _checked_sp_mesh(kwargs_list: Sequence[BaseLossKwargs], sp_mesh: DeviceMesh | None) -> DeviceMesh | None:
    """The mesh that all kwargs are split over, ``None`` where there is no split."""
    found = [kwargs.split for kwargs in kwargs_list]
    meshes = [split.sp_mesh for split in found if split is not None]
    if sp_mesh is not None and sp_mesh.size() > 1:
        meshes.append(sp_mesh)
    if meshes and None in found:
        raise OptionError(
            f"micro-batch {found.index(None)} is not split over the {meshes[0].size()} ranks of sp_mesh: call "
            "item.sp_split(sp_mesh) on the whole, or item.sp_parts(sp_mesh, order=...) where its tensors are this "
            "rank's parts already"
        )
    if any(ranks_in(mesh) != ranks_in(meshes[0]) for mesh in meshes):
        raise OptionError(f"micro-batches are split over different ranks: {[ranks_in(mesh) for mesh in meshes]}")
    return meshes[0] if meshes else None
