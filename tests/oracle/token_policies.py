"""Losses of each token's own ratio, by their definitions. lp: current log-prob, old: what the ratio is taken against.

Clipped losses come as a value and a slope dL/dlp that were worked out by hand, case by case, so that no autograd rule
of a clamp stands between the paper and the number; r = exp(d), d = lp - old, held at +-clamp where there is one.

ppo         A > 0: -min(r, 1 + hi) A, slope 0 beyond.  A < 0: -max(r, 1 - lo) A, and r at most delta, and the value at
            most -c A, slope 0 where any of them holds
cispo       slope -clip(r, lo, hi) A, value that times lp; unified mask: 0 where ppo's bound holds
tis         cispo with bounds 0 and 1
rollout_is  slope -r A inside (lo, hi), else 0; value that times lp
topr        slope -w+ A if A > threshold, else -w- min(r, 1) A; value that times lp
sapo        value -(4 / tau) s A, slope -4 s (1 - s) r A, s = sigmoid(tau (r - 1)), tau by the sign of A
dppo        A r on kept tokens; kept by |p - q| or by the binary KL of p and q; + kl_tau d^2 on all
kimi        value -A lp + tau d^2 / 2
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Config = dict[str, Any]


def with_slope(value: Tensor, slope: Tensor, lp: Tensor) -> Tensor:
    """A tensor that is `value` and has derivative `slope` with respect to `lp`."""
    return value.detach() + slope.detach() * (lp - lp.detach())


def ratio(lp: Tensor, old: Tensor, cfg: Config, default: float | None = 20.0) -> tuple[Tensor, Tensor]:
    """r, and whether the clamp leaves it a slope."""
    d = (lp - old).detach()
    limit = cfg.get("log_ratio_clamp", default)
    if limit is None:
        return d.exp(), torch.ones_like(d, dtype=torch.bool)
    return d.clamp(-limit, limit).exp(), d.abs() <= limit


def bounds(cfg: Config, low: float, high: float) -> tuple[float, float]:
    """Of the ratio: offsets or thresholds of the config, else those given."""
    low = 1 - cfg["cliprange_low"] if "cliprange_low" in cfg else cfg.get("clip_low_threshold", low)
    high = 1 + cfg["cliprange_high"] if "cliprange_high" in cfg else cfg.get("clip_high_threshold", high)
    return low, high


def ppo(lp: Tensor, old: Tensor, adv: Tensor, cfg: Config) -> Tensor:
    low, high = bounds(cfg, 0.8, 1.2)
    r, moves = ratio(lp, old, cfg)
    delta = cfg.get("delta") or math.inf
    c = cfg.get("dual_clip_c") or math.inf
    gain = torch.where(adv > 0, r.clamp(max=high), 0 * r)
    loss = torch.where(adv < 0, r.clamp(max=delta).clamp(min=low).clamp(max=c), 0 * r)
    value = -(gain + loss) * adv
    free = (adv > 0) & (r <= high) | (adv < 0) & (r >= low) & (r <= min(delta, c))
    return with_slope(value, -r * adv * (free & moves), lp)


def cispo(lp: Tensor, old: Tensor, adv: Tensor, cfg: Config) -> Tensor:
    low, high = bounds(cfg, 0.0, 5.0)
    r, _ = ratio(lp, old, cfg)
    weight = torch.minimum(torch.maximum(r, 0 * r + low), 0 * r + high)
    if cfg.get("unified_mask"):
        weight = torch.where((adv > 0) & (r > high) | (adv < 0) & (r < low), 0 * r, weight)
    return -weight * adv * lp


def tis(lp: Tensor, old: Tensor, adv: Tensor, cfg: Config) -> Tensor:
    return cispo(lp, old, adv, {"clip_low_threshold": 0.0, "clip_high_threshold": 1.0} | cfg)


def rollout_is(lp: Tensor, old: Tensor, adv: Tensor, cfg: Config) -> Tensor:
    low, high = bounds(cfg, 0.8, 1.2)
    r, _ = ratio(lp, old, cfg)
    return -torch.where((r > low) & (r < high), r, 0 * r) * adv * lp


def topr(lp: Tensor, old: Tensor, adv: Tensor, cfg: Config) -> Tensor:
    r, _ = ratio(lp, old, cfg)
    good = adv > cfg.get("advantage_threshold", 0.0)
    up, down = cfg.get("positive_weight", 1.0), cfg.get("negative_weight", 1.0)
    weight = torch.where(good, 0 * r + up, down * r.clamp(max=1))
    return -weight * adv * lp


def sapo(lp: Tensor, old: Tensor, adv: Tensor, cfg: Config) -> Tensor:
    r, moves = ratio(lp, old, cfg)
    tau = torch.tensor([cfg.get("tau_neg", 1.05), cfg.get("tau_pos", 1.0)], dtype=lp.dtype)[(adv > 0).long()]
    s = 1 / (1 + (-tau * (r - 1)).exp())
    return with_slope(-4 / tau * s * adv, -4 * s * (1 - s) * r * adv * moves, lp)


def importance_sampling(lp: Tensor, old: Tensor, adv: Tensor, cfg: Config) -> Tensor:
    r, moves = ratio(lp, old, cfg, None)
    return with_slope(-r * adv, -r * adv * moves, lp)


def kimi(lp: Tensor, old: Tensor, adv: Tensor, cfg: Config) -> Tensor:
    return -adv * lp + cfg.get("tau", 0.1) * (lp - old) ** 2 / 2


def _masked(lp: Tensor, old: Tensor, adv: Tensor, keep: Tensor, cfg: Config) -> Tensor:
    r, moves = ratio(lp, old, cfg)
    cap = cfg.get("ratio_cap", 20.0)
    if cap is None:
        policy = with_slope(-r * adv * keep, -r * adv * keep * moves, lp)
    else:
        policy = -r.clamp(max=cap) * adv * keep * lp
    return policy + cfg.get("kl_tau", 0.0) * (lp - old) ** 2


def dppo_tv(lp: Tensor, old: Tensor, adv: Tensor, cfg: Config) -> Tensor:
    moved = lp.detach().exp() - old.exp()
    low, high = cfg.get("delta_low", 0.2), cfg.get("delta_high", 0.2)
    if cfg.get("one_sided", True):
        keep = (adv > 0) & (moved <= high) | (adv <= 0) & (moved >= -low)
    else:
        keep = (moved <= high) & (moved >= -low)
    return _masked(lp, old, adv, keep, cfg)


def dppo_kl(lp: Tensor, old: Tensor, adv: Tensor, cfg: Config) -> Tensor:
    p, q, e = lp.detach().exp(), old.exp(), 1e-8
    kl = q * (old - lp.detach()) + (1 - q) * ((1 - q + e) / (1 - p + e)).log()
    keep_up = (kl <= cfg.get("delta_high", 0.2)) | (p <= q)
    keep_down = (kl <= cfg.get("delta_low", 0.2)) | (p >= q)
    return _masked(lp, old, adv, (adv > 0) & keep_up | (adv <= 0) & keep_down, cfg)


def ref_kl(lp: Tensor, old: Tensor, ref: Tensor, cfg: Config) -> Tensor:
    """prime-rl's distillation: A = ref - lp, dropped where the probability fell by more than delta_low. It takes ref in
    the place of the advantage."""
    keep = lp.detach().exp() - old.exp() >= -cfg.get("delta_low", 0.2)
    return _masked(
        lp, old, (ref - lp).detach(), keep, {"ratio_cap": None, "log_ratio_clamp": None, "kl_tau": 1e-3} | cfg
    )


TOKEN_POLICY: dict[str, Callable[[Tensor, Tensor, Tensor, Config], Tensor]] = {
    "ppo": ppo,
    "cispo": cispo,
    "tis": tis,
    "rollout_is": rollout_is,
    "topr": topr,
    "sapo": sapo,
    "importance_sampling": importance_sampling,
    "kimi": kimi,
    "dppo_tv": dppo_tv,
    "dppo_kl": dppo_kl,
    "ref_kl": ref_kl,
}
