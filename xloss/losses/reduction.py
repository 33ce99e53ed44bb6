"""How per-token losses become one number: ``loss_reduction``, as a weight per token that holds the denominator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss import distributed
from xloss.errors import MissingFieldError, OptionError
from xloss.losses import calibration
from xloss.losses.model import BaseLossKwargs

Reduction = Literal["token", "sample", "square", "sample_sum", "sample_sum_norm", "prompt", "sum"]


@dataclass(frozen=True)
class ReductionOptions:
    """With ``n_i`` valid tokens in the token's sequence, ``n_g`` in its prompt group, all over the global batch:

    - ``token``: ``1 / sum n_i``, the mean over tokens (DAPO)
    - ``sample``: ``1 / (n_i N)``, the mean over the N sequences of their token means (GRPO)
    - ``square``: ``n_i^-1/2 / sum n_i^1/2`` (XTuner)
    - ``sample_sum``: ``1 / N``, the mean over sequences of their token sums
    - ``sample_sum_norm``: ``1 / (N norm_length)`` (Dr. GRPO)
    - ``prompt``: ``1 / (n_g G)``, the mean over the G prompt groups of their token means
    - ``sum``: 1 (Tinker)

    Args:
        norm_length: the constant of ``sample_sum_norm``.
        count_empty_sequences: whether N counts sequences without a valid token (TRL).
    """

    reduction: Reduction = "token"
    norm_length: float | None = None
    count_empty_sequences: bool = False
    grad_reduce: str = "mean"

    def __post_init__(self) -> None:
        if self.reduction not in get_args(Reduction):
            raise OptionError(f"loss_reduction must be one of {get_args(Reduction)}; got {self.reduction!r}")
        if (self.norm_length is not None) != (self.reduction == "sample_sum_norm"):
            raise OptionError(
                "norm_length is the constant of loss_reduction='sample_sum_norm', which needs it, and of no other; "
                f"got norm_length={self.norm_length} with loss_reduction={self.reduction!r}"
            )
        if self.count_empty_sequences and not self.reduction.startswith("sample"):
            raise OptionError(
                "count_empty_sequences=True is for loss_reduction sample, sample_sum and sample_sum_norm, which count "
                f"sequences; got loss_reduction={self.reduction!r}"
            )


def reduction_weights(
    kwargs_list: Sequence[BaseLossKwargs],
    ignore_idx: int,
    options: ReductionOptions,
    cu_seq_lens_list: Sequence[Tensor] | None,
    sp_mesh: DeviceMesh | None,
    token_weights: Sequence[Tensor | None] | None = None,
) -> list[Tensor]:
    """Weight of each token of each micro-batch, float32, in the shape of its labels; 0 at ignored labels.

    ``token_weights`` multiply the weights, and count in the denominator of ``token``, ``sample`` and ``square``.
    """
    valid = [kwargs.shifted_labels != ignore_idx for kwargs in kwargs_list]
    bounds = [k.cu_seq_lens if cu_seq_lens_list is None else cu_seq_lens_list[i] for i, k in enumerate(kwargs_list)]
    name = options.reduction

    def of_sequences(kind: str) -> list[Tensor]:
        return [
            calibration.sequence_weights(v, b, kind, sp_mesh, repr(name)) for v, b in zip(valid, bounds, strict=True)
        ]

    if name == "prompt":
        weights = _prompt_weights(kwargs_list, valid)
    else:
        weights = of_sequences(name if name in ("sample", "square") else "token")
    bare = weights
    if token_weights is not None:
        weights = [
            w if t is None else w * t.masked_fill(~v, 0) for w, t, v in zip(weights, token_weights, valid, strict=True)
        ]
    if name == "sum":
        total = torch.ones((), device=valid[0].device)
    elif name in ("sample_sum", "sample_sum_norm") or options.count_empty_sequences:
        if options.count_empty_sequences:
            total = calibration.num_sequences(valid, bounds, sp_mesh)
        else:
            total = calibration.global_sum(of_sequences("sample")).round()
        total = total * (options.norm_length or 1.0)
    else:
        total = calibration.global_sum(bare if name == "prompt" else weights)
    factor = calibration.gradient_factor(options.grad_reduce) / total
    return [weight * factor for weight in weights]


def attach_token_weights(
    kwargs_list: Sequence[Any],
    ignore_idx: int,
    options: ReductionOptions,
    cu_seq_lens_list: Sequence[Tensor] | None,
    sp_mesh: DeviceMesh | None,
) -> None:
    """Set ``loss_weight`` of every micro-batch, in place, from its ``token_weight`` and the reduction."""
    if not kwargs_list:
        return
    calibration.attach_cu_seq_lens(kwargs_list, cu_seq_lens_list, sp_mesh)
    free = [kwargs.token_weight for kwargs in kwargs_list]
    weights = reduction_weights(kwargs_list, ignore_idx, options, cu_seq_lens_list, sp_mesh, free)
    for kwargs, weight in zip(kwargs_list, weights, strict=True):
        kwargs.loss_weight = weight


def _prompt_weights(kwargs_list: Sequence[BaseLossKwargs], valid: Sequence[Tensor]) -> list[Tensor]:
    """``1 / n_g`` of each token's prompt group, counted over all micro-batches and ranks."""
    groups = []
    for kwargs in kwargs_list:
        ids = getattr(kwargs, "group_ids", None)
        if ids is None:
            raise MissingFieldError(
                "loss_reduction='prompt' needs group_ids, the number of each token's prompt, the same on all ranks"
            )
        groups.append(ids.to(torch.int64))
    live = [ids[mask] for ids, mask in zip(groups, valid, strict=True)]
    if any(bool((ids < 0).any()) for ids in live):
        raise OptionError("group_ids must not be negative at tokens that count")
    most = max((int(ids.max()) + 1 for ids in live if ids.numel()), default=0)
    most = distributed.all_reduce_max(most, groups[0].device)
    counts = torch.zeros(max(most, 1), device=groups[0].device)
    for ids in live:
        counts.index_add_(0, ids, torch.ones_like(ids, dtype=counts.dtype))
    counts = distributed.all_reduce_sum(counts).clamp(min=1)
    return [mask / counts[ids.masked_fill(~mask, 0)] for ids, mask in zip(groups, valid, strict=True)]
