"""A loss that couples tokens, on kwargs of all of them; under sequence parallelism every rank evaluates the whole."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xloss.distributed import GatherParts
from xloss.errors import OptionError
from xloss.head.options import LiveRows
from xloss.losses.model import BaseLossKwargs, PerToken
from xloss.losses.split import Split
from xloss.packing import rows_as_segments
from xloss.stats import TokenStats

if TYPE_CHECKING:
    from xloss.losses.base import BaseLossContext

Evaluate = Callable[[TokenStats, BaseLossKwargs], Tensor]


def all_tokens(kwargs: BaseLossKwargs, lead: torch.Size, rows: LiveRows, ignore_idx: int) -> BaseLossKwargs:
    """Flat kwargs of all rows, 0 where a row is left out: what stands there must not matter, be it NaN.

    The rows of a padded batch, of shape ``lead``, become its ``cu_seq_lens``.
    """
    index = rows.index
    if kwargs.cu_seq_lens is None and len(lead) == 2 and lead[0] != 1:
        kwargs = kwargs.replaced({"cu_seq_lens": rows_as_segments(lead, kwargs.shifted_labels.device)})
    if index is None:
        return kwargs
    keep = torch.zeros(rows.total, dtype=torch.bool, device=index.device).index_fill(0, index, True)

    def clean(x: Tensor, mark: PerToken) -> Tensor:
        if not x.dtype.is_floating_point:
            return x.masked_fill(~keep, ignore_idx) if x is kwargs.shifted_labels else x
        return x.masked_fill(~keep if x.ndim == 1 else ~keep.unsqueeze(1), mark.pad)

    return kwargs.map_tokens(clean)


def loss_of_split(
    ctx: BaseLossContext[Any], split: Split, stats: TokenStats, evaluate: Evaluate
) -> tuple[Tensor, Tensor | None]:
    """This rank's share of the loss of the whole batch, and losses ``[T]`` of its tokens where it is a sum over them.

    One all-gather of the statistics, the same on every rank. Shares add up to the loss. The gradient is of the whole
    loss by this rank's statistics, so gradients of the ranks add up too. A scalar loss is shared out evenly.
    """
    if changed := split.changed(ctx.loss_kwargs):
        raise OptionError(
            f"{changed} of a batch split over sequence-parallel ranks were set after it was calibrated, and this loss "
            f"reads the whole ({ctx.why_coupled()}): set them before build_batches_loss_kwargs or build_batches"
        )
    whole = ctx.whole()
    flat = whole.loss_kwargs.flat(stats.lse.dtype)
    lead = whole.loss_kwargs.shifted_labels.shape
    loss = evaluate(
        gather_stats(stats, split, ctx.loss_kwargs.shifted_labels.shape),
        all_tokens(flat, lead, whole.live_rows(), ctx.loss_cfg.ignore_idx),
    )
    if loss.ndim == 0:
        return _Share.apply(loss, loss.detach() / split.sp_mesh.size()), None
    own = split.part_of(loss.detach())
    return _Share.apply(loss.sum(), own.sum()), own


def gather_stats(stats: TokenStats, split: Split, lead: torch.Size) -> TokenStats:
    """Statistics of the whole batch from those of this rank's part, whose tokens have the shape ``lead``."""
    present = {name: x for name, x in (*stats.differentiable(), ("top1", stats.top1)) if x is not None}
    dtype = stats.lse.dtype  # holds vocabulary ids too: they are below 2^24
    rows = [x.reshape(x.shape[0], -1).T.reshape(-1, *lead).to(dtype) for x in present.values()]
    whole = GatherParts.apply(torch.cat(rows), split.own, split.inverse, split.sp_mesh).flatten(1)
    parts = whole.split([len(row) for row in rows])
    found = {
        name: (part.T if x.ndim > 1 else part[0]).to(x.dtype)
        for (name, x), part in zip(present.items(), parts, strict=True)
    }
    return TokenStats(**found)


class _Share(torch.autograd.Function):
    """The value ``share``, with the gradient of ``whole``."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, share: Tensor) -> Tensor:
        return share.clone()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None
