"""Losses that couple the tokens of a sequence, from their papers: one sequence at a time, one token at a time.

d = lp - old at a counted token, T_i counted tokens in sequence i, sg(x) a constant.

ratio at a level   token: exp(d)   sequence: exp(mean_i d)   sequence_sum: exp(sum_i d)   segment: exp(mean of a turn)
                   sequence_token: exp(lp - sg(lp) + sg(mean_i d));  a turn: counted tokens without a gap
ppo                max(-min(r, delta) A, -clip(r, 1 - lo, 1 + hi) A);  for A < 0 at most -c A
reinforce          -A lp
cispo              -sg(clip(r, lo, hi)) A lp               sapo   -4 / tau sigmoid(tau (r - 1)) A, tau by A > 0
gspo, gspo_token, segment_ratio, rloo   ppo at sequence, sequence_token, segment, sequence_sum
luspo              T_i gspo
gmpo               -mean_i(A) exp(mean_i c) prod(is)^(1 / T_i);  c = min(d, hi) if A > 0, max(d, -lo) if A < 0, else 0
vespo              -sg(phi) A lp;  phi = exp(lambda + k log W - lambda W),  log W = sum clamp(d, +-20) + sum log is
real               log(1 + sum_neg e^(s / tau)) + log(1 + sum_pos e^(-s / tau)) over a prompt's answers, s = mean_i d
a_star_po          (beta sum_i (lp - ref) - A)^2
fipo               ppo times sg(clip(exp F));  F_t = sum over s >= t of gamma^(s - t) d_s, gamma = 2^(-1 / decay_rate)
opsm               keep A >= 0 or mean_i(sampled - lp) <= delta       top entropy  keep H >= quantile(1 - q), linear
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LEVEL = {"gspo": "sequence", "gspo_token": "sequence_token", "segment_ratio": "segment", "rloo": "sequence_sum",
         "luspo": "sequence"}  # fmt: skip


@dataclass
class Tokens:
    """All tokens of a micro-batch, flat; `bounds` are the first and past-last position of each sequence."""

    lp: Tensor
    old: Tensor
    advantages: Tensor
    valid: Tensor
    bounds: Sequence[tuple[int, int]]
    ref: Tensor | None = None
    is_weights: Tensor | None = None
    groups: Tensor | None = None

    def sequences(self) -> list[list[int]]:
        """Counted positions of each sequence."""
        return [[t for t in range(a, b) if bool(self.valid[t])] for a, b in self.bounds]


def mean(xs: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(xs)).mean()


def turns(positions: Sequence[int]) -> list[list[int]]:
    """Positions cut where one is missing."""
    out: list[list[int]] = []
    for t in positions:
        if out and out[-1][-1] == t - 1:
            out[-1].append(t)
        else:
            out.append([t])
    return out


def log_ratios(x: Tokens, positions: Sequence[int], level: str) -> dict[int, Tensor]:
    """Log-ratio of each position of one sequence at a level."""
    d = {t: x.lp[t] - x.old[t] for t in positions}
    if level == "token":
        return d
    if level == "segment":
        return {t: mean([d[s] for s in turn]) for turn in turns(positions) for t in turn}
    if level == "sequence_sum":
        return {t: torch.stack(list(d.values())).sum() for t in positions}
    whole = mean(list(d.values())) if positions else None
    if level == "sequence":
        return dict.fromkeys(positions, whole)
    return {t: x.lp[t] - x.lp[t].detach() + whole.detach() for t in positions}


def ppo(r: Tensor, a: Tensor, cfg: dict[str, Any]) -> Tensor:
    free = torch.clamp(r, max=cfg["delta"]) if cfg.get("delta") else r
    loss = torch.maximum(-free * a, -torch.clamp(r, 1 - cfg["cliprange_low"], 1 + cfg["cliprange_high"]) * a)
    c = cfg.get("dual_clip_c") or cfg.get("clip_ratio_c")
    return torch.minimum(loss, -c * a) if c and a < 0 else loss


def per_token(x: Tokens, cfg: dict[str, Any]) -> Tensor:
    """Loss of every token `[T]`, rollout weights included; 0 where a token does not count."""
    name, zero = cfg["loss_type"], x.lp.new_zeros(())
    losses = [zero] * x.lp.numel()
    for positions in x.sequences():
        for t, loss in _of_sequence(x, positions, name, cfg).items():
            folded = name in ("gmpo", "vespo") or x.is_weights is None
            losses[t] = loss if folded else loss * x.is_weights[t]
    if name == "real":
        for t, loss in _real(x, cfg).items():
            losses[t] = loss if x.is_weights is None else loss * x.is_weights[t]
    return torch.stack(losses) if losses else x.lp.new_zeros(0)


def _of_sequence(x: Tokens, positions: list[int], name: str, cfg: dict[str, Any]) -> dict[int, Tensor]:
    if not positions or name == "real":
        return {}
    level = cfg.get("ratio_level", LEVEL.get(name, "token"))
    limit = cfg.get("log_ratio_clamp") or math.inf
    logs = {t: torch.clamp(v, -limit, min(limit, cfg.get("log_ratio_max") or math.inf))
            for t, v in log_ratios(x, positions, level).items()}  # fmt: skip
    a, count = x.advantages, len(positions)
    if name in ("ppo", *LEVEL):
        factor = count if name == "luspo" else 1
        return {t: factor * ppo(logs[t].exp(), a[t], cfg) for t in positions}
    if name == "reinforce":
        return {t: -a[t] * x.lp[t] for t in positions}
    if name == "cispo":
        low, high = cfg["clip_low_threshold"], cfg["clip_high_threshold"]
        return {t: -torch.clamp(logs[t].exp(), low, high).detach() * a[t] * x.lp[t] for t in positions}
    if name == "sapo":
        tau = {t: cfg["tau_pos"] if a[t] > 0 else cfg["tau_neg"] for t in positions}
        return {t: -4 / tau[t] * torch.sigmoid(tau[t] * (logs[t].exp() - 1)) * a[t] for t in positions}
    if name == "gmpo":
        return dict.fromkeys(positions, _gmpo(x, positions, cfg))
    if name == "vespo":
        return {t: -_vespo_phi(x, positions, a[t], cfg) * a[t] * x.lp[t] for t in positions}
    if name == "a_star_po":
        drift = torch.stack([x.lp[t] - x.ref[t] for t in positions]).sum()
        return dict.fromkeys(positions, (cfg["beta"] * drift - mean([a[t] for t in positions])) ** 2)
    assert name == "fipo"
    return {t: _fipo_weight(x, positions, t, cfg) * ppo(logs[t].exp(), a[t], cfg) for t in positions}


def _gmpo(x: Tokens, positions: list[int], cfg: dict[str, Any]) -> Tensor:
    clipped = []
    for t in positions:
        d, a = x.lp[t] - x.old[t], float(x.advantages[t])
        bound = d.new_tensor(cfg["cliprange_high"] if a > 0 else -cfg["cliprange_low"])
        clipped.append(torch.minimum(d, bound) if a > 0 else torch.maximum(d, bound) if a < 0 else d * 0)
    ratio = mean(clipped).exp()
    if x.is_weights is not None:
        ratio = ratio * math.prod(float(x.is_weights[t]) for t in positions) ** (1 / len(positions))
    return -mean([x.advantages[t] for t in positions]) * ratio


def _vespo_phi(x: Tokens, positions: list[int], a: Tensor, cfg: dict[str, Any]) -> float:
    low, high = math.log(1e-8), 20.0
    log_w = sum(min(max(float((x.lp[t] - x.old[t]).detach()), -20.0), 20.0) for t in positions)
    if x.is_weights is not None:
        for t in positions:
            w = float(x.is_weights[t])
            log_w += min(max(math.log(w), low), high) if w > 0 else low
    log_w = min(max(log_w, low), high)
    sign = "pos" if a >= 0 else "neg"
    return math.exp(cfg[f"lambda_{sign}"] + cfg[f"k_{sign}"] * log_w - cfg[f"lambda_{sign}"] * math.exp(log_w))


def _fipo_weight(x: Tokens, positions: list[int], t: int, cfg: dict[str, Any]) -> float:
    gamma, future = 2.0 ** (-1.0 / cfg["decay_rate"]), 0.0
    d = {s: float((x.lp[s] - x.old[s]).detach()) for s in positions}
    for s in positions:
        most = cfg.get("participation_threshold")
        if s >= t and (most is None or math.exp(d[s]) <= most):
            future += gamma ** (s - t) * d[s]
    weight = math.exp(future)
    if cfg.get("weight_cliprange") is not None:
        low = 1.0 if cfg["weight_clip_high_only"] else 1.0 - cfg["weight_cliprange"]
        weight = min(max(weight, low), 1.0 + cfg["weight_cliprange"])
    safe = cfg.get("safety_threshold")
    if safe is not None and x.advantages[t] < 0 and math.exp(d[t]) > safe:
        weight = min(max(weight, 0.8), 1.0)
    return weight


def _real(x: Tokens, cfg: dict[str, Any]) -> dict[int, Tensor]:
    prompts: dict[int, list[list[int]]] = {}
    for positions in x.sequences():
        if positions:
            prompts.setdefault(int(x.groups[positions[0]]), []).append(positions)
    out: dict[int, Tensor] = {}
    for answers in prompts.values():
        good = [float(mean([x.advantages[t] for t in p])) > 0 for p in answers]
        loss = x.lp.new_zeros(())
        if any(good) and not all(good):
            s = [mean([x.lp[t] - x.old[t] for t in p]) / cfg["tau"] for p in answers]
            loss = torch.log(1 + sum(v.exp() for v, g in zip(s, good, strict=True) if not g))
            loss = loss + torch.log(1 + sum((-v).exp() for v, g in zip(s, good, strict=True) if g))
        out |= {t: loss for p in answers for t in p}
    return out


def opsm_keep(x: Tokens, sampled: Tensor, delta: float) -> Tensor:
    keep = torch.ones_like(x.valid)
    for positions in x.sequences():
        if positions and mean([(sampled[t] - x.lp[t]).detach() for t in positions]) > delta:
            keep[positions] = x.advantages[positions] >= 0
    return keep


def top_entropy_keep(entropy: Tensor, valid: Tensor, quantile: float) -> Tensor:
    known = sorted(float(h) for h, v in zip(entropy.detach(), valid, strict=True) if v)
    if not known:
        return valid
    place = (len(known) - 1) * (1 - quantile)
    below = known[math.floor(place)]
    threshold = below + (known[math.ceil(place)] - below) * (place - math.floor(place))
    return valid & (entropy.detach() >= threshold)
