"""Losses of whole sequences beyond a clipped ratio: GMPO, REAL, A*-PO; the weights of VESPO and FIPO.

A loss returns, at every token, that of the token's sequence or group, ``[T]``, to minimise: a mean over the tokens of a
sequence is then that number. ``sequences`` tells which tokens form one; sums and means run over its valid tokens.
Gradients are in ``docs/losses/policy-sequence.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xloss.packing import Segments


def gmpo(
    log_ratio: Tensor,
    advantages: Tensor,
    sequences: Segments,
    *,
    cliprange_low: float,
    cliprange_high: float,
    is_weights: Tensor | None = None,
) -> Tensor:
    """``-A exp(mean_i c)`` with the log-ratio ``d`` clipped on the side that its advantage pushes to.

    ``c = min(d, high)`` where the token's advantage is positive, ``max(d, -low)`` where negative, 0 where it is 0;
    ranges are offsets in log space. ``A`` is the mean advantage of the sequence. ``is_weights`` enter by their
    geometric mean, as in verl. Source: GMPO, arXiv 2507.20673.
    """
    clipped = torch.where(advantages > 0, log_ratio.clamp(max=cliprange_high), log_ratio.clamp(min=-cliprange_low))
    mean = sequences.mean(clipped.masked_fill(advantages == 0, 0))
    if is_weights is not None:
        mean = mean + sequences.mean(is_weights.log())
    return sequences.spread(-sequences.mean(advantages) * torch.exp(mean))


def vespo_weight(
    log_ratio: Tensor,
    advantages: Tensor,
    sequences: Segments,
    *,
    k_pos: float,
    lambda_pos: float,
    k_neg: float,
    lambda_neg: float,
    is_weights: Tensor | None = None,
) -> Tensor:
    """Detached ``phi(W) = exp(lambda + k log W - lambda W)``, 1 at ``W = 1``; the loss is ``-phi(W) A logprobs``.

    ``W = exp(sum_i d)`` is the ratio of the whole sequence, times its ``is_weights``; ``d`` is clamped to +-20 per
    token, ``log is_weights`` per token and ``log W`` as a whole to [log 1e-8, 20]. ``k`` and ``lambda`` follow the sign
    of the advantage, 0 counting as positive. Source: VESPO, arXiv 2602.10693; clamps of TRL.
    """
    lowest, highest = math.log(1e-8), 20.0
    log_w = log_ratio.detach().clamp(-20.0, 20.0)
    if is_weights is not None:
        log_w = log_w + is_weights.log().clamp(lowest, highest)
    log_w = sequences.spread(sequences.sum(log_w).clamp(lowest, highest))
    positive = advantages >= 0
    k = torch.where(positive, log_w.new_full((), k_pos), k_neg)
    rate = torch.where(positive, log_w.new_full((), lambda_pos), lambda_neg)
    return torch.exp(rate + k * log_w - rate * torch.exp(log_w))


def real(log_ratio: Tensor, advantages: Tensor, sequences: Segments, groups: Tensor, *, tau: float) -> Tensor:
    """``log(1 + sum_neg exp(s / tau)) + log(1 + sum_pos exp(-s / tau))`` of the token's group, ``s = mean_i d``.

    A sequence is positive when its mean advantage is; the sums run over the sequences of the group. A group with one
    kind only has loss 0. Source: REAL (rewards as labels), arXiv 2602.05630; split at 0 and default of ms-swift.
    """
    score = sequences.mean(log_ratio) / tau
    positive = sequences.mean(advantages) > 0
    present = sequences.lengths(log_ratio) > 0
    order, by_group = _groups(sequences, groups)
    log_sum_neg = _log_one_plus_sum_exp(score.masked_fill(positive | ~present, -torch.inf)[order], by_group)
    log_sum_pos = _log_one_plus_sum_exp((-score).masked_fill(~positive | ~present, -torch.inf)[order], by_group)
    num_pos, num_neg = (by_group.sum(side[order].to(score.dtype)) for side in (positive & present, ~positive & present))
    both = (num_pos > 0) & (num_neg > 0)
    of_group = by_group.spread(torch.where(both, log_sum_neg + log_sum_pos, 0))
    return sequences.spread(of_group[order.argsort()])


def _groups(sequences: Segments, groups: Tensor) -> tuple[Tensor, Segments]:
    """An order ``[count]`` in which the sequences of a group stand together, and the groups in that order.

    Empty sequences share one.
    """
    known = groups.to(torch.int64).masked_fill(~sequences.valid, -1)
    group = known.new_full((sequences.count,), -1).scatter_reduce(0, sequences.ids, known, "amax")
    in_order, order = group.sort(stable=True)
    starts = torch.zeros_like(in_order)
    starts[1:] = (in_order[1:] != in_order[:-1]).to(starts.dtype)
    return order, Segments(starts.cumsum(0), sequences.count, torch.ones_like(order, dtype=torch.bool))


def _log_one_plus_sum_exp(values: Tensor, by_group: Segments) -> Tensor:
    """``log(1 + sum exp(values))`` over the entries of each group, ``[count]``; -inf adds nothing."""
    highest = by_group.max(values.detach()).clamp(min=0)
    return highest + torch.log(torch.exp(-highest) + by_group.sum(torch.exp(values - by_group.spread(highest))))


def a_star_po(
    logprobs: Tensor, ref_logprobs: Tensor, advantages: Tensor, sequences: Segments, *, beta: float
) -> Tensor:
    """``(beta sum_i (logprobs - ref) - A)^2`` with ``A = R - V*``, the same for all tokens of a sequence.

    ``V*`` is ``optimal_value`` of rewards sampled from the reference. Source: A*-PO, arXiv 2505.20686.
    """
    residual = beta * sequences.sum(logprobs - ref_logprobs) - sequences.mean(advantages)
    return sequences.spread(residual.square())


def optimal_value(rewards: Tensor, beta: float = 0.5) -> Tensor:
    """``V* = beta log mean exp(R / beta)`` over the last axis: rewards of answers sampled from the reference."""
    return beta * (torch.logsumexp(rewards / beta, dim=-1) - math.log(rewards.shape[-1]))


def fipo_weight(
    log_ratio: Tensor,
    advantages: Tensor,
    sequences: Segments,
    *,
    decay_rate: float,
    cliprange: float | None,
    clip_high_only: bool,
    safety_threshold: float | None,
    participation_threshold: float | None,
) -> Tensor:
    """Detached ``clip(exp(F))``, ``F_t = sum_{s >= t} gamma^(s - t) d_s``, ``gamma = 2^(-1 / decay_rate)``.

    Clipped to ``[1, 1 + cliprange]``, or from ``1 - cliprange`` unless ``clip_high_only``. Tokens of a ratio above
    ``participation_threshold`` do not feed the sum. Where ``A < 0`` and the token's own ratio is above
    ``safety_threshold``, the weight is clamped to [0.8, 1]. Source: FIPO, arXiv 2603.19835; options of ms-swift.
    """
    log_ratio = log_ratio.detach()
    feeding = log_ratio
    if participation_threshold is not None:
        feeding = log_ratio.masked_fill(log_ratio > math.log(participation_threshold), 0)
    weight = torch.exp(sequences.discounted_future(feeding, 2.0 ** (-1.0 / decay_rate)))
    if cliprange is not None:
        weight = weight.clamp(1.0 if clip_high_only else 1.0 - cliprange, 1.0 + cliprange)
    if safety_threshold is not None:
        unsafe = (advantages < 0) & (log_ratio > math.log(safety_threshold))
        weight = torch.where(unsafe, weight.clamp(0.8, 1.0), weight)
    return weight
