"""A batch split over sequence-parallel ranks: each remembers the whole, so that what couples tokens sees them all.

Per-token fields are small beside the head. Calibration runs on the whole batch, as without a split, and each rank then
takes its places of what calibration made; a loss that couples tokens is evaluated on the whole by every rank.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.distributed import Order, all_gather, inverse_places, join_parts, mesh_places, take_places
from xloss.errors import ShapeError

if TYPE_CHECKING:
    from xloss.losses.model import BaseLossKwargs, PerToken, TokenBatch


class Split:
    """The whole of a batch that was split, and where this rank's tokens stand in it.

    Args:
        whole: per-token fields of all tokens, in order. Of a ``head_only`` field, which may be large, it holds
            ``[.., 1]``: NaN at tokens where the field is not finite, else 0.
        places: ``[ranks, part]``, places in the whole along the token axis of what each rank holds; -1 is padding.
        sp_mesh: the ranks.
    """

    def __init__(self, whole: TokenBatch, places: Tensor, sp_mesh: DeviceMesh, inverse: Tensor | None = None) -> None:
        self.whole = whole
        self.places = places
        self.inverse = inverse_places(places) if inverse is None else inverse
        self.sp_mesh = sp_mesh
        self._made: dict[str, tuple[Tensor, int]] = {}

    @property
    def own(self) -> Tensor:
        """Places of this rank's tokens, ``[part]``."""
        return self.places[self.sp_mesh.get_local_rank()]

    @property
    def first(self) -> bool:
        """Whether this rank counts what all ranks compute alike."""
        return self.sp_mesh.get_local_rank() == 0

    def of(self, whole: TokenBatch) -> Split:
        """The same split of another batch."""
        return Split(whole, self.places, self.sp_mesh, self.inverse)

    def part_of(self, tokens: Tensor) -> Tensor:
        """This rank's part of ``tokens`` of the whole, ``[T]`` to ``[T]``; 0 at padding."""
        shaped = tokens.reshape(self.whole.shifted_labels.shape)
        return take_places(shaped, self.own, 0).reshape(-1)

    def fill(self, batch: TokenBatch) -> None:
        """Set every field of ``batch`` to this rank's part of the whole, but for those that the head alone reads."""
        found = self.whole.per_token()
        for name in type(self.whole).model_fields:
            if name not in found:
                if name != "cu_seq_lens":  # bounds of the whole do not describe a part of it
                    setattr(batch, name, getattr(self.whole, name))
            elif not (mark := found[name][1]).head_only:
                setattr(batch, name, take_places(found[name][0], self.own, mark.pad, self.whole.token_axis))
        self.remember(batch)

    def remember(self, batch: TokenBatch, names: set[str] | None = None) -> None:
        """Note the tensors of ``batch`` (those of ``names``) as parts of the whole."""
        now = {name: value for name, (value, _) in batch.per_token().items() if names is None or name in names}
        self._made = {name: (value, _version(value)) for name, value in now.items()}

    def unchanged(self, batch: TokenBatch) -> set[str]:
        """Per-token fields of ``batch`` that still are parts of the whole."""
        now = batch.per_token()
        return {
            name
            for name, (made, version) in self._made.items()
            if name in now and now[name][0] is made and _version(made) == version
        }

    def changed(self, batch: TokenBatch) -> list[str]:
        """Per-token fields that were set or left out since."""
        same = self.unchanged(batch)
        return sorted((batch.per_token().keys() | self._made.keys()) - same)

    def update(self, batch: TokenBatch) -> None:
        """Take what was set in ``batch`` since into the whole. Per-token fields are gathered, on all ranks alike."""
        changed, now = self.changed(batch), batch.per_token()
        for name in changed:
            setattr(self.whole, name, self._gathered(*now[name], batch.token_axis) if name in now else None)
        for name in type(batch).model_fields:
            if name not in now and name not in changed and name != "cu_seq_lens":
                setattr(self.whole, name, getattr(batch, name))
        self.remember(batch)

    def _gathered(self, value: Tensor, mark: PerToken, axis: int) -> Tensor:
        if mark.head_only:
            value = _where_finite(value)
        parts = all_gather(value.detach(), self.sp_mesh)
        return join_parts(parts, self.inverse, axis)

    def to(self, device: torch.device | str) -> None:
        """Move the whole to ``device``."""
        self.whole.to(device)
        self.places, self.inverse = self.places.to(device), self.inverse.to(device)


def split_batch(batch: TokenBatch, sp_mesh: DeviceMesh, order: Order) -> Split:
    """Keep this rank's part of every per-token field of ``batch``, in place, and what remembers the whole."""
    labels, per_token = batch.shifted_labels, batch.per_token()
    large = {name: _where_finite(value) for name, (value, mark) in per_token.items() if mark.head_only}
    places = mesh_places(labels.shape[-1], sp_mesh, order).to(labels.device)
    split = Split(batch.replaced(large), places, sp_mesh)
    for name in large:
        value, mark = per_token[name]
        setattr(batch, name, take_places(value, split.own, mark.pad, batch.token_axis))
    split.fill(batch)
    return split


def split_of_parts(batch: TokenBatch, sp_mesh: DeviceMesh, order: Order, length: int | None) -> Split:
    """What remembers the whole of a ``batch`` whose fields are this rank's parts already: gathers them."""
    part = batch.shifted_labels.shape[-1]
    length = part * sp_mesh.size() if length is None else length
    places = mesh_places(length, sp_mesh, order).to(batch.shifted_labels.device)
    if places.shape[1] != part:
        raise ShapeError(
            f"a sequence of length={length} has parts of {places.shape[1]} tokens on {sp_mesh.size()} ranks in "
            f"order={order!r}; shifted_labels has {part}"
        )
    split = Split(batch.replaced({}), places, sp_mesh)
    split.update(batch)
    return split


def joined_split(whole: BaseLossKwargs, parts: list[Split]) -> Split:
    """The split of several batches joined along the tokens."""
    starts = [0]
    for part in parts:
        starts.append(starts[-1] + part.whole.shifted_labels.shape[-1])
    moved = [p.places + start * (p.places >= 0) for p, start in zip(parts, starts, strict=False)]
    return Split(whole, torch.cat(moved, 1), parts[0].sp_mesh)


def bounds_without_padding(cu_seq_lens: Tensor, split: Split) -> Tensor:
    """Bounds of the whole: what they say of the padding to equal parts (XTuner's do) is left out."""
    length, padded = split.whole.shifted_labels.numel(), split.places.numel()
    if split.whole.shifted_labels.ndim == 2 and split.whole.shifted_labels.shape[0] != 1:
        return cu_seq_lens  # which is refused for a padded batch
    bounds = cu_seq_lens.tolist()
    if not length < bounds[-1] <= padded:
        return cu_seq_lens
    kept = [b for b in bounds if b <= length]
    return cu_seq_lens.new_tensor(kept if kept[-1] == length else [*kept, length])


def _where_finite(x: Tensor) -> Tensor:
    """``[.., 1]``: 0 where all of the last axis is finite, else NaN."""
    finite = x.isfinite().all(-1, keepdim=True)
    return torch.zeros_like(finite, dtype=torch.float32).masked_fill(~finite, torch.nan)


def _version(x: Tensor) -> int:
    return 0 if x.is_inference() else x._version  # those have no counter to notice a write by
