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
from torch.distributed.device_mesh import DeviceMesh

from xloss import distributed
from xloss.errors import MissingFieldError, OptionError, ShapeError
from xloss.losses.model import BaseLossKwargs
from xloss.metrics import Metric
from xloss.packing import broadcast_segments, check_cu_seq_lens, rows_as_segments, segment_sum


def attach_cu_seq_lens(
    kwargs_list: Sequence[BaseLossKwargs], cu_seq_lens_list: Sequence[Tensor] | None, sp_mesh: DeviceMesh | None
) -> None:
    """Check the kwargs, and put each micro-batch's sequence bounds into its kwargs."""
    if cu_seq_lens_list is None or (sp_mesh is not None and sp_mesh.size() > 1):
        for kwargs in kwargs_list:  # a rank's part of a pack is checked against the whole pack, in sequence_weights
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


def sequence_weights(
    valid: Tensor, cu_seq_lens: Tensor | None, reduction: str, sp_mesh: DeviceMesh | None = None, asked: str = ""
) -> Tensor:
    """Weight of each token before the global division, in the shape of ``valid`` (bool, label not ignored).

    ``token``: 1. ``sample``: ``1 / n_i``. ``square``: ``1 / sqrt(n_i)``, with ``n_i`` valid tokens of the token's
    sequence: a packed one of ``cu_seq_lens``, else a row. Under sequence parallelism ``n_i`` counts all ranks' parts.
    """
    if reduction == "token":
        return valid.to(torch.float32)
    if reduction not in ("sample", "square"):
        raise OptionError(f"loss_reduction must be token, sample or square; got {reduction!r}")
    whole, bounds, counts = _token_counts(valid, cu_seq_lens, sp_mesh, f"loss_reduction={asked or repr(reduction)}")
    flat = whole.reshape(-1).to(torch.float32)
    per_token = broadcast_segments(counts.clamp(min=1), bounds, flat.numel())
    weights = flat / (per_token if reduction == "sample" else per_token.sqrt())
    weights = weights.reshape(whole.shape)
    if sp_mesh is not None and sp_mesh.size() > 1:
        return distributed.sp_split(weights, sp_mesh, 0.0)
    return weights


def _token_counts(
    valid: Tensor, cu_seq_lens: Tensor | None, sp_mesh: DeviceMesh | None, asked: str
) -> tuple[Tensor, Tensor, Tensor]:
    """``valid`` of all sequence-parallel ranks, the bounds of its sequences ``[N + 1]``, and how many tokens of each
    are valid ``[N]``, float32.
    """
    split = sp_mesh is not None and sp_mesh.size() > 1
    whole = distributed.sp_gather(valid.to(torch.int32), sp_mesh) if split and sp_mesh is not None else valid
    flat = whole.reshape(-1).to(torch.float32)
    if cu_seq_lens is None:
        if whole.ndim == 1 or whole.shape[0] == 1:
            raise MissingFieldError(
                f"{asked} needs cu_seq_lens_list for a pack of "
                f"shape {tuple(whole.shape)}: the bounds of its sequences, [0, {flat.numel()}] if it is one"
            )
        bounds = rows_as_segments(whole.shape, flat.device)
    else:
        bounds = cu_seq_lens.to(flat.device)
        if split:  # positions past the pack are padding
            check_cu_seq_lens(bounds, int(bounds[-1]))
            if int(bounds[-1]) > flat.numel():
                raise ShapeError(f"cu_seq_lens ends at {int(bounds[-1])}, past the {flat.numel()} tokens of all ranks")
            bounds = torch.cat([bounds, bounds.new_tensor([flat.numel()])])
    counts = segment_sum(flat, bounds)
    return whole, bounds, counts


def sequence_counts(
    kwargs_list: Sequence[BaseLossKwargs],
    valid: Sequence[Tensor],
    cu_seq_lens_list: Sequence[Tensor] | None,
    sp_mesh: DeviceMesh | None,
) -> list[dict[str, Metric]]:
    """``num_sequences`` of each micro-batch: those with a valid token; a pack whose bounds nobody gave is one.

    Of sequence-parallel ranks the first counts for all.
    """
    size = 1 if sp_mesh is None else sp_mesh.size()
    counting = sp_mesh is None or sp_mesh.get_local_rank() == 0
    found: list[dict[str, Metric]] = []
    for i, (kwargs, mask) in enumerate(zip(kwargs_list, valid, strict=True)):
        bounds = kwargs.cu_seq_lens if cu_seq_lens_list is None else cu_seq_lens_list[i]
        if bounds is None and (mask.ndim == 1 or mask.shape[0] == 1):
            bounds = torch.tensor([0, mask.numel() * size])
        counts = _token_counts(mask, bounds, sp_mesh, "num_sequences")[2]
        found.append({"num_sequences": Metric.total((counts > 0).to(counts.dtype) * counting)})
    return found


def check_whole_groups(kwargs_list: Sequence[BaseLossKwargs], ignore_idx: int) -> None:
    """Raise unless every prompt group (``group_ids``) has all its tokens in one micro-batch of one rank."""
    found = []
    for kwargs in kwargs_list:
        ids = getattr(kwargs, "group_ids", None)
        if ids is None:
            raise MissingFieldError("this loss compares the answers of a prompt and needs group_ids")
        found.append(ids[kwargs.shifted_labels != ignore_idx].to(torch.int64).unique())
    device = kwargs_list[0].shifted_labels.device
    if any(bool((ids < 0).any()) for ids in found):
        raise OptionError("group_ids must not be negative at tokens that count")
    most = distributed.all_reduce_max(max((int(i.max()) + 1 for i in found if i.numel()), default=0), device)
    homes = torch.zeros(most, device=device)
    for ids in found:
        homes.index_add_(0, ids, torch.ones_like(ids, dtype=homes.dtype))
    torn = (distributed.all_reduce_sum(homes) > 1).nonzero().flatten()
    if torn.numel():
        raise OptionError(
            "the answers of a prompt must be in one micro-batch of one rank; those of group_ids "
            f"{torn[:5].tolist()} are in several"
        )


def num_sequences(
    valid: Sequence[Tensor], bounds: Sequence[Tensor | None], sp_mesh: DeviceMesh | None = None
) -> Tensor:
    """Sequences of all micro-batches of all ranks, those without a valid token included; 0-d, at least 1."""
    local = 0
    for mask, cu_seq_lens in zip(valid, bounds, strict=True):
        if cu_seq_lens is not None:
            local += cu_seq_lens.numel() - 1
        else:
            local += 1 if mask.ndim == 1 else mask.shape[0]
    share = 1 if sp_mesh is None else sp_mesh.size()
    return global_sum([torch.full((), local / share, device=valid[0].device)]).round()


def global_sum(parts: Sequence[Tensor]) -> Tensor:
    """Sum of all elements of all micro-batches of all ranks, 0-d; 1 where it is 0, so that nothing divides by 0.

    One all-reduce per optimizer step, the same on every rank whatever its data.
    """
    total = torch.stack([p.sum(dtype=torch.float32) for p in parts]).sum()
    total = distributed.all_reduce_sum(total)
    return torch.where(total == 0, torch.ones_like(total), total)


def gradient_factor(grad_reduce: str) -> float:
    """What weights are multiplied by so that gradients come out right after the training engine reduced them.

    ``mean`` (DDP, FSDP): the world size. ``sum``: 1.
    """
    return float(distributed.world_size()) if grad_reduce == "mean" else 1.0
