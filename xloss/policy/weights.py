"""Weights and masks that correct the sampler against the trainer, from ``x = log p_trainer - log p_sampler``.

All are constants of the loss: give detached ``x``. Vectors ``[T]``; ``sequences`` says which tokens are valid and which
form a sequence, and what stands at other tokens changes nothing.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from xloss.packing import Segments
from xloss.policy.kl import kl_estimate
from xloss.policy.ratio import clamped_ratio

Level = Literal["token", "sequence", "geometric"]
Estimator = Literal["k1", "k2", "k3"]
Over = Literal["token", "sum", "mean", "max"]
LOG_RATIO_LIMIT = 20.0  # of every exponent here, as verl and XTuner


def level_log_ratio(log_ratio: Tensor, level: Level, sequences: Segments | None = None) -> Tensor:
    """``x`` of each token (``token``), or its sum (``sequence``) or mean (``geometric``) over the token's sequence."""
    if level == "token":
        return log_ratio
    assert sequences is not None
    return sequences.spread(sequences.sum(log_ratio) if level == "sequence" else sequences.mean(log_ratio))


def importance_weight(log_ratio: Tensor, level: Level, sequences: Segments | None = None) -> Tensor:
    """``exp(clamp(x at that level, +-20))``: the probability ratio of trainer to sampler, not yet bounded.

    ``token``: TIS (https://fengyao.notion.site/off-policy-rl). ``sequence``: the unbiased product. ``geometric``: its
    T-th root.
    """
    return clamped_ratio(level_log_ratio(log_ratio, level, sequences), -LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)


def within(values: Tensor, low: float | None, high: float | None) -> Tensor:
    """Mask of ``low <= values <= high``; ``None`` leaves that side open, NaN is never within."""
    inside = ~values.isnan()
    if low is not None:
        inside = inside & (values >= low)
    return inside if high is None else inside & (values <= high)


def divergence(log_ratio: Tensor, estimator: Estimator) -> Tensor:
    """Estimate of KL(sampler, trainer) by each of the sampler's tokens, ``x`` clamped to +-20.

    ``k1``: ``-x``; ``k2``: ``x^2 / 2``; ``k3``: ``exp(x) - x - 1``.
    """
    return kl_estimate(-log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT), estimator)


def rejection_statistic(
    log_ratio: Tensor, estimator: Estimator, over: Over, sequences: Segments | None = None
) -> Tensor:
    """What rejection sampling compares with its bounds (verl ``rollout_rs``).

    The divergence of each token, or its sum, mean or maximum over the token's sequence.
    """
    per_token = divergence(log_ratio, estimator)
    if over == "token":
        return per_token
    assert sequences is not None
    reduced = {"sum": sequences.sum, "mean": sequences.mean, "max": sequences.max}[over](per_token)
    return sequences.spread(reduced)


def without_outliers(log_ratio: Tensor, low: float | None, high: float | None, sequences: Segments) -> Tensor:
    """Mask of the tokens of sequences all of whose valid tokens have ``low <= exp(x) <= high`` (the veto)."""
    outlier = ~within(torch.exp(log_ratio), low, high)
    return sequences.spread(sequences.sum(outlier.to(log_ratio.dtype))) == 0
