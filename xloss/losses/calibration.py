"""Global calibration: weights that already hold the denominator of the whole global batch.

The loss and its gradient must not depend on how one global batch is cut into micro-batches, packs and ranks. So the
weight of each token is divided, once per optimizer step, by a sum over all micro-batches of all ranks that hold
distinct tokens; after that, losses of any cut add up to the same number. ``docs/calibration.md`` works an example with
two ranks.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xloss.distributed import RankSum, TokenRanks
from xloss.errors import MissingFieldError, OptionError, ShapeError
from xloss.losses.model import BaseLossKwargs
from xloss.metrics import Metric
from xloss.packing import broadcast_segments, check_cu_seq_lens, rows_as_segments, segment_sum


def attach_cu_seq_lens(kwargs_list: Sequence[BaseLossKwargs], cu_seq_lens_list: Sequence[Tensor] | None) -> None:
    """Check the kwargs, and put each micro-batch's sequence bounds into its kwargs."""
    if cu_seq_lens_list is None:
        for kwargs in kwargs_list:
            kwargs.check()
        return
    if len(cu_seq_lens_list) != len(kwargs_list):
        raise ShapeError(f"cu_seq_lens_list has {len(cu_seq_lens_list)} entries for {len(kwargs_list)} micro-batches")
    moved = [b.to(k.shifted_labels.device) for b, k in zip(cu_seq_lens_list, kwargs_list, strict=True)]
    for kwargs, bounds in zip(kwargs_list, moved, strict=True):
        kwargs.replaced({"cu_seq_lens": bounds}).check()
        check_cu_seq_lens(bounds, kwargs.shifted_labels.numel())  # on CUDA too: building a batch may wait
    for kwargs, bounds in zip(kwargs_list, moved, strict=True):
        kwargs.cu_seq_lens = bounds


def sequence_weights(valid: Tensor, cu_seq_lens: Tensor | None, reduction: str, asked: str = "") -> Tensor:
    """Weight of each token before the global division, in the shape of ``valid`` (bool, label not ignored).

    ``token``: 1. ``sample``: ``1 / n_i``. ``square``: ``1 / sqrt(n_i)``, with ``n_i`` valid tokens of the token's
    sequence: a packed one of ``cu_seq_lens``, else a row.
    """
    if reduction == "token":
        return valid.to(torch.float32)
    if reduction not in ("sample", "square"):
        raise OptionError(f"loss_reduction must be token, sample or square; got {reduction!r}")
    bounds, counts = _token_counts(valid, cu_seq_lens, f"loss_reduction={asked or repr(reduction)}")
    flat = valid.reshape(-1).to(torch.float32)
    per_token = broadcast_segments(counts.clamp(min=1), bounds, flat.numel())
    weights = flat / (per_token if reduction == "sample" else per_token.sqrt())
    return weights.reshape(valid.shape)


def _token_counts(valid: Tensor, cu_seq_lens: Tensor | None, asked: str) -> tuple[Tensor, Tensor]:
    """Bounds of the sequences ``[N + 1]``, and how many tokens of each are valid ``[N]``, float32."""
    if cu_seq_lens is None:
        if valid.ndim == 1 or valid.shape[0] == 1:
            raise MissingFieldError(
                f"{asked} needs cu_seq_lens_list for a pack of "
                f"shape {tuple(valid.shape)}: the bounds of its sequences, [0, {valid.numel()}] if it is one"
            )
        cu_seq_lens = rows_as_segments(valid.shape, valid.device)
    bounds = cu_seq_lens.to(valid.device)
    return bounds, segment_sum(valid.reshape(-1).to(torch.float32), bounds)


def sequence_counts(kwargs_list: Sequence[BaseLossKwargs], valid: Sequence[Tensor]) -> list[dict[str, Metric]]:
    """``num_sequences`` of each micro-batch: those with a valid token; a pack whose bounds nobody gave is one."""
    found: list[dict[str, Metric]] = []
    for kwargs, mask in zip(kwargs_list, valid, strict=True):
        bounds = kwargs.cu_seq_lens
        if bounds is None and (mask.ndim == 1 or mask.shape[0] == 1):
            bounds = torch.tensor([0, mask.numel()])
        counts = _token_counts(mask, bounds, "num_sequences")[1]
        found.append({"num_sequences": Metric.total((counts > 0).to(counts.dtype))})
    return found


def group_counts(
    kwargs_list: Sequence[BaseLossKwargs], ignore_idx: int, ranks: TokenRanks, asked: str
) -> tuple[RankSum, RankSum]:
    """Valid tokens of each prompt group (``group_ids``) over all micro-batches and ranks, and how many micro-batches
    have some of them; ``[number of groups]`` each.
    """
    found = []
    for kwargs in kwargs_list:
        ids = getattr(kwargs, "group_ids", None)
        if ids is None:
            raise MissingFieldError(f"{asked} needs group_ids, the number of each token's prompt on all ranks")
        found.append(ids[kwargs.shifted_labels != ignore_idx].to(torch.int64))
    if any(bool((ids < 0).any()) for ids in found):
        raise OptionError("group_ids must not be negative at tokens that count")
    most = ranks.max(max((int(ids.max()) + 1 for ids in found if ids.numel()), default=0))
    device = found[0].device if found else None
    tokens, homes = (torch.zeros(most, device=device) for _ in range(2))
    for ids in found:
        here = torch.zeros(most, device=device).index_add_(0, ids, torch.ones_like(ids, dtype=homes.dtype))
        tokens += here
        homes += here > 0
    return ranks.add(tokens), ranks.add(homes)


def check_whole_groups(homes: RankSum) -> None:
    """Raise unless every prompt group has all its tokens in one micro-batch of one rank."""
    torn = (homes.value() > 1).nonzero().flatten()
    if torn.numel():
        raise OptionError(
            "the answers of a prompt must be in one micro-batch of one rank; those of group_ids "
            f"{torn[:5].tolist()} are in several"
        )


def num_sequences(kwargs_list: Sequence[BaseLossKwargs], ranks: TokenRanks) -> RankSum:
    """Sequences of all micro-batches of all ranks, those without a valid token included."""
    local = 0
    for kwargs in kwargs_list:
        labels, bounds = kwargs.shifted_labels, kwargs.cu_seq_lens
        rows = 1 if labels.ndim == 1 else labels.shape[0]
        local += rows if bounds is None else bounds.numel() - 1
    return ranks.sum([torch.tensor(local)])
