"""Corrections for a sampler that is not the trainer, token by token and sequence by sequence, from the definitions.

x_t = old_t - rollout_t                                   s: sequence of t, its valid tokens only
w_t = exp(clamp(l, +-20)),  l = x_t (token), sum_s x (sequence), mean_s x (geometric)
truncate: clamp(w, low, high)    mask: reject w outside [low, high]
k1 = -x, k2 = x^2 / 2, k3 = e^x - x - 1 with x clamped to +-20; of the token, or summed, averaged, maximised over s
veto: a token with e^x outside [veto_low, veto_high] rejects s
batch normalise: w / mean w, over tokens (token level) or sequences, after the bounds and before rejection and veto
loss = sum_t W_t [w_t kept_t policy_t] / N;  rejected tokens leave N where renormalize_rejected says so
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@dataclass
class Corrected:
    weight: Tensor  # [T], float64, not yet masked by `kept`
    kept: Tensor  # [T] bool


def within(value: float, low: float | None, high: float | None) -> bool:
    return (low is None or value >= low) and (high is None or value <= high)


def divergence(x: float, estimator: str) -> float:
    x = max(-20.0, min(20.0, x))
    return {"k1": -x, "k2": 0.5 * x * x, "k3": math.exp(x) - x - 1.0}[estimator]


def sequences(valid: Tensor, bounds: list[int]) -> list[list[int]]:
    """Positions of the valid tokens of each sequence."""
    return [[t for t in range(a, b) if valid[t]] for a, b in pairwise(bounds)]


def one(
    old: Tensor, rollout: Tensor, valid: Tensor, bounds: list[int], cfg: dict[str, Any]
) -> tuple[Corrected, Tensor]:
    """Correction of one micro-batch, vectors [T]; and the weights that a batch mean is taken of."""
    level, action = cfg.get("level", "token"), cfg.get("action", "truncate")
    low, high = cfg.get("low"), cfg.get("high", 2.0)
    mask_low, mask_high = cfg.get("mask_low", low), cfg.get("mask_high", high)
    weight, averaged = torch.zeros(len(valid), dtype=torch.float64), torch.zeros(len(valid), dtype=torch.float64)
    kept = torch.zeros(len(valid), dtype=torch.bool)
    for tokens in sequences(valid, bounds):
        x = {t: float(old[t].double() - rollout[t].double()) for t in tokens}
        total = sum(x.values())
        for t in tokens:
            w, inside = 1.0, True
            if level is not None:
                exponent = {"token": x[t], "sequence": total, "geometric": total / len(tokens)}[level]
                w = math.exp(max(-20.0, min(20.0, exponent)))
                inside = action == "truncate" or within(w, mask_low, mask_high)
                if action != "mask":
                    w = max(w, low) if low is not None else w
                    w = min(w, high) if high is not None else w
            averaged[t] = w if inside else 0.0
            weight[t], kept[t] = w, inside
            for r in cfg.get("reject", ()):
                each = {u: divergence(x[u], r["estimator"]) for u in tokens}
                over = {"token": each[t], "sum": sum(each.values()), "max": max(each.values())}
                over["mean"] = over["sum"] / len(tokens)
                kept[t] &= within(over[r.get("over", "token")], r.get("low"), r.get("high"))
            vetoes = [not within(math.exp(x[u]), cfg.get("veto_low"), cfg.get("veto_high")) for u in tokens]
            kept[t] &= not any(vetoes)
    return Corrected(weight, kept), averaged


def step(batches: list[tuple[Tensor, Tensor, Tensor, list[int]]], cfg: dict[str, Any]) -> list[Corrected]:
    """Corrections of all micro-batches, each (old, rollout, valid, bounds)."""
    found = [one(*batch, cfg) for batch in batches]
    if cfg.get("batch_normalize"):
        values = []
        for (_, averaged), (_, _, valid, bounds) in zip(found, batches, strict=True):
            if cfg.get("level", "token") == "token":
                values += averaged[valid].tolist()
            else:
                values += [float(averaged[tokens].mean()) for tokens in sequences(valid, bounds) if tokens]
        mean = sum(values) / len(values)
        for corrected, _ in found:
            corrected.weight /= mean
    return [corrected for corrected, _ in found]
