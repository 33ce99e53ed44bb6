"""Preference losses on vectors with one entry per pair ``[P]``, or per sequence ``[N]``; all to minimise.

Vocabulary: ``chosen`` and ``rejected`` are log-ratios ``log pi(y) - log ref(y)`` of whole sequences (or their means per
token, or their images under an f-divergence, see ``divergence_score``), ``delta`` their difference. Without a
reference they are log-probs. All are safe at margins of +-1e4 and beyond. Gradients are in
``docs/losses/preference.md``.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

Divergence = Literal["reverse_kl", "forward_kl", "js", "alpha"]
_MAX_EXPONENT = 80.0  # exp stays finite in float32, as TRL clamps it; the gradient is 0 beyond


def logistic(margin: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """``-(1 - eps) log sigma(margin) - eps log sigma(-margin)``: DPO (arXiv 2305.18290), with ``eps`` conservative
    DPO (Mitchell, 2023). ``margin`` is ``beta delta``, or ``beta delta - gamma`` in SimPO (2405.14734)."""
    loss = -F.logsigmoid(margin)
    if label_smoothing:
        loss = (1 - label_smoothing) * loss - label_smoothing * F.logsigmoid(-margin)
    return loss


def robust(margin: Tensor, label_smoothing: float) -> Tensor:
    """``(-(1 - eps) log sigma(margin) + eps log sigma(-margin)) / (1 - 2 eps)``: unbiased when a share ``eps < 1/2`` of
    the labels is flipped (arXiv 2403.00409)."""
    flipped = label_smoothing * F.logsigmoid(-margin)
    return (flipped - (1 - label_smoothing) * F.logsigmoid(margin)) / (1 - 2 * label_smoothing)


def hinge(margin: Tensor) -> Tensor:
    """``max(0, 1 - margin)`` (SLiC, arXiv 2305.10425; RSO, 2309.06657)."""
    return torch.relu(1 - margin)


def ipo(delta: Tensor, beta: float) -> Tensor:
    """``(delta - 1 / (2 beta))^2`` (IPO, arXiv 2310.12036)."""
    return (delta - 1 / (2 * beta)).square()


def exo_pair(margin: Tensor, label_smoothing: float) -> Tensor:
    """``KL((q, 1 - q) || (1 - eps, eps))``, ``q = sigma(margin)``, ``0 < eps < 1`` (EXO, arXiv 2402.00856, eq. 16)."""
    smooth = margin.new_tensor(label_smoothing)
    chosen = torch.sigmoid(margin) * (F.logsigmoid(margin) - torch.log1p(-smooth))
    return chosen + torch.sigmoid(-margin) * (F.logsigmoid(-margin) - torch.log(smooth))


def nca_pair(chosen_reward: Tensor, rejected_reward: Tensor) -> Tensor:
    """``-log sigma(r_w) - log sigma(-r_w) / 2 - log sigma(-r_l) / 2``, ``r`` times ``beta`` (NCA, arXiv 2402.05369)."""
    both = F.logsigmoid(-chosen_reward) + F.logsigmoid(-rejected_reward)
    return -F.logsigmoid(chosen_reward) - 0.5 * both


def bco(reward: Tensor, shift: Tensor | float, desirable: bool) -> Tensor:
    """``-log sigma(r - shift)`` of desirable sequences, ``-log sigma(shift - r)`` of others (BCO, arXiv 2404.04656)."""
    return -F.logsigmoid(reward - shift if desirable else shift - reward)


def sppo_hard(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """``(chosen - 1 / (2 beta))^2 + (rejected + 1 / (2 beta))^2`` (SPPO, arXiv 2405.00675, eq. 4.7, P = 1, 0)."""
    return (chosen - 0.5 / beta).square() + (rejected + 0.5 / beta).square()


def apo_down(chosen_reward: Tensor, margin: Tensor) -> Tensor:
    """``sigma(r_w) + sigma(-margin)`` (APO-down, arXiv 2408.06266, eq. 8)."""
    return torch.sigmoid(chosen_reward) + torch.sigmoid(-margin)


def discopop(margin: Tensor, tau: float) -> Tensor:
    """``(1 - s) (-log sigma(margin)) + s exp(-margin)`` with ``s = sigma(margin / tau)`` (arXiv 2406.08414)."""
    gate = F.logsigmoid(margin / tau)
    # exp of the sum: apart, exp(-margin) overflows where s is 0
    return -F.logsigmoid(margin) * torch.sigmoid(-margin / tau) + torch.exp(_bounded(gate - margin))


def kto(log_ratio: Tensor, kl: Tensor | float, beta: float, desirable: bool) -> Tensor:
    """``1 - sigma(beta (u - kl))`` of desirable sequences, ``1 - sigma(beta (kl - u))`` of others (KTO, arXiv
    2402.01306); with ``kl = 0`` APO-zero (2408.06266, eq. 7)."""
    gain = beta * (log_ratio - kl)
    return torch.sigmoid(-gain if desirable else gain)


def aot_margin(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Differences of order statistics ``sort(chosen) - sort(rejected)`` (AOT, arXiv 2406.05882).

    ``aot`` compares log-prob differences of pairs to those of the reference, ``aot_unpaired`` log-ratios of chosen
    sequences to those of rejected ones.
    """
    return chosen.sort(dim=0).values - rejected.sort(dim=0).values


def alpha_reward(mean_logprobs: Tensor, alpha: float) -> Tensor:
    """``(1 - p^-alpha) / alpha``, ``p = exp(mean_logprobs)``; its limit ``mean_logprobs`` at 0 (AlphaPO, arXiv
    2501.03884)."""
    if alpha == 0:
        return mean_logprobs
    return -torch.expm1(_bounded(-alpha * mean_logprobs)) / alpha


def log_odds(mean_logprobs: Tensor) -> Tensor:
    """``log(p / (1 - p))``, ``p = exp(mean_logprobs)`` (ORPO, arXiv 2403.07691); finite at ``p = 1`` too."""
    x = mean_logprobs.clamp(max=-torch.finfo(mean_logprobs.dtype).tiny)
    near = x > -0.6931471805599453  # log(1 - e^x): either form loses all digits on the other's side of -log 2
    log1mexp = torch.where(
        near,
        torch.log(-torch.expm1(torch.where(near, x, -1.0))),
        torch.log1p(-torch.exp(torch.where(near, -1.0, x))),
    )
    return x - log1mexp


def divergence_score(log_ratio: Tensor, divergence: Divergence, alpha: float = 0.5) -> Tensor:
    """``f'`` of the density ratio ``exp(u)``, up to a constant, in place of ``u`` (f-DPO, arXiv 2309.16240).

    ``reverse_kl``: ``u``. ``forward_kl``: ``-exp(-u)``. ``js``: ``log sigma(u)``. ``alpha``:
    ``exp((alpha - 1) u) / (alpha - 1)``, whose limit at 1 is ``u``. Exponents are clamped at 80 (TRL).
    """
    if divergence == "forward_kl":
        return -torch.exp(_bounded(-log_ratio))
    if divergence == "js":
        return F.logsigmoid(log_ratio)
    if divergence == "alpha" and alpha != 1:
        return torch.exp(_bounded((alpha - 1) * log_ratio)) / (alpha - 1)
    return log_ratio


def wpo_weight(mean_aligned_logprobs: Tensor, limit: float | None = None) -> Tensor:
    """``exp(mean_t(log p_t - log sum_v p_v^2))`` of a sequence, detached, at most ``limit`` (WPO, arXiv 2406.11827)."""
    weight = torch.exp(_bounded(mean_aligned_logprobs.detach()))
    return weight if limit is None else weight.clamp(max=limit)


def _bounded(exponent: Tensor) -> Tensor:
    return exponent.clamp(max=_MAX_EXPONENT)
