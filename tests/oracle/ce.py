"""Cross-entropy over one optimizer step of packed micro-batches, from the definitions.

loss_b = sum_t w_t (ce_t + z lse_t^2) / W          W = sum of w over all micro-batches
ce_t   = -sum_v q_v log p_t[v], where q has 1 - s on the label y_t and, over all V tokens (torch.nn.functional
         .cross_entropy), s / V more on each; or (Megatron-LM) s / (V - 1) on each other token
         or, of the label alone, with p = p_t[y_t]:
         focal -(1 - p)^gamma log p      DFT -sg(p) log p      CHORD-phi -sg(p (1 - p)) min(log p, log cutoff)
w_t    = 0 at ignored labels, else 1 (token), 1 / n_i (sample), 1 / sqrt(n_i) (square)
n_i    = number of labels of packed sample i that are not ignored
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from tests.oracle.head import Head, Stats, token_stats


def segment_bounds(labels: Tensor, cu_seq_lens: Tensor | None) -> list[tuple[int, int]]:
    """[start, end) of every sample in the flattened labels; without cu_seq_lens each row of [B, S] is one sample."""
    if cu_seq_lens is not None:
        return list(pairwise(cu_seq_lens.tolist()))
    rows, length = (1, labels.shape[0]) if labels.dim() == 1 else (labels.shape[0], labels.shape[1])
    return [(r * length, (r + 1) * length) for r in range(rows)]


def raw_weights(labels: Tensor, cu_seq_lens: Tensor | None, reduction: str, ignore_index: int = -100) -> Tensor:
    """w, before the division by its global sum; in the shape of the labels."""
    known = (labels.reshape(-1) != ignore_index).double()
    weight = torch.zeros_like(known)
    for start, end in segment_bounds(labels, cu_seq_lens):
        n = float(known[start:end].sum())
        power = {"token": 0.0, "sample": 1.0, "square": 0.5}[reduction]
        if n > 0:
            weight[start:end] = known[start:end] / n**power
    return weight.reshape(labels.shape)


def step_weights(
    labels: Sequence[Tensor],
    cu_seq_lens: Sequence[Tensor | None] | None = None,
    reduction: str = "token",
    loss_weight: Sequence[Tensor | None] | None = None,
    ignore_index: int = -100,
) -> list[Tensor]:
    """Per-token weights of every micro-batch, global denominator included; all zero if no token counts."""
    cus = cu_seq_lens or [None] * len(labels)
    raw = [raw_weights(y, cu, reduction, ignore_index) for y, cu in zip(labels, cus, strict=True)]
    if loss_weight is not None:
        raw = [w if u is None else w * u.double() for w, u in zip(raw, loss_weight, strict=True)]
    total = sum(float(w.sum()) for w in raw)
    return [w / total if total else torch.zeros_like(w) for w in raw]


def token_loss(
    stats: Stats,
    z_loss_coef: float = 0.0,
    label_smoothing: float = 0.0,
    focal_gamma: float = 0.0,
    token_scaling: str | None = None,
    cutoff_prob: float = 1.0,
    others_of: int | None = None,
) -> Tensor:
    """ce_t + z lse_t^2 in the shape of the labels; 0 at ignored labels. `others_of`: V, for Megatron's smoothing."""
    logp = stats.logprobs
    p = logp.detach().exp()
    if focal_gamma:
        certain = logp == 0  # loss 0, and for gamma < 1 a slope that autograd cannot take (ignored labels too)
        open_ = logp.where(~certain, torch.full_like(logp, -1.0))
        loss = (-((1.0 - open_.exp()) ** focal_gamma) * open_).masked_fill(certain, 0.0)
    elif token_scaling == "dft":
        loss = -p * logp
    elif token_scaling == "chord_phi":
        loss = -p * (1.0 - p) * torch.minimum(logp, torch.full_like(logp, cutoff_prob).log())
    elif others_of is not None:
        sum_of_others = others_of * (stats.mean_logit - stats.lse) - logp
        loss = -(1.0 - label_smoothing) * logp - label_smoothing / (others_of - 1) * sum_of_others
    else:
        mean_logp = stats.mean_logit - stats.lse
        loss = -(1.0 - label_smoothing) * logp - label_smoothing * mean_logp
    return loss + z_loss_coef * stats.lse**2


def loss(
    hidden: Tensor,
    weight: Tensor,
    labels: Tensor,
    weights: Tensor,
    bias: Tensor | None = None,
    head: Head | None = None,
    **options: Any,
) -> Tensor:
    """sum_t weights_t token_loss_t of one micro-batch."""
    return (weights * token_loss(token_stats(hidden, weight, labels, bias, head), **options)).sum()


def soft(logits: Tensor, targets: Tensor, target_weights: Tensor, ignore_index: int = -100) -> Tensor:
    """-sum_k w_k log p[y_k] of every token of logits [N, V], targets [N, K]; ignored targets count nothing."""
    rows = []
    for z, ys, ws in zip(logits.double(), targets, target_weights.double(), strict=True):
        logp = torch.log_softmax(z, 0)
        terms = [-w * logp[y] for y, w in zip(ys.tolist(), ws, strict=True) if y != ignore_index]
        rows.append(torch.stack(terms).sum() if terms else z.sum() * 0)
    return torch.stack(rows) if rows else logits.double().sum(1)


def rolled(values: list[Any], bounds: Sequence[int], shift: int, fill: Any) -> list[Any]:
    """Every packed sample moved `shift` places to the left, sample by sample."""
    out: list[Any] = []
    for start, end in pairwise(bounds):
        sample = values[start:end]
        out += (sample[shift:] + [fill] * min(shift, len(sample)))[: len(sample)]
    return out
