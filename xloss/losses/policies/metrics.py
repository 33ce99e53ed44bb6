"""Figures that every policy loss reports."""

from __future__ import annotations

import torch
from torch import Tensor

from xloss.metrics import Metric
from xloss.policy.batch import PolicyBatch

_METRIC_LIMIT = 20.0  # of |log r| in metrics, as XTuner and verl


def policy_metrics(batch: PolicyBatch, leveled: PolicyBatch, bounds: tuple[float, float] | None) -> dict[str, Metric]:
    """Figures of ``r = exp(leveled.log_ratio)``, the ratio at the level of the loss, over live tokens.

    ``clip_frac_low`` and ``clip_frac_high`` count tokens whose gradient the clip can stop: ``A < 0`` and ``r`` below,
    or ``A > 0`` and ``r`` above (TRL). ``ratio_low_frac`` and ``ratio_high_frac`` count every ratio out of bounds
    (XTuner). ``ratio_ess`` is the effective sample size ``mean(r)^2 / mean(r^2)``, a share.
    ``approx_kl_k1 = -log r``, ``approx_kl_k2 = (log r)^2 / 2`` and ``approx_kl_k3 = r - log r - 1`` of each token alone
    estimate KL(old || current). Above the token, ``seq_`` ones are means over sequences of their tokens' mean.
    """
    log_ratio, advantages = leveled.log_ratio.detach(), batch.advantages
    valid = None if batch.sequences is None else batch.sequences.valid
    safe = torch.clamp(log_ratio, -_METRIC_LIMIT, _METRIC_LIMIT)  # one far token must not make a mean infinite
    ratio = torch.exp(safe)
    each, each_safe = log_ratio, safe
    if leveled is not batch:
        each = batch.log_ratio.detach()
        each_safe = torch.clamp(each, -_METRIC_LIMIT, _METRIC_LIMIT)
    over_tokens = {
        "ratio_mean": ratio,
        "ratio_abs_dev": (ratio - 1).abs(),
        "approx_kl_k1": -each,
        "approx_kl_k2": each_safe.square() / 2,
        "approx_kl_k3": torch.expm1(each_safe) - each_safe,
    }
    by_sequence = {"seq_ratio_mean": ratio}
    if bounds is not None:
        below, above = ratio < bounds[0], ratio > bounds[1]
        fractions = {
            "clip_frac_low": below & (advantages < 0),
            "clip_frac_high": above & (advantages > 0),
            "ratio_low_frac": below,
            "ratio_high_frac": above,
        }
        over_tokens |= {name: mask.to(ratio.dtype) for name, mask in fractions.items()}
        by_sequence |= {f"seq_{name}": over_tokens[name] for name in ("clip_frac_low", "clip_frac_high")}
    metrics = Metric.means(over_tokens, valid) | {
        "num_tokens": Metric.count_of(ratio, valid),
        "ratio_min": Metric.extreme(ratio, "min", valid),
        "ratio_max": Metric.extreme(ratio, "max", valid),
        "ratio_ess": Metric.moments(ratio, "ess", valid),
    }
    if leveled is not batch and batch.sequences is not None:
        there = batch.sequences.lengths(ratio) > 0
        metrics |= Metric.means({name: batch.sequences.mean(x) for name, x in by_sequence.items()}, there)
    return metrics


def share(batch: PolicyBatch, mask: Tensor) -> Metric:
    """Share of the live tokens that are in ``mask``."""
    valid = None if batch.sequences is None else batch.sequences.valid
    return Metric.mean(mask.to(batch.logprobs.dtype), valid)
