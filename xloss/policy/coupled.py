"""Policy losses that rank the tokens of a whole batch, and the decoupled loss of asynchronous training.

Vectors ``[T]`` in, ``[T]`` out, to minimise. ``valid`` marks the tokens of the loss; ``d = logprobs - old_logprobs``,
``r = exp(d)``. Choices are constants and cost no host sync: a rank is compared with a count that stays on the device.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xloss.packing import Segments
from xloss.policy import surrogate, weights


def covariance(logprobs: Tensor, advantages: Tensor, valid: Tensor) -> Tensor:
    """``(A - mean A) (logprobs - mean logprobs)``, means over valid tokens; 0 at others. A constant."""
    count = valid.sum().clamp(min=1)

    def centred(x: Tensor) -> Tensor:
        x = x.detach().masked_fill(~valid, 0)
        return (x - x.sum() / count).masked_fill(~valid, 0)

    return centred(advantages) * centred(logprobs)


def first_by(order: Tensor, candidates: Tensor, count: Tensor) -> Tensor:
    """Mask of the ``count`` (0-d) candidates with the lowest ``order [T]``; all of them where they are fewer."""
    last = torch.finfo(order.dtype).max if order.dtype.is_floating_point else torch.iinfo(order.dtype).max
    rank = order.masked_fill(~candidates, last).argsort(stable=True).argsort(stable=True)
    return candidates & (rank < count)


def share_of(valid: Tensor, ratio: float) -> Tensor:
    """``max(1, floor(ratio N))`` of N valid tokens, 0-d."""
    return (valid.sum().double() * ratio).floor().clamp(min=1)


def random_order(like: Tensor, seed: int) -> Tensor:
    """One reproducible pseudo-random int64 per token, from its position, ``seed`` and the values of ``like [T]``.

    Another batch gives another order, the same batch the same one, on any device (splitmix64 of Steele et al., 2014).
    """
    salt = like.detach().to(torch.float32).contiguous().view(torch.int32).to(torch.int64).sum()
    x = (torch.arange(1, like.numel() + 1, device=like.device) + salt + seed) * _signed(0x9E3779B97F4A7C15)
    x = (x ^ (x >> 30)) * _signed(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> 27)) * _signed(0x94D049BB133111EB)
    return x ^ (x >> 31)


def clip_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    valid: Tensor,
    *,
    cliprange_low: float,
    cliprange_high: float,
    clip_cov_ratio: float,
    clip_cov_lb: float,
    clip_cov_ub: float,
    seed: int,
) -> Tensor:
    """PPO clip; then 0 at some of the tokens that it does not clip and whose covariance is in ``(lb, ub)``.

    ``max(1, floor(clip_cov_ratio N))`` of them, chosen at random (arXiv 2505.22617; verl ``clip_cov``).
    """
    loss = surrogate.ppo_clip(
        logprobs, old_logprobs, advantages, cliprange_low=cliprange_low, cliprange_high=cliprange_high
    )
    clipped = loss.detach() > surrogate.importance_sampling(logprobs, old_logprobs, advantages).detach()
    cov = covariance(logprobs, advantages, valid)
    candidates = valid & ~clipped & (cov > clip_cov_lb) & (cov < clip_cov_ub)
    order = random_order(advantages.masked_fill(~valid, 0), seed)
    return loss.masked_fill(first_by(order, candidates, share_of(valid, clip_cov_ratio)), 0)


def kl_cov(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    valid: Tensor,
    *,
    kl_cov_ratio: float,
    ppo_kl_coef: float,
) -> Tensor:
    """``-r A``, and ``+ ppo_kl_coef |d|`` at the ``max(1, floor(kl_cov_ratio N))`` tokens of highest covariance.

    arXiv 2505.22617; verl ``kl_cov``.
    """
    highest = first_by(-covariance(logprobs, advantages, valid), valid, share_of(valid, kl_cov_ratio))
    penalty = ppo_kl_coef * (logprobs - old_logprobs).abs()
    return surrogate.importance_sampling(logprobs, old_logprobs, advantages) + penalty.masked_fill(~highest, 0)


def second_moment_mask(log_ratio: Tensor, considered: Tensor, threshold: float) -> Tensor:
    """Mask of ``considered`` tokens left when the largest ``d^2`` go until the mean of the rest is below ``threshold``.

    At least the smallest stays (M2PO, arXiv 2510.01161).
    """
    squares = log_ratio.detach().masked_fill(~considered, 0).square()
    ascending, order = squares.masked_fill(~considered, torch.inf).sort(stable=True)
    counts = torch.arange(1, squares.numel() + 1, device=squares.device, dtype=squares.dtype)
    whole = Segments(torch.zeros_like(order), 1, torch.ones_like(considered))  # cumsum's bits vary on CUDA
    sums = whole.discounted_future(ascending.masked_fill(ascending.isinf(), 0).flip(0), 1.0).flip(0)
    fits = sums / counts < threshold
    fits[:1] = True
    return torch.zeros_like(considered).scatter(0, order, fits) & considered


def m2po(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    valid: Tensor,
    *,
    m2_threshold: float,
    trust_region_only: bool,
    cliprange_low: float | None = None,
    cliprange_high: float | None = None,
    moment_log_ratio: Tensor | None = None,
) -> Tensor:
    """``-r A`` (with clip ranges: the PPO clip) where the second-moment mask lets it, else 0.

    Args:
        trust_region_only: only tokens that the ratio has already moved the way of their advantage (``A d > 0``) can be
            masked or count in the mean; else all.
        moment_log_ratio: constant whose squares are taken in place of ``d`` (AReaL: ``old - rollout``).
    """
    moment = (logprobs - old_logprobs).detach() if moment_log_ratio is None else moment_log_ratio
    considered = valid & (advantages * moment > 0) if trust_region_only else valid
    masked = considered & ~second_moment_mask(moment, considered, m2_threshold)
    if cliprange_low is None or cliprange_high is None:
        loss = surrogate.importance_sampling(logprobs, old_logprobs, advantages)
    else:
        loss = surrogate.ppo_clip(
            logprobs, old_logprobs, advantages, cliprange_low=cliprange_low, cliprange_high=cliprange_high
        )
    return loss.masked_fill(masked, 0)


def decoupled_ppo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    rollout_logprobs: Tensor,
    advantages: Tensor,
    *,
    cliprange_low: float,
    cliprange_high: float,
    clip_ratio_c: float | None,
    behave_low: float | None,
    behave_high: float | None,
    behave_mask: bool,
) -> Tensor:
    """PPO clip around the proximal policy (``old``), times ``w = exp(old - rollout)`` of the behaviour policy.

    ``w`` is a constant; out of its bounds it is 0 (``behave_mask``) or clamped (AReaL, arXiv 2505.24298).
    """
    weight = weights.importance_weight(old_logprobs - rollout_logprobs, "token")
    if behave_mask:
        weight = weight.masked_fill(~weights.within(weight, behave_low, behave_high), 0)
    elif behave_low is not None or behave_high is not None:
        weight = weight.clamp(behave_low, behave_high)
    loss = surrogate.ppo_clip(
        logprobs,
        old_logprobs,
        advantages,
        cliprange_low=cliprange_low,
        cliprange_high=cliprange_high,
        clip_ratio_c=clip_ratio_c,
    )
    return loss * weight


def _signed(x: int) -> int:
    """The int64 with the bits of an unsigned 64-bit number."""
    return x - (1 << 64) if x >= 1 << 63 else x
