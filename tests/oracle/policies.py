"""The oracle of every policy loss by its `loss_type`, on one form of input; `cfg` holds the value of every field.

Losses of a ratio's level, d at that level (`sequence.log_ratios`): a function of the ratio alone takes d for lp and 0
for old; a constant weight on lp takes sg(lp - d) for old.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests.oracle import coupled, grpo, sequence, token_policies

Config = dict[str, Any]
_OPEN = {"log_prob_diff_min": -math.inf, "log_prob_diff_max": math.inf}


@dataclass
class Tokens(sequence.Tokens):
    """`rollout`: log-probs of the sampler."""

    rollout: Tensor | None = None


Oracle = Callable[[Tokens, Config], Tensor]


def per_token(name: str, x: Tokens, cfg: Config) -> Tensor:
    """Loss of every token [T]; what it says of tokens that do not count means nothing."""
    unused = [f"clip{form}" for form in ("range_low", "range_high", "_low_threshold", "_high_threshold")]
    cfg = {k: v for k, v in cfg.items() if v is not None or k not in unused}
    if cfg.get("anchor") == "rollout":
        x.old = x.rollout
    return POLICIES[name](x, cfg)


def _level(x: Tokens, cfg: Config) -> Tensor:
    d = x.lp - x.old
    if cfg.get("ratio_level", "token") == "token":
        return d
    out = list(d)
    for positions in x.sequences():
        if positions:
            for t, value in sequence.log_ratios(x, positions, cfg["ratio_level"]).items():
                out[t] = value
    return torch.stack(out)


def _of_ratio(formula: Callable[..., Tensor]) -> Oracle:
    return lambda x, cfg: formula(d := _level(x, cfg), torch.zeros_like(d), x.advantages, cfg)


def _weight(formula: Callable[..., Tensor]) -> Oracle:
    return lambda x, cfg: formula(x.lp, (x.lp - _level(x, cfg)).detach(), x.advantages, cfg)


def _token(formula: Callable[..., Tensor]) -> Oracle:
    return lambda x, cfg: formula(x.lp, x.old, x.advantages, cfg)


def _vanilla(x: Tokens, cfg: Config) -> Tensor:
    return grpo.vanilla(x.lp, x.old, x.advantages, cfg | {k: v for k, v in _OPEN.items() if cfg[k] is None})


def _sequence(x: Tokens, cfg: Config) -> Tensor:
    if "clip_low_threshold" in cfg:
        cfg = cfg | {"cliprange_low": 1 - cfg["clip_low_threshold"], "cliprange_high": cfg["clip_high_threshold"] - 1}
    return sequence.per_token(x, cfg)


def _of_batch(formula: Callable[[Tokens, Config], Tensor]) -> Oracle:
    """On the valid tokens of the batch, put back."""

    def call(x: Tokens, cfg: Config) -> Tensor:
        def at(v: Tensor | None) -> Any:
            return None if v is None else v[x.valid]

        part = Tokens(at(x.lp), at(x.old), at(x.advantages), at(x.valid), [], rollout=at(x.rollout))
        return torch.zeros_like(x.lp).masked_scatter(x.valid, formula(part, cfg))

    return call


def _clip_cov(x: Tokens, cfg: Config) -> Tensor:
    assert cfg["clip_cov_ratio"] == 1.0, "which candidates are dropped is random, unless it is all"
    loss = coupled.clip(x.lp, x.old, x.advantages, cfg["cliprange_low"], cfg["cliprange_high"])
    kept = torch.ones_like(loss)
    kept[coupled.clip_cov_candidates(x.lp, x.old, x.advantages, cfg)] = 0
    return loss * kept


def _m2po(x: Tokens, cfg: Config) -> Tensor:
    now, then = (x.old, x.rollout) if cfg["moment_of"] == "old" else (x.lp, x.old)
    kept = coupled.m2po(now, then, x.advantages, cfg) != 0  # a token of advantage 0 has no loss either way
    if "cliprange_low" in cfg:
        return coupled.clip(x.lp, x.old, x.advantages, cfg["cliprange_low"], cfg["cliprange_high"]) * kept
    return -(x.lp - x.old).exp() * x.advantages * kept


def _decoupled(x: Tokens, cfg: Config) -> Tensor:
    w = (x.old - x.rollout).exp()
    low = 0.0 if cfg["behave_low"] is None else cfg["behave_low"]
    high = math.inf if cfg["behave_high"] is None else cfg["behave_high"]
    w = w.clamp(low, high) if cfg["behave_action"] == "truncate" else w * ((w >= low) & (w <= high))
    return w * grpo.vanilla(x.lp, x.old, x.advantages, cfg | _OPEN)


POLICIES: dict[str, Oracle] = {
    "vanilla": _vanilla,
    "dro": _token(grpo.dro),
    "reinforce": _token(grpo.reinforce),
    "kimi": _token(token_policies.kimi),
    "dppo_tv": _token(token_policies.dppo_tv),
    "dppo_kl": _token(token_policies.dppo_kl),
    "ref_kl": lambda x, cfg: token_policies.ref_kl(x.lp, x.old, x.ref, cfg),
    **{n: _of_ratio(token_policies.TOKEN_POLICY[n]) for n in ("ppo", "sapo", "importance_sampling")},
    **{n: _weight(token_policies.TOKEN_POLICY[n]) for n in ("cispo", "tis", "rollout_is", "topr")},
    **dict.fromkeys((*sequence.LEVEL, "gmpo", "vespo", "real", "a_star_po", "fipo"), _sequence),
    "kl_cov": _of_batch(lambda x, cfg: coupled.kl_cov(x.lp, x.old, x.advantages, cfg)),
    "clip_cov": _of_batch(_clip_cov),
    "m2po": _of_batch(_m2po),
    "decoupled_ppo": _decoupled,
}
