"""Applies a ``RolloutCorrection``: to the batches of a step where they are built, or to one in the pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from xloss.distributed import TokenRanks
from xloss.errors import MissingFieldError
from xloss.losses.rollout_correction import RolloutCorrection
from xloss.metrics import Metric
from xloss.packing import Segments, rows_as_segments
from xloss.policy import weights
from xloss.policy.batch import PolicyBatch


@dataclass(frozen=True)
class Corrected:
    """A correction of each token, vectors ``[T]`` or in the shape of the labels, with what its metrics need.

    Args:
        log_ratio: ``x``; 0 at tokens that are not valid.
        raw: weight before its bounds.
        truncated: the same truncated by its bounds, 0 at tokens that are not valid.
        bounded: that, also masked by its bounds.
        weight: the one to apply: also 0 where the token is rejected or vetoed, and normalised.
        kept: neither masked nor rejected nor vetoed.
        unvetoed: not vetoed.
        valid: tokens of the loss.
        mean_log_ratio: of the token's sequence; ``None`` where sequences are not known.
        share: 1 / valid tokens of the sequence, 0 at tokens that are not valid; or ``None``.
    """

    log_ratio: Tensor
    raw: Tensor
    truncated: Tensor
    bounded: Tensor
    weight: Tensor
    kept: Tensor
    unvetoed: Tensor
    valid: Tensor
    mean_log_ratio: Tensor | None = None
    share: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> Corrected:
        """``fn`` applied to every vector present."""
        present = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{name: fn(x) for name, x in present.items() if x is not None})


def correct(cfg: RolloutCorrection, log_ratio: Tensor, valid: Tensor, sequences: Segments | None) -> Corrected:
    """Weights and masks from ``x [T]``; not yet normalised over the batch."""
    x = log_ratio.detach().masked_fill(~valid, 0)
    kept = unvetoed = valid
    raw = truncated = valid.to(x.dtype)
    if cfg.level is not None:
        raw = truncated = weights.importance_weight(x, cfg.level, sequences).masked_fill(~valid, 0)
        if cfg.action != "mask":
            truncated = cfg.truncated(raw).masked_fill(~valid, 0)
        if cfg.action != "truncate":
            kept = kept & weights.within(raw, *cfg.mask_bounds)
    bounded = truncated.masked_fill(~kept, 0)
    for r in cfg.reject:
        kept = kept & weights.within(weights.rejection_statistic(x, r.estimator, r.over, sequences), r.low, r.high)
    mean = share = None
    if sequences is not None:
        if cfg.vetoes:
            unvetoed = valid & weights.without_outliers(x, cfg.veto_low, cfg.veto_high, sequences)
            kept = kept & unvetoed
        mean = sequences.spread(sequences.mean(x))
        share = sequences.spread(1 / sequences.lengths(x).clamp(min=1)).masked_fill(~valid, 0)
    return Corrected(x, raw, truncated, bounded, bounded.masked_fill(~kept, 0), kept, unvetoed, valid, mean, share)


def correct_batches(
    kwargs_list: Sequence[Any], valid_list: Sequence[Tensor], cfg: RolloutCorrection
) -> list[Corrected]:
    """Corrections of every micro-batch from its ``old_logprobs`` and ``rollout_logprobs``, in the shape of its labels.

    ``valid_list``: tokens of the loss of each micro-batch. Weights are not yet normalised over the batch.
    """
    out = []
    for kwargs, valid in zip(kwargs_list, valid_list, strict=True):
        x = log_mismatch(kwargs.old_logprobs, kwargs.rollout_logprobs)
        out.append(_correct_one(cfg, x.masked_fill(~valid, 0), valid, kwargs.cu_seq_lens))
    return out


def mean_weight(corrected: Sequence[Corrected], cfg: RolloutCorrection, ranks: TokenRanks) -> Callable[[], Tensor]:
    """Mean weight over the tokens of the global batch (over its sequences, where those are weighed), 0-d.

    The sums over ranks are asked for now, and waited for by the call of what is returned.
    """
    counts = [c.valid if cfg.level == "token" or c.share is None else c.share for c in corrected]
    total = ranks.sum([c.bounded * n for c, n in zip(corrected, counts, strict=True)])
    count = ranks.sum(counts)
    return lambda: total.divisor() / count.divisor()


def correct_in_pass(cfg: RolloutCorrection, batch: PolicyBatch) -> tuple[Tensor, dict[str, Metric]]:
    """Weights ``[T]`` and metrics from the current log-probs, detached, where they stand for the old ones."""
    assert batch.rollout_logprobs is not None
    everything = torch.ones_like(batch.logprobs, dtype=torch.bool)
    valid = everything if batch.sequences is None else batch.sequences.valid
    found = correct(cfg, log_mismatch(batch.logprobs, batch.rollout_logprobs), valid, batch.sequences)
    return found.weight, correction_metrics(found, cfg)


def log_mismatch(logprobs: Tensor, rollout_logprobs: Tensor) -> Tensor:
    """``x = logprobs - rollout_logprobs``, in float32 at least."""
    return logprobs.detach().to(torch.promote_types(logprobs.dtype, torch.float32)) - rollout_logprobs


def _correct_one(cfg: RolloutCorrection, x: Tensor, valid: Tensor, bounds: Tensor | None) -> Corrected:
    sequences = None
    if bounds is not None or (valid.ndim == 2 and valid.shape[0] != 1):
        bounds = rows_as_segments(valid.shape, valid.device) if bounds is None else bounds
        sequences = Segments.of(bounds.to(valid.device), valid.reshape(-1))
    elif cfg.needs_sequences:
        raise MissingFieldError(
            "rollout_correction weighs or rejects whole sequences and needs cu_seq_lens_list for a pack of shape "
            f"{tuple(valid.shape)}: the bounds of its sequences, [0, {valid.numel()}] if it is one"
        )
    return correct(cfg, x.reshape(-1), valid.reshape(-1), sequences).map(lambda v: v.reshape(valid.shape))


def correction_metrics(c: Corrected, cfg: RolloutCorrection) -> dict[str, Metric]:
    """How far sampler and trainer are apart, and what the correction did about it, over the tokens of the loss.

    ``mismatch_k1``, ``_k3``: estimates of KL(sampler, trainer); ``_abs``: mean ``|x|``; ``_chi2``: mean
    ``exp(2 x) - 1``. ``rollout_is_mean``, ``_min``, ``_max`` are of the weights before their bounds, ``_std`` and
    ``_ess`` (effective sample size as a share) of those truncated by them; ``_low_frac``, ``_high_frac`` and
    ``_clip_frac`` (both): weights out of bounds; ``_mask_frac``: tokens rejected, vetoed ones included. Over sequences:
    ``mismatch_ppl_ratio``, mean of ``exp(-mean x)``; ``mismatch_log_ppl_diff``, mean of ``-mean x``;
    ``rollout_is_veto_frac``.
    """
    x, valid = c.log_ratio, c.valid

    def share_of(mask: Tensor) -> Metric:
        return Metric.mean(mask.to(x.dtype), valid)

    def over_sequences(values: Tensor) -> Metric:
        assert c.share is not None
        return Metric((values * c.share).sum(), c.share.sum(), "mean")

    safe = x.clamp(-weights.LOG_RATIO_LIMIT, weights.LOG_RATIO_LIMIT)
    metrics = {
        "mismatch_k1": Metric.mean(-x, valid),
        "mismatch_k3": Metric.mean(weights.divergence(x, "k3"), valid),
        "mismatch_abs": Metric.mean(x.abs(), valid),
        "mismatch_chi2": Metric.mean(torch.expm1(2 * safe), valid),
        "rollout_is_mask_frac": share_of(~c.kept),
    }
    if c.mean_log_ratio is not None:
        mean = c.mean_log_ratio.clamp(-weights.LOG_RATIO_LIMIT, weights.LOG_RATIO_LIMIT)
        metrics["mismatch_ppl_ratio"] = over_sequences(torch.exp(-mean))
        metrics["mismatch_log_ppl_diff"] = over_sequences(-c.mean_log_ratio)
        metrics["rollout_is_veto_frac"] = over_sequences((~c.unvetoed).to(x.dtype))
    if cfg.level is not None:
        truncated = cfg.truncated(c.raw)
        low, high = (~weights.within(c.raw, *pair) for pair in ((cfg.low, None), (None, cfg.high)))
        metrics |= {
            "rollout_is_mean": Metric.mean(c.raw, valid),
            "rollout_is_min": Metric.extreme(c.raw, "min", valid),
            "rollout_is_max": Metric.extreme(c.raw, "max", valid),
            "rollout_is_std": Metric.moments(truncated, "std", valid),
            "rollout_is_ess": Metric.moments(truncated, "ess", valid),
            "rollout_is_low_frac": share_of(low),
            "rollout_is_high_frac": share_of(high),
            "rollout_is_clip_frac": share_of(low | high),
        }
    return metrics


def mismatch_metrics(kwargs_list: Sequence[Any], valid_list: Sequence[Tensor]) -> list[dict[str, Metric]]:
    """How far sampler and trainer are apart in each micro-batch, where nothing corrects it: the ``mismatch_`` figures
    of ``correction_metrics``.
    """
    off = RolloutCorrection()
    found = correct_batches(kwargs_list, valid_list, off)
    return [
        {name: metric for name, metric in correction_metrics(c, off).items() if name.startswith("mismatch_")}
        for c in found
    ]
