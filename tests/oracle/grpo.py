"""Token-level policy losses on log-probs, from the definitions. lp: current log-prob, old: that of the sampler.

r = exp(clamp(lp - old, d_min, d_max))                       (gradient 0 where the clamp acts)
vanilla              max(-r A, -clip(r, 1 - lo, 1 + hi) A);  for A < 0 at most -c A
dro                  -(A lp - beta / 2 (lp - old)^2)
reinforce            -A lp
others               token_policies.py
k1 = lp - ref   abs = |lp - ref|   k2 = (lp - ref)^2 / 2   k3 = clamp(e^d - d - 1, +-10), d = clamp(ref - lp, +-20)
loss_b = sum_t [ is_t policy_t + c_kl kl_t - c_H entropy_t ] / N,  N = tokens that count, over all micro-batches
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.oracle.head import Head, Stats, token_stats
from tests.oracle.token_policies import TOKEN_POLICY, with_slope

KL_KIND = {"kl": "k1", "k1": "k1", "abs": "abs", "mse": "k2", "k2": "k2", "low_var_kl": "k3", "k3": "k3"}


@dataclass
class Batch:
    """One micro-batch; every tensor in the layout of the labels. old=None: on-policy."""

    labels: Tensor
    advantages: Tensor
    old: Tensor | None = None
    ref: Tensor | None = None
    is_weights: Tensor | None = None


@dataclass
class Objective:
    policy: dict[str, Any]
    kl_coef: float = 0.0
    kl_type: str | None = None
    entropy_coef: float = 0.0
    head: Head = field(default_factory=Head)
    kl_options: dict[str, Any] = field(default_factory=dict)


def vanilla(lp: Tensor, old: Tensor, adv: Tensor, cfg: dict[str, Any]) -> Tensor:
    diff = torch.clamp(lp - old, cfg.get("log_prob_diff_min", -20.0), cfg.get("log_prob_diff_max", 20.0))
    r = diff.exp()
    clipped = torch.clamp(r, 1.0 - cfg["cliprange_low"], 1.0 + cfg["cliprange_high"])
    surrogate = torch.maximum(-r * adv, -clipped * adv)
    c = cfg.get("clip_ratio_c", 3.0)
    return surrogate if c is None else torch.where(adv < 0, torch.minimum(surrogate, -c * adv), surrogate)


def dro(lp: Tensor, old: Tensor, adv: Tensor, cfg: dict[str, Any]) -> Tensor:
    return -(adv * lp - 0.5 * cfg.get("beta", 0.05) * (lp - old) ** 2)


def reinforce(lp: Tensor, old: Tensor, adv: Tensor, cfg: dict[str, Any]) -> Tensor:
    return -adv * lp


POLICY: dict[str, Callable[[Tensor, Tensor, Tensor, dict[str, Any]], Tensor]] = {
    "vanilla": vanilla,
    "dro": dro,
    "reinforce": reinforce,
    **TOKEN_POLICY,
}


def kl(lp: Tensor, ref: Tensor, kind: str) -> Tensor:
    kind = KL_KIND[kind]
    if kind == "k1":
        return lp - ref
    if kind == "abs":
        return (lp - ref).abs()
    if kind == "k2":
        return 0.5 * (lp - ref) ** 2
    d = torch.clamp(ref - lp, -20.0, 20.0)
    return torch.clamp(d.exp() - d - 1.0, -10.0, 10.0)


def kl_term(lp: Tensor, ref: Tensor, old: Tensor, kind: str, options: dict[str, Any]) -> Tensor:
    """The penalty with the options of xloss, value and slope by hand.

    k1: x, 1. abs: |x|, sign x. k2: x^2 / 2, x. k3: e^-x + x - 1, 1 - e^-x. x = lp - ref at most clamp_in, the value at
    most clamp_out; the slope 0 beyond, unless straight through. Gradients: straight_through x; score_function: slope +
    value; unbiased: r value, r (slope + value).
    """
    if not options:
        return kl(lp, ref, kind)
    x, kind = (lp - ref).detach(), KL_KIND[kind]
    limits = [options.get(name, "auto") for name in ("kl_clamp_in", "kl_clamp_out")]
    auto = (20.0, 10.0) if kind == "k3" else (math.inf, math.inf)
    inner, outer = (math.inf if v is None else a if v == "auto" else v for v, a in zip(limits, auto, strict=True))
    c = x.clamp(-inner, inner)
    raw, slope = {
        "k1": (c, torch.ones_like(c)),
        "abs": (c.abs(), c.sign()),
        "k2": (c**2 / 2, c),
        "k3": ((-c).exp() + c - 1, 1 - (-c).exp()),
    }[kind]
    value, slope_of_estimate = raw.clamp(-outer, outer), slope
    if not options.get("kl_clamp_straight_through"):
        slope = slope * ((x.abs() <= inner) & (raw.abs() <= outer))
    grad = options.get("kl_loss_grad", "plain")
    if grad == "straight_through":
        slope = x
    elif grad == "score_function":
        slope = slope + value
    elif grad == "unbiased":
        r = (lp - old).detach().exp()
        value, slope = r * value, r * (slope + value)
    if options.get("kl_clamp_weighted"):  # NeMo RL: the weighted value is limited, a clamped token has no gradient
        r = (lp - old).detach().exp() if grad == "unbiased" else torch.ones_like(c)
        free = (x.abs() <= inner) & ((r * raw).abs() <= outer)
        value, slope = (r * raw).clamp(-outer, outer), r * (slope_of_estimate + raw) * free
    return with_slope(value, slope, lp)


def num_tokens(batches: Sequence[Batch], ignore_index: int = -100) -> int:
    return sum(int((b.labels != ignore_index).sum()) for b in batches)


@dataclass
class Weights:
    """Factors of the three terms of each token, in the layout of the labels."""

    policy: Tensor
    kl: Tensor
    entropy: Tensor

    def times(self, factor: float) -> Weights:
        return Weights(self.policy * factor, self.kl * factor, self.entropy * factor)


def step_weights(batches: Sequence[Batch], objective: Objective) -> list[Weights]:
    """Of every micro-batch, global denominator included; a step without any token has weights 0."""
    total = max(num_tokens(batches, objective.head.ignore_index), 1)
    out = []
    for batch in batches:
        counts = batch.labels != objective.head.ignore_index
        each = counts.double() / total
        policy = each if batch.is_weights is None else torch.where(counts, each * batch.is_weights.double(), 0)
        out.append(Weights(policy, each * objective.kl_coef, each * objective.entropy_coef))
    return out


def token_loss(stats: Stats, batch: Batch, objective: Objective, weights: Weights) -> Tensor:
    """The summands of the loss, [live tokens]."""
    live = batch.labels.reshape(-1) != objective.head.ignore_index

    def at(x: Tensor) -> Tensor:
        return x.reshape(-1)[live].double()

    lp = at(stats.logprobs)
    old = lp.detach() if batch.old is None else at(batch.old)
    policy = POLICY[objective.policy["loss_type"]](lp, old, at(batch.advantages), objective.policy)
    out = policy * at(weights.policy) - at(stats.entropy) * at(weights.entropy)
    if objective.kl_type is None:
        return out
    assert batch.ref is not None
    return out + kl_term(lp, at(batch.ref), old, objective.kl_type, objective.kl_options) * at(weights.kl)


def loss(
    hidden: Tensor, weight: Tensor, batch: Batch, weights: Weights, objective: Objective, bias: Tensor | None = None
) -> Tensor:
    """The loss of one micro-batch."""
    stats = token_stats(hidden, weight, batch.labels, bias, objective.head)
    return token_loss(stats, batch, objective, weights).sum()


def metrics(lps: Sequence[Tensor], batches: Sequence[Batch], low: float, high: float) -> dict[str, float]:
    """Policy metrics of a step, from current log-probs: d = lp - old, r = exp(clamp(d, +-20)), k1 unclamped (XTuner).

    ratio_low_frac and ratio_high_frac: ratios below 1 - low and above 1 + high (XTuner's clip fractions); clip_frac_low
    and clip_frac_high: those of them whose gradient the clip stops, A < 0 and A > 0 (TRL). Without any token all are 0.
    """
    live = [b.labels.reshape(-1) != -100 for b in batches]
    olds = [lp if b.old is None else b.old for lp, b in zip(lps, batches, strict=True)]

    def joined(parts: Sequence[Tensor]) -> Tensor:
        return torch.cat([x.detach().reshape(-1)[m].double() for x, m in zip(parts, live, strict=True)])

    d, advantages = joined(lps) - joined(olds), joined([b.advantages for b in batches])
    n, safe = max(d.numel(), 1), torch.clamp(d, -20.0, 20.0)
    r = safe.exp()
    below, above = r < 1 - low, r > 1 + high
    sums = {
        "ratio_mean": r,
        "ratio_abs_dev": (r - 1).abs(),
        "ratio_low_frac": below,
        "ratio_high_frac": above,
        "clip_frac_low": below & (advantages < 0),
        "clip_frac_high": above & (advantages > 0),
        "approx_kl_k1": -d,
        "approx_kl_k2": safe**2 / 2,
        "approx_kl_k3": r - 1 - safe,
    }
    out = {name: float(x.double().sum()) / n for name, x in sums.items()}
    out["ratio_min"] = float(r.min()) if d.numel() else 0.0
    out["ratio_max"] = float(r.max()) if d.numel() else 0.0
    out["ratio_ess"] = float(r.sum() ** 2 / (n * (r**2).sum())) if d.numel() else 0.0
    out["num_tokens"] = float(d.numel())
    return out
