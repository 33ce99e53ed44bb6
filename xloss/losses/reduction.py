"""How per-token losses become one number: ``loss_reduction``, as a weight per token that holds the denominator."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from xloss.distributed import TokenRanks
from xloss.errors import OptionError
from xloss.losses import calibration
from xloss.losses.model import BaseLossKwargs

Weights = Callable[[], list[Tensor]]
"""Weights of the tokens of each micro-batch. The first call makes every sum over ranks known that was asked for, so ask
for all of the step before."""
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
    ranks: TokenRanks,
    token_weights: Sequence[Tensor | None] | None = None,
) -> Weights:
    """Weight of each token of each micro-batch, float32, in the shape of its labels; 0 at ignored labels.

    ``token_weights`` multiply the weights, and count in the denominator of ``token``, ``sample`` and ``square``.
    The sums over ranks are asked for now, and waited for by the call of what is returned.
    """
    valid = [kwargs.shifted_labels != ignore_idx for kwargs in kwargs_list]
    name, factor = options.reduction, ranks.gradient_factor(options.grad_reduce)

    def of_sequences(kind: str) -> list[Tensor]:
        return [
            calibration.sequence_weights(v, k.cu_seq_lens, kind, repr(name))
            for v, k in zip(valid, kwargs_list, strict=True)
        ]

    def weighted(bare: list[Tensor]) -> list[Tensor]:
        if token_weights is None:
            return bare
        return [
            w if t is None else w * t.masked_fill(~v, 0) for w, t, v in zip(bare, token_weights, valid, strict=True)
        ]

    if name == "prompt":
        tokens, _ = calibration.group_counts(kwargs_list, ignore_idx, ranks, "loss_reduction='prompt'")
        return lambda: _prompt_weights(kwargs_list, valid, tokens.value(), factor, weighted)
    weights = weighted(of_sequences(name if name in ("sample", "square") else "token"))
    if name == "sum":
        return lambda: [weight * factor for weight in weights]
    if options.count_empty_sequences:
        total = calibration.num_sequences(kwargs_list, ranks)
    elif name in ("sample_sum", "sample_sum_norm"):
        total = ranks.sum([w.sum().round() for w in of_sequences("sample")])
    else:
        total = ranks.sum(weights)
    scale = factor / (options.norm_length or 1.0)
    return lambda: [weight * (scale / total.divisor()).to(weight.device) for weight in weights]


def attach_token_weights(
    kwargs_list: Sequence[Any],
    ignore_idx: int,
    options: ReductionOptions,
    cu_seq_lens_list: Sequence[Tensor] | None,
    ranks: TokenRanks,
) -> None:
    """Set ``loss_weight`` of every micro-batch, in place, from its ``token_weight`` and the reduction."""
    calibration.attach_cu_seq_lens(kwargs_list, cu_seq_lens_list)
    free = [kwargs.token_weight for kwargs in kwargs_list]
    weights = reduction_weights(kwargs_list, ignore_idx, options, ranks, free)
    for kwargs, weight in zip(kwargs_list, weights(), strict=True):
        kwargs.loss_weight = weight


def _prompt_weights(
    kwargs_list: Sequence[BaseLossKwargs],
    valid: Sequence[Tensor],
    counts: Tensor,
    factor: float,
    weighted: Callable[[list[Tensor]], list[Tensor]],
) -> list[Tensor]:
    """``1 / (n_g G)`` of each token's prompt group, from the valid tokens of each over the global batch."""
    num_groups = (counts > 0).sum().clamp(min=1)
    per_group = torch.cat([counts, counts.new_ones(1)]).clamp(min=1).to(torch.float32)  # one more: there may be none
    bare = []
    for kwargs, mask in zip(kwargs_list, valid, strict=True):
        ids: Tensor = kwargs.group_ids  # type: ignore[attr-defined]
        bare.append(mask / per_group[ids.to(torch.int64).masked_fill(~mask, 0)])
    return [weight * (factor / num_groups) for weight in weighted(bare)]
