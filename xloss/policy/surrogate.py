"""Policy-gradient surrogates, one function a loss. All return per-token losses ``[T]`` to minimise.

``logprobs`` carries the gradient; ``old_logprobs`` and ``advantages`` are constants.
``r = exp(logprobs - old_logprobs)``.
Formulas and their gradients with respect to ``logprobs`` are in ``docs/losses/``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xloss.policy.ratio import clamped_ratio


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    cliprange_low: float,
    cliprange_high: float,
    clip_ratio_c: float | None = None,
    log_prob_diff_min: float | None = None,
    log_prob_diff_max: float | None = None,
) -> Tensor:
    """``max(-r A, -clip(r, 1 - low, 1 + high) A)``; with ``clip_ratio_c`` also ``min(., -c A)`` where ``A < 0``.

    Clip ranges are offsets from 1. Sources: PPO (arXiv 1707.06347), asymmetric clip of DAPO (2503.14476), dual clip
    (1912.09729), log-ratio clamp as in XTuner and verl.
    """
    ratio = clamped_ratio(logprobs - old_logprobs, log_prob_diff_min, log_prob_diff_max)
    clipped = torch.clamp(ratio, 1 - cliprange_low, 1 + cliprange_high)
    loss = torch.maximum(-ratio * advantages, -clipped * advantages)
    if clip_ratio_c is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(-clip_ratio_c * advantages, loss), loss)


def cispo(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_low_threshold: float, clip_high_threshold: float
) -> Tensor:
    """``-sg(clip(r, low, high)) A logprobs`` with absolute thresholds (MiniMax-M1, arXiv 2506.13585)."""
    weight = clamped_ratio((logprobs - old_logprobs).detach()).clamp(clip_low_threshold, clip_high_threshold)
    return -weight * advantages * logprobs


def importance_sampling(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
    """``-r A``, unclipped (Tinker ``importance_sampling``)."""
    return -clamped_ratio(logprobs - old_logprobs) * advantages


def dro(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    """``-(A logprobs - beta/2 (logprobs - old)^2)`` (DRO, arXiv 2405.19107; Tinker ``dro``)."""
    return -(advantages * logprobs - 0.5 * beta * (logprobs - old_logprobs).square())


def reinforce(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """``-A logprobs`` (Williams 1992)."""
    return -advantages * logprobs
