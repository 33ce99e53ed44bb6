"""Sequences packed into one row, described by ``cu_seq_lens``: ids, sums and broadcasts per sequence.

``cu_seq_lens`` is ``[N + 1]``, integer, starts at 0, never falls and ends at the number of tokens of the pack.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from xloss.errors import DtypeError, OptionError, ShapeError


def check_cu_seq_lens(cu_seq_lens: Tensor, num_tokens: int) -> None:
    """Raise unless ``cu_seq_lens`` covers exactly ``num_tokens``. Reads values: call it where batches are built."""
    if cu_seq_lens.ndim != 1 or cu_seq_lens.numel() < 1:
        raise ShapeError(f"cu_seq_lens must be 1-d with at least one entry; got shape {tuple(cu_seq_lens.shape)}")
    if cu_seq_lens.dtype not in (torch.int32, torch.int64):
        raise DtypeError(f"cu_seq_lens must be int32 or int64; got {cu_seq_lens.dtype}")
    bounds = cu_seq_lens.tolist()
    if bounds[0] != 0 or bounds[-1] != num_tokens or any(b < a for a, b in pairwise(bounds)):
        raise ShapeError(
            f"cu_seq_lens must start at 0, never fall, and end at the {num_tokens} tokens of the pack; got {bounds}"
        )


def segment_ids(cu_seq_lens: Tensor, num_tokens: int) -> Tensor:
    """Sequence number of each token, ``[num_tokens]`` int64. Sequences of length 0 have no token."""
    positions = torch.arange(num_tokens, device=cu_seq_lens.device)
    return torch.searchsorted(cu_seq_lens[1:].to(torch.int64).contiguous(), positions, right=True)


class _Sum(torch.autograd.Function):
    """``[T]`` to ``[N]``, sums over ``bounds``; the adjoint of ``_Spread``.

    The two are written down because on CUDA ``index_add`` adds in whatever order its threads come, and on a CPU the
    backward of indexing does; ``segment_reduce`` adds in a fixed order.
    """

    @staticmethod
    def forward(ctx: Any, values: Tensor, ids: Tensor, bounds: Tensor) -> Tensor:
        ctx.save_for_backward(ids, bounds)
        if not values.numel():
            return values.new_zeros(bounds.numel() - 1)
        return torch.segment_reduce(values, "sum", offsets=bounds, unsafe=True)  # unsafe: no wait to check bounds

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Spread.apply(grads[0], *ctx.saved_tensors), None, None


class _Spread(torch.autograd.Function):
    """``[N]`` to ``[T]``, the value of its segment at each token; the adjoint of ``_Sum``."""

    @staticmethod
    def forward(ctx: Any, per_segment: Tensor, ids: Tensor, bounds: Tensor) -> Tensor:
        ctx.save_for_backward(ids, bounds)
        return per_segment[ids]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return _Sum.apply(grads[0], *ctx.saved_tensors), None, None


def segment_sum(values: Tensor, cu_seq_lens: Tensor) -> Tensor:
    """Sum of ``values [T]`` per sequence, ``[N]``; differentiable. The same bits every time, on CUDA too."""
    summed: Tensor = _Sum.apply(values, segment_ids(cu_seq_lens, values.shape[0]), cu_seq_lens)
    return summed


def broadcast_segments(per_sequence: Tensor, cu_seq_lens: Tensor, num_tokens: int) -> Tensor:
    """Value of its sequence for each token: ``[N]`` to ``[num_tokens]``; differentiable."""
    spread: Tensor = _Spread.apply(per_sequence, segment_ids(cu_seq_lens, num_tokens), cu_seq_lens)
    return spread


def rows_as_segments(shape: torch.Size, device: torch.device) -> Tensor:
    """``cu_seq_lens`` of an unpacked batch: every row of ``[B, S]`` is a sequence; ``[T]`` is one."""
    rows, length = (1, shape[0]) if len(shape) == 1 else (shape[0], shape[1])
    return torch.arange(rows + 1, device=device) * length


def roll_segments(values: Tensor, cu_seq_lens: Tensor | None, shift: int, fill: float) -> Tensor:
    """``values`` moved ``shift`` places to the left inside each sequence; ``fill`` where nothing moves in.

    Args:
        values: ``[T]`` or ``[1, T]`` packed, or ``[B, S]`` with a sequence a row.
        cu_seq_lens: bounds ``[N + 1]`` of the packed sequences; ``None``: every row is one, and ``[T]`` is one.
        shift: at least 0.

    Raises:
        OptionError: ``shift`` is negative. ShapeError, DtypeError: ``cu_seq_lens`` does not describe ``values``.
    """
    if shift < 0:
        raise OptionError(f"shift must be at least 0, places to the left; got {shift}")
    if values.ndim not in (1, 2):
        raise ShapeError(f"values must be [T], [1, T] or [B, S]; got {tuple(values.shape)}")
    if cu_seq_lens is None:
        bounds = rows_as_segments(values.shape, values.device)
    elif values.ndim == 2 and values.shape[0] != 1:
        raise ShapeError(f"cu_seq_lens describes one packed row, [T] or [1, T]; got values of {tuple(values.shape)}")
    else:
        check_cu_seq_lens(cu_seq_lens, values.numel())
        bounds = cu_seq_lens.to(values.device)
    flat = values.reshape(-1)
    end = bounds[1:][segment_ids(bounds, flat.numel())]
    source = torch.arange(flat.numel(), device=flat.device) + shift
    moved = flat[source.clamp(max=max(flat.numel() - 1, 0))]
    return moved.masked_fill(source >= end, fill).reshape(values.shape)


def roll_labels(labels: Tensor, cu_seq_lens: Tensor | None, shift: int, ignore_idx: int = -100) -> Tensor:
    """Labels of a head that predicts ``shift`` tokens further ahead: ``labels[t + shift]`` at t where that is in the
    same sequence, else ``ignore_idx``. Arguments and errors as in ``roll_segments``.
    """
    return roll_segments(labels, cu_seq_lens, shift, ignore_idx)


def shift_labels(labels: Tensor, cu_seq_lens: Tensor | None = None, ignore_idx: int = -100) -> Tensor:
    """``shifted_labels`` from labels that stand at their own tokens: at t the next token of the same sequence, and
    ``ignore_idx`` at its last. Arguments and errors as in ``roll_segments``.
    """
    return roll_labels(labels, cu_seq_lens, 1, ignore_idx)


@dataclass(frozen=True)
class Segments:
    """The sequences of a batch as a loss that couples tokens needs them. Sums run over valid tokens only.

    Args:
        ids: ``[T]`` int64, number of each token's sequence; never falls.
        count: how many sequences there are, empty ones included.
        valid: ``[T]`` bool, tokens that belong to the loss. Whatever stands elsewhere, NaN too, changes nothing.
    """

    ids: Tensor
    count: int
    valid: Tensor

    @classmethod
    def of(cls, cu_seq_lens: Tensor, valid: Tensor) -> Segments:
        """From the bounds ``[N + 1]`` of packed sequences and a mask ``[T]``."""
        return cls(segment_ids(cu_seq_lens, valid.numel()), cu_seq_lens.numel() - 1, valid)

    @cached_property
    def bounds(self) -> Tensor:
        """``cu_seq_lens`` of these sequences, ``[count + 1]``."""
        return torch.searchsorted(self.ids, torch.arange(self.count + 1, device=self.ids.device))

    def sum(self, values: Tensor) -> Tensor:
        """Sum over the valid tokens of each sequence, ``[T]`` to ``[count]``; differentiable."""
        summed: Tensor = _Sum.apply(values.masked_fill(~self.valid, 0), self.ids, self.bounds)
        return summed

    def lengths(self, like: Tensor) -> Tensor:
        """Valid tokens of each sequence, ``[count]``, in the dtype of ``like``."""
        return self.sum(self.valid.to(like.dtype))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the valid tokens of each sequence, ``[count]``; 0 where there is none."""
        return self.sum(values) / self.lengths(values).clamp(min=1)

    def max(self, values: Tensor) -> Tensor:
        """Largest value of the valid tokens of each sequence, ``[count]``; 0 where there is none."""
        lowest = values.new_full((self.count,), -torch.inf)
        found = lowest.scatter_reduce(0, self.ids, values.masked_fill(~self.valid, -torch.inf), "amax")
        return found.masked_fill(self.lengths(values) == 0, 0)

    def spread(self, per_sequence: Tensor) -> Tensor:
        """Value of its sequence for each token, ``[count]`` to ``[T]``; differentiable."""
        spread: Tensor = _Spread.apply(per_sequence, self.ids, self.bounds)
        return spread

    def runs(self) -> Segments:
        """The runs of consecutive valid tokens within the sequences: the turns of a conversation.

        ``count`` is an upper bound, the number of tokens: how many runs there are, only the device knows.
        """
        before = torch.zeros_like(self.valid)
        before[1:] = self.valid[:-1] & (self.ids[1:] == self.ids[:-1])
        starts = self.valid & ~before
        return Segments((starts.cumsum(0) - 1).clamp(min=0), self.valid.numel(), self.valid)

    def discounted_future(self, values: Tensor, discount: float) -> Tensor:
        """``F_t = sum of discount^(s - t) values_s`` over valid tokens ``s >= t`` of its sequence, ``[T]`` to ``[T]``.

        Distances count every position, left-out ones too. A scan by doubling: ``log2 T`` steps for any sequences.
        """
        total, reach = values.masked_fill(~self.valid, 0), 1
        while reach < total.shape[0]:
            same = self.ids[reach:] == self.ids[:-reach]
            ahead = torch.where(same, total[reach:], 0) * discount**reach
            total = torch.cat([total[:-reach] + ahead, total[-reach:]])
            reach *= 2
        return total.masked_fill(~self.valid, 0)
