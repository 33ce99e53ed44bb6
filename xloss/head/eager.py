"""``mode="eager"``: the logits of all tokens, plain autograd. The oracle, and the only mode that returns logits."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from xloss.head.gemm import accumulate_dtype
from xloss.head.options import HeadInputs, HeadOptions, LiveRows, rows_of
from xloss.head.teacher import Teacher
from xloss.head.transform import column
from xloss.policy.divergence import FLOOR, divergence
from xloss.stats import TokenStats, mask_ignored


def live_stats(inputs: HeadInputs, options: HeadOptions, rows: LiveRows) -> tuple[TokenStats, Tensor]:
    """Statistics of live rows, in live order, and their transformed logits ``[num_live, V]``."""
    z = _logits(inputs, options, rows, 0, rows.num_live)
    found = _divergence(z, inputs.teacher, rows) if inputs.teacher is not None else None
    return stats_of_logits(z, rows.take(inputs.labels, 0, rows.num_live), options, found), z


def _divergence(z: Tensor, teacher: Teacher, rows: LiveRows) -> Tensor:
    places = slice(0, rows.num_live) if rows.index is None else rows.index
    other = teacher.rows(places, torch.empty_like(z))
    return divergence(z.clamp(min=FLOOR) / column(other.student_temperature), other.logits, other.divergence)


def all_logits(inputs: HeadInputs, options: HeadOptions, rows: LiveRows, live: Tensor) -> Tensor:
    """Logits of all rows ``[T, V]`` from those of the live ones; the others are made without gradient."""
    if rows.index is None:
        return live
    dead = torch.ones(rows.total, dtype=torch.bool, device=live.device).index_fill(0, rows.index, False).nonzero()
    others = LiveRows(rows.total, dead.numel(), 0, dead.squeeze(1))
    with torch.no_grad():
        rest = _logits(inputs, options, others, 0, others.num_live)
    return rows.spread(live).index_copy(0, dead.squeeze(1), rest)


def _logits(inputs: HeadInputs, options: HeadOptions, rows: LiveRows, start: int, stop: int) -> Tensor:
    acc = accumulate_dtype(inputs.operand_dtype)
    hidden = rows.take(inputs.hidden, start, stop)
    temperature = rows_of(inputs.temperature, rows, start, stop)
    with torch.autocast(hidden.device.type, enabled=False):
        z = F.linear(hidden.to(inputs.operand_dtype).to(acc), inputs.weight.to(inputs.operand_dtype).to(acc))
        if inputs.lora is not None:
            z = z + F.linear(inputs.lora.down(hidden).to(acc), inputs.lora.up().to(acc))
    if inputs.bias is not None:
        z = z + inputs.bias.to(acc)
    z = z * options.logit_scale
    if options.softcap is not None:
        z = options.softcap * torch.tanh(z / options.softcap)
    return z / (temperature.unsqueeze(1) if isinstance(temperature, Tensor) else temperature)


def stats_of_logits(z: Tensor, labels: Tensor, options: HeadOptions, found: Tensor | None = None) -> TokenStats:
    """Statistics of transformed logits ``[T, V]`` at labels ``[T]`` or ``[T, K]``, by autograd; ``found`` beside."""
    spec = options.stats
    logp = torch.log_softmax(z, dim=1)
    index = labels.clamp(0, z.shape[1] - 1)
    picked = logp.gather(1, index if labels.ndim == 2 else index.unsqueeze(1)).view(labels.shape)
    p = logp.exp() if spec.entropy or spec.sum_p2 else None
    stats = TokenStats(
        logprobs=picked,
        lse=torch.logsumexp(z, dim=1),
        entropy=None if p is None or not spec.entropy else -(p * logp.masked_fill(p == 0, 0)).sum(1),
        mean_logit=z.mean(1) if spec.mean_logit else None,
        sum_p2=None if p is None or not spec.sum_p2 else p.square().sum(1),
        top1=z.detach().argmax(1) if spec.top1 else None,
        divergence=found,
    )
    return mask_ignored(stats, labels, options.ignore_index)
