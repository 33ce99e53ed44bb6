"""Vocabulary parallelism: which rows of the head this rank holds, and how tensors on a mesh become local ones.

Every rank of the group has all tokens (or a part of the sequence, which is gathered), and some rows of the head.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeAlias, TypeGuard

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.distributed.groups import all_gather, default_device
from xloss.errors import OptionError, ShapeError, UnsupportedError
from xloss.lora import LoraWeight

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


@dataclass(frozen=True)
class VocabPart:
    """Rows ``start:stop`` of a head whose rows are dealt to the ranks of ``group``, by ``bounds`` in rank order."""

    bounds: tuple[tuple[int, int], ...]
    rank: int
    group: dist.ProcessGroup

    @property
    def start(self) -> int:
        return self.bounds[self.rank][0]

    @property
    def stop(self) -> int:
        return self.bounds[self.rank][1]

    @property
    def num_rows(self) -> int:
        """Rows of the head on this rank; may be 0."""
        return self.stop - self.start

    @property
    def widest(self) -> int:
        """Most rows of the head on any rank: what chunk sizes go by, so that all ranks cut alike."""
        return max(stop - start for start, stop in self.bounds)

    @property
    def vocab_size(self) -> int:
        """Rows of the whole head."""
        return max(stop for _, stop in self.bounds)

    def local_labels(self, labels: Tensor, ignore_index: int) -> Tensor:
        """Labels as rows of this rank: -1 where ignored, ``num_rows`` where another rank has the row."""
        here = (labels >= self.start) & (labels < self.stop)
        local = torch.where(here, labels - self.start, self.num_rows)
        return local.masked_fill(labels == ignore_index, IGNORED)

    def __str__(self) -> str:
        return f"the vocabulary is split over {len(self.bounds)} ranks, rank {self.rank} holds {self.start}:{self.stop}"


IGNORED = -1
"""The ignored label among local ones: the user's own ignore index may be another token's row here."""


class VocabShard:
    """Rows ``offset : offset + V_r`` of an lm_head ``[V, H]``, for vocabulary parallelism without DTensors.

    Give it as ``head_weight``. Making one is a collective of ``group``, as every rank learns where the others' rows
    are; so make it once, beside the model. A rank may hold no row.

    Args:
        weight: ``[V_r, H]``, this rank's rows; usually the parameter itself, which then gets the gradient.
        offset: vocabulary id of the first.
        vocab_size: V. The ranks' rows must be exactly ``0 : V``; padding rows at the end are sliced off first.
        group: the ranks that share the vocabulary and have the same tokens: a process group or a mesh of one axis.
        bias: ``[V_r]`` or ``None``.

    Raises:
        ShapeError: ``weight`` is not ``[V_r, H]``, or ``bias`` not ``[V_r]``. OptionError: the ranks' rows leave a gap
        or overlap, or ``vocab_size`` differs between ranks. UnsupportedError: a DTensor, which needs no ``VocabShard``.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        offset: int,
        vocab_size: int,
        group: dist.ProcessGroup | DeviceMesh,
        bias: Tensor | None = None,
    ) -> None:
        for name, tensor in (("weight", weight), ("bias", bias)):
            if _is_dtensor(tensor):
                raise UnsupportedError(f"VocabShard's {name} is a DTensor; give that itself as head_{name}")
        if weight.ndim != 2:
            raise ShapeError(f"VocabShard's weight must be [V_r, H]; got {tuple(weight.shape)}")
        if bias is not None and bias.shape != weight.shape[:1]:
            raise ShapeError(f"VocabShard's bias must be [V_r] = ({weight.shape[0]},); got {tuple(bias.shape)}")
        if isinstance(group, DeviceMesh):
            if group.ndim != 1:
                raise OptionError(
                    f"VocabShard's group must be a mesh of one axis, as mesh['tp']; got the axes {group.mesh_dim_names}"
                )
            group = group.get_group()
        self.weight, self.bias = weight, bias
        mine = torch.tensor([offset, offset + weight.shape[0], vocab_size], device=default_device(group))
        rows = all_gather(mine, group).tolist()
        bounds = tuple((start, stop) for start, stop, _ in rows)
        edge = 0
        for start, stop in sorted(bounds):
            if start != edge and start != stop:
                break
            edge = max(edge, stop)
        if edge != vocab_size or max(stop for _, stop in bounds) != edge or {size for *_, size in rows} != {vocab_size}:
            raise OptionError(
                f"the ranks' rows must be exactly 0:{vocab_size}, without gap or overlap, and vocab_size one number; "
                f"got rows {', '.join(f'{a}:{b} of {size}' for a, b, size in rows)}"
            )
        self.part = VocabPart(bounds, dist.get_rank(group), group)

    def detach(self) -> VocabShard:
        """The same rows without gradient."""
        twin = object.__new__(VocabShard)
        twin.weight, twin.part = self.weight.detach(), self.part
        twin.bias = None if self.bias is None else self.bias.detach()
        return twin


HeadWeight: TypeAlias = Tensor | VocabShard | LoraWeight
"""``[V, H]``, a DTensor of that shape, this rank's rows of it, or it and adapters."""


@dataclass(frozen=True)
class LocalHead:
    """Plain tensors of this rank. ``part``: the weight is a part of the vocabulary.

    ``group``: the ranks that must have the same tokens, where there is more than one. ``gathered``: the hidden states
    are a copy, put together from those of all ranks. ``lora``: the head with its adapters.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    part: VocabPart | None = None
    group: dist.ProcessGroup | None = None
    gathered: bool = False
    lora: LoraWeight | None = None


def local_head(hidden: Tensor, weight: HeadWeight, bias: Tensor | None, *, look_only: bool = False) -> LocalHead:
    """This rank's tensors of a head that may be on a mesh; differentiable, with the placements' gradients.

    Hidden states that are a DTensor must be replicated or split along a token axis over the weight's mesh; split ones
    are gathered, and each rank gets the gradient of its own. ``look_only``: shapes matter and values do not, so nothing
    is gathered.

    Raises ``UnsupportedError`` for placements that are not the whole head or rows of it on one mesh axis.
    """
    if isinstance(weight, VocabShard):
        if bias is not None:
            raise OptionError("head_bias is for a head_weight that is whole; give VocabShard(bias=) the bias's rows")
        head = LocalHead(hidden, weight.weight, weight.bias, weight.part, weight.part.group)
    elif isinstance(weight, LoraWeight):
        if any(_is_dtensor(x) for x in (weight.weight, bias, *weight.tensors())):
            raise UnsupportedError("adapters are for a head whose tensors are plain, and one of them is a DTensor")
        head = LocalHead(hidden, weight.weight, bias, lora=weight)
    elif _is_dtensor(weight):
        head = _from_mesh(hidden, weight, bias)
    else:
        if _is_dtensor(bias):
            raise UnsupportedError("head_bias is a DTensor and head_weight is not; give both in one form")
        head = LocalHead(hidden, weight, bias)
    if not _is_dtensor(hidden):
        return head
    local, gathered = _local_hidden(hidden, head.group, look_only)
    return replace(head, hidden=local, gathered=gathered)


class _WholeRows(torch.autograd.Function):
    """All ranks' rows in order. Each rank has the same gradient of the whole, and takes its own rows of it."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, part: VocabPart) -> Tensor:
        ctx.part = part
        padded = rows.new_zeros((part.widest, *rows.shape[1:]))
        padded[: part.num_rows] = rows
        found = all_gather(padded, part.group)
        whole = rows.new_empty((part.vocab_size, *rows.shape[1:]))
        for (start, stop), own in zip(part.bounds, found, strict=True):
            whole[start:stop] = own[: stop - start]
        return whole

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad[ctx.part.start : ctx.part.stop], None


def whole_rows(rows: Tensor, part: VocabPart) -> Tensor:
    """``[V_r, ...]`` of each rank as ``[V, ...]``; differentiable where all ranks do the same with it."""
    whole: Tensor = _WholeRows.apply(rows, part)
    return whole


def _from_mesh(hidden: Tensor, weight: DTensor, bias: Tensor | None) -> LocalHead:
    part, group = _placed(weight, "head_weight")
    if bias is not None:
        if not _is_dtensor(bias) or bias.device_mesh != weight.device_mesh or bias.placements != weight.placements:
            given = f"placements {bias.placements}" if _is_dtensor(bias) else "a plain tensor"
            raise UnsupportedError(
                f"head_bias must be a DTensor on head_weight's mesh with its placements {weight.placements}; "
                f"got {given}"
            )
        bias = bias.to_local()
    return LocalHead(hidden, weight.to_local(), bias, part, group)


def _placed(weight: DTensor, what: str) -> tuple[VocabPart | None, dist.ProcessGroup | None]:
    """Which rows of ``weight [V, H]`` are here, ``None`` for all, and the group that has the same tokens."""
    mesh, placements = weight.device_mesh, weight.placements
    axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    if not axes:
        return None, None
    placement = placements[axes[0]]
    whole, rows = placement.is_replicate(), type(placement).__name__ == "Shard" and placement.is_shard(0)
    if len(axes) > 1 or not (whole or rows):
        raise UnsupportedError(
            f"{what} is a DTensor with placements {placements} on a mesh of {tuple(mesh.shape)}; a head is whole "
            "(Replicate) or split by rows (Shard(0)) on one mesh axis. Take an FSDP parameter where it is gathered: "
            "inside xloss.head_weight(module)"
        )
    group = mesh.get_group(axes[0])
    if whole:
        return None, group
    size, count = weight.shape[0], mesh.size(axes[0])
    step = -(-size // count)  # as Shard deals rows: equal parts, the last ones short or empty
    bounds = tuple((min(i * step, size), min((i + 1) * step, size)) for i in range(count))
    part = VocabPart(bounds, mesh.get_local_rank(axes[0]), group)
    held = weight.to_local().shape[0]
    if held != part.num_rows:
        raise UnsupportedError(f"{what} holds {held} rows here where Shard(0) of {size} rows deals {part.num_rows}")
    return part, group


def _local_hidden(hidden: DTensor, group: dist.ProcessGroup | None, look_only: bool) -> tuple[Tensor, bool]:
    """Hidden states of all tokens, and whether they were gathered."""
    mesh, placements = hidden.device_mesh, hidden.placements
    axes = [axis for axis in range(mesh.ndim) if mesh.size(axis) > 1]
    if not axes:
        return hidden.to_local(), False
    if (
        group is None
        or len(axes) > 1
        or dist.get_process_group_ranks(mesh.get_group(axes[0])) != (dist.get_process_group_ranks(group))
    ):
        raise UnsupportedError(
            f"hidden_states is a DTensor on a mesh of {tuple(mesh.shape)} which is not head_weight's; give its local "
            "tensor, or head_weight on the same mesh axis"
        )
    placement = placements[axes[0]]
    if placement.is_replicate():
        return hidden.to_local(), False
    if not any(type(placement).__name__ == "Shard" and placement.is_shard(axis) for axis in range(hidden.ndim - 1)):
        raise UnsupportedError(
            f"hidden_states is a DTensor with placements {placements}; accepted: Replicate, or Shard of a token axis"
        )
    if look_only:
        return hidden.to_local().detach().new_empty(()).expand(hidden.shape).requires_grad_(hidden.requires_grad), True
    from torch.distributed.tensor import Replicate

    whole = hidden.redistribute(placements=[Replicate()] * mesh.ndim)
    return whole.to_local(), True


def _is_dtensor(tensor: object) -> TypeGuard[DTensor]:
    return isinstance(tensor, Tensor) and hasattr(tensor, "device_mesh")  # without importing DTensor
