"""Policy gradients masked where the sampled token's probability moved too far (DPPO, arXiv 2602.04879), ``[T]``.

``p = exp(logprobs)`` and ``q = exp(old_logprobs)`` are probabilities of the sampled token; everything else of the
vocabulary counts as one other outcome. Masks are constants.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xloss.policy.ratio import ratio_within

_OTHER_FLOOR = 1e-8  # probability added to "any other token", as verl: q and p may round to 1


def tv_keep(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    delta_low: float,
    delta_high: float,
    one_sided: bool = True,
) -> Tensor:
    """Bool mask: ``A > 0`` keeps ``p - q <= delta_high``, else ``p - q >= -delta_low`` is kept.

    ``one_sided=False`` asks both of every token (prime-rl's ``ipo``).
    """
    moved = (logprobs.exp() - old_logprobs.exp()).detach()
    below, above = moved >= -delta_low, moved <= delta_high
    return torch.where(advantages > 0, above, below) if one_sided else below & above


def binary_kl(logprobs: Tensor, old_logprobs: Tensor) -> Tensor:
    """``q log(q / p) + (1 - q) log((1 - q) / (1 - p))``, detached."""
    lp, old = logprobs.detach(), old_logprobs.detach()
    other, old_other = -torch.expm1(lp) + _OTHER_FLOOR, -torch.expm1(old) + _OTHER_FLOOR
    return old.exp() * (old - lp) - torch.expm1(old) * (old_other.log() - other.log())


def kl_keep(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, delta_low: float, delta_high: float
) -> Tensor:
    """Bool mask: the binary KL is within ``delta_high`` (``A > 0``) or ``delta_low``, or ``p`` moved the other way."""
    divergence = binary_kl(logprobs, old_logprobs)
    log_ratio = (logprobs - old_logprobs).detach()
    above = (divergence <= delta_high) | (log_ratio <= 0)
    below = (divergence <= delta_low) | (log_ratio >= 0)
    return torch.where(advantages > 0, above, below)


def masked_policy_gradient(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    keep: Tensor,
    *,
    ratio_cap: float | None = None,
    kl_tau: float = 0.0,
    log_ratio_clamp: float | None = None,
) -> Tensor:
    """``-A r keep + kl_tau d^2``, or with a cap ``-A sg(min(r, cap)) keep logprobs + kl_tau d^2``; ``d = log r``.

    The quadratic term has no 1/2 and acts on all tokens, kept or not (prime-rl). Up to the cap both forms have the same
    gradient; verl and SkyRL cap.
    """
    log_ratio = logprobs - old_logprobs
    ratio = ratio_within(log_ratio, log_ratio_clamp)
    gain = ratio if ratio_cap is None else ratio.detach().clamp(max=ratio_cap) * logprobs
    loss = -(advantages * gain).masked_fill(~keep, 0)
    return loss + kl_tau * log_ratio.square() if kl_tau else loss
