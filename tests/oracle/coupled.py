"""Policy losses that rank the tokens of a batch, and objectives with a likelihood term, from their papers.

d = lp - old, r = e^d; all over the N valid tokens of one micro-batch, [N] vectors in and out, to minimise
cov = (A - mean A)(lp - mean lp)
clip_cov   PPO clip, 0 at `dropped` tokens; candidates: not clipped, lb < cov < ub          (2505.22617)
kl_cov     -r A + coef |d| at the max(1, int(ratio N)) tokens of highest cov                 (2505.22617)
m2po       -r A; of the considered tokens (A d > 0, or all) the largest d^2 go until the mean of the rest < tau
           (2510.01161)
decoupled  max(-u A, -clip(u) A) w, u = e^(lp - prox), w = e^(prox - behave) in bounds, else 0 or clamped (2505.24298)
oreal      f+ sum_{A>0} (p PPO - s lp) / N+  +  f- sum_{A<=0} PPO / N-                        (2502.06781)
vapo       PPO + mu mean_{reward > 0}(-lp)                                                    (2504.05118)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.oracle import grpo


def covariances(lp: Tensor, adv: Tensor) -> list[float]:
    mean_a, mean_lp = float(adv.mean()), float(lp.detach().mean())
    return [(float(a) - mean_a) * (float(x) - mean_lp) for a, x in zip(adv, lp.detach(), strict=True)]


def clip(lp: Tensor, old: Tensor, adv: Tensor, low: float, high: float) -> Tensor:
    options = {"cliprange_low": low, "cliprange_high": high, "clip_ratio_c": None,
               "log_prob_diff_min": None, "log_prob_diff_max": 700.0}  # fmt: skip
    return grpo.vanilla(lp, old, adv, options)


def clip_cov_candidates(lp: Tensor, old: Tensor, adv: Tensor, cfg: dict[str, Any]) -> list[int]:
    low, high = cfg.get("cliprange_low", 0.2), cfg.get("cliprange_high", 0.2)
    out = []
    for i, cov in enumerate(covariances(lp, adv)):
        r, a = float((lp[i] - old[i]).detach().exp()), float(adv[i])
        clipped = (a > 0 and r > 1 + high) or (a < 0 and r < 1 - low)
        if not clipped and cfg["clip_cov_lb"] < cov < cfg["clip_cov_ub"]:
            out.append(i)
    return out


def kl_cov(lp: Tensor, old: Tensor, adv: Tensor, cfg: dict[str, Any]) -> Tensor:
    out = -(lp - old).exp() * adv
    count = max(1, int(cfg["kl_cov_ratio"] * len(lp)))
    ranked = sorted(range(len(lp)), key=lambda i: -covariances(lp, adv)[i])
    chosen = torch.tensor([float(i in ranked[:count]) for i in range(len(lp))], dtype=torch.float64)
    return out + cfg["ppo_kl_coef"] * (lp - old).abs() * chosen


def m2po(lp: Tensor, old: Tensor, adv: Tensor, cfg: dict[str, Any]) -> Tensor:
    d = (lp - old).detach()
    considered = [i for i in range(len(d)) if not cfg["trust_region_only"] or float(adv[i] * d[i]) > 0]
    left = sorted(considered, key=lambda i: float(d[i] ** 2))
    while len(left) > 1 and sum(float(d[i] ** 2) for i in left) / len(left) >= cfg["m2_threshold"]:
        left.pop()
    gone = set(considered) - set(left)
    keep = torch.tensor([0.0 if i in gone else 1.0 for i in range(len(d))], dtype=torch.float64)
    return -(lp - old).exp() * adv * keep


def decoupled(lp: Tensor, prox: Tensor, behave: Tensor, adv: Tensor, cfg: dict[str, Any]) -> Tensor:
    w = (prox - behave).exp()
    low, high = cfg.get("behave_low") or 0.0, cfg.get("behave_high", 5.0)
    w = torch.clamp(w, low, high) if cfg.get("behave_action") == "truncate" else w * ((w >= low) & (w <= high))
    return clip(lp, prox, adv, 0.2, 0.28) * w
