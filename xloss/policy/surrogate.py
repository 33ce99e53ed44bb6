"""Policy-gradient surrogates, one function a loss. All return per-token losses ``[T]`` to minimise.

``logprobs`` carries the gradient; ``old_logprobs`` and ``advantages`` are constants.
``r = exp(logprobs - old_logprobs)``.
Formulas and their gradients with respect to ``logprobs`` are in ``docs/losses/``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xloss.policy.ratio import clamped_ratio, ratio_within


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    cliprange_low: float,
    cliprange_high: float,
    clip_ratio_c: float | None = None,
    delta: float | None = None,
    log_prob_diff_min: float | None = None,
    log_prob_diff_max: float | None = None,
) -> Tensor:
    """``max(-r A, -clip(r, 1 - low, 1 + high) A)``; with ``clip_ratio_c`` also ``min(., -c A)`` where ``A < 0``.

    ``delta`` puts ``min(r, delta)`` in the place of the unclipped ``r``. Clip ranges are offsets from 1. Sources: PPO
    (arXiv 1707.06347), asymmetric clip of DAPO (2503.14476), dual clip (1912.09729), two-sided clip of INTELLECT-2
    (2505.07291; TRL ``delta``), log-ratio clamp as in XTuner and verl.
    """
    ratio = clamped_ratio(logprobs - old_logprobs, log_prob_diff_min, log_prob_diff_max)
    clipped = torch.clamp(ratio, 1 - cliprange_low, 1 + cliprange_high)
    free = ratio if delta is None else torch.clamp(ratio, max=delta)
    loss = torch.maximum(-free * advantages, -clipped * advantages)
    if clip_ratio_c is None:
        return loss
    return torch.where(advantages < 0, torch.minimum(-clip_ratio_c * advantages, loss), loss)


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low_threshold: float,
    clip_high_threshold: float,
    unified_mask: bool = False,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """``-sg(clip(r, low, high)) A logprobs`` with absolute thresholds (MiniMax-M1, arXiv 2506.13585).

    ``unified_mask`` drops the tokens that PPO would clip, as the paper's unified formula: ``A > 0`` and ``r > high``,
    or ``A < 0`` and ``r < low``. With thresholds 0 and 1 this is truncated importance sampling (ROLL ``tis``).
    """
    ratio = ratio_within((logprobs - old_logprobs).detach(), log_ratio_clamp)
    weight = ratio.clamp(clip_low_threshold, clip_high_threshold)
    if unified_mask:
        dropped = ((advantages > 0) & (ratio > clip_high_threshold)) | ((advantages < 0) & (ratio < clip_low_threshold))
        weight = weight.masked_fill(dropped, 0)
    return -weight * advantages * logprobs


def rollout_is(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_low_threshold: float,
    clip_high_threshold: float,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """``-sg(r [low < r < high]) A logprobs``: a token whose ratio is out of bounds is dropped (GLM-5, arXiv 2602.15763;
    SkyRL ``rollout_is``)."""
    ratio = ratio_within((logprobs - old_logprobs).detach(), log_ratio_clamp)
    inside = (ratio > clip_low_threshold) & (ratio < clip_high_threshold)
    return -ratio.masked_fill(~inside, 0) * advantages * logprobs


def topr(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    positive_weight: float,
    negative_weight: float,
    advantage_threshold: float,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """``-w+ A logprobs`` where ``A`` is above the threshold, else ``-w- sg(clip(r, 0, 1)) A logprobs`` (tapered
    off-policy REINFORCE, arXiv 2503.14286)."""
    taper = ratio_within((logprobs - old_logprobs).detach(), log_ratio_clamp).clamp(0, 1)
    weight = torch.where(advantages > advantage_threshold, positive_weight, negative_weight * taper)
    return -weight * advantages * logprobs


def sapo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    tau_pos: float,
    tau_neg: float,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """``-(4 / tau) sigmoid(tau (r - 1)) A``, ``tau`` by the sign of ``A``; ``A <= 0`` takes ``tau_neg`` (arXiv
    2511.20347)."""
    ratio = ratio_within(logprobs - old_logprobs, log_ratio_clamp)
    tau = torch.full_like(ratio, tau_neg).masked_fill(advantages > 0, tau_pos)
    return -4 / tau * torch.sigmoid(tau * (ratio - 1)) * advantages


def importance_sampling(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, log_ratio_clamp: float | None = None
) -> Tensor:
    """``-r A``, unclipped (Tinker ``importance_sampling``)."""
    return -ratio_within(logprobs - old_logprobs, log_ratio_clamp) * advantages


def dro(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, beta: float) -> Tensor:
    """``-(A logprobs - beta/2 (logprobs - old)^2)`` (DRO, arXiv 2405.19107; Tinker ``dro``).

    Kimi k1.5's mirror descent (2501.12599) is the same formula, its ``tau`` the ``beta``.
    """
    return -(advantages * logprobs - 0.5 * beta * (logprobs - old_logprobs).square())


def reinforce(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """``-A logprobs`` (Williams 1992)."""
    return -advantages * logprobs
