"""Token statistics of a chunk of logits, in one read.

    lse = logsumexp(z)     logprobs_k = z[y_k] - lse     entropy = lse - sum(p z)
    mean_logit = sum(z) / V     sum_p2 = sum(p^2)        top1 = lowest argmax(z)

with z the effective logits of `transform.py`. One program per row; no atomics, so every run gives the same bits, and a
row's result does not depend on the other rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from xloss_kernels import tiles, tuned
from xloss_kernels.checks import check_rows
from xloss_kernels.rows import label_logits, row_softmax
from xloss_kernels.transform import Transform, row_inv_temperature


class RowStats(NamedTuple):
    """Float32 vectors [C] (logprobs [C] or [C, K] as the labels; top1 int64); None where not asked for.

    Rows whose labels are all ignored are 0, with top1 -1; so is the logprob of an ignored label of a live row.
    A label outside [0, V) has logprob -inf.
    """

    lse: torch.Tensor
    logprobs: torch.Tensor
    entropy: torch.Tensor | None
    mean_logit: torch.Tensor | None
    sum_p2: torch.Tensor | None
    top1: torch.Tensor | None


@triton.jit
def store_stats(row, mask, live_row, lse_value, entropy_value, mean_value, p2_value, top1_value,
                lse, entropy, mean_logit, sum_p2, top1):  # fmt: skip
    """Store what is asked for at `row` (a scalar or a block), zeros (top1 -1) where the row is not live."""
    tl.store(lse + row, tl.where(live_row, lse_value, 0.0), mask=mask)
    if entropy is not None:
        tl.store(entropy + row, tl.where(live_row, entropy_value, 0.0), mask=mask)
    if mean_logit is not None:
        tl.store(mean_logit + row, tl.where(live_row, mean_value, 0.0), mask=mask)
    if sum_p2 is not None:
        tl.store(sum_p2 + row, tl.where(live_row, p2_value, 0.0), mask=mask)
    if top1 is not None:
        tl.store(top1 + row, tl.where(live_row, top1_value, -1).to(tl.int64), mask=mask)


@triton.jit
def row_stats_kernel(logits, labels, bias, temperature, lse, logprobs, entropy, mean_logit, sum_p2, top1,
                     num_vocab, num_labels, row_stride, ignore_index, logit_scale, softcap, inv_temperature,
                     LABELS: tl.constexpr, FOLD: tl.constexpr, LANES: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, LABELS)
    ids = tl.load(labels + row * num_labels + k, mask=k < num_labels, other=ignore_index)
    counted = ids != ignore_index
    if tl.max(counted.to(tl.int32), 0) == 0:
        tl.store(logprobs + row * num_labels + k, tl.zeros((LABELS,), tl.float32), mask=k < num_labels)
        store_stats(row, None, False, 0.0, 0.0, 0.0, 0.0, 0, lse, entropy, mean_logit, sum_p2, top1)
        return

    start = logits + row * row_stride
    inverse = row_inv_temperature(temperature, row, inv_temperature)
    peak, log_total, entropy_value, mean_value, p2_value, best = row_softmax(
        start, bias, num_vocab, logit_scale, softcap, inverse, entropy is not None, mean_logit is not None,
        sum_p2 is not None, top1 is not None, "evict_first", FOLD, LANES)  # fmt: skip
    inside = counted & (ids >= 0) & (ids < num_vocab)
    z, _ = label_logits(start, bias, ids, inside, logit_scale, softcap, inverse)
    logprob = tl.where(counted, (z - peak) - log_total, 0.0)
    tl.store(logprobs + row * num_labels + k, logprob, mask=k < num_labels)
    store_stats(row, None, True, peak + log_total, entropy_value, mean_value, p2_value, best,
                lse, entropy, mean_logit, sum_p2, top1)  # fmt: skip


def row_stats(
    logits: torch.Tensor,
    labels: torch.Tensor,
    transform: Transform | None = None,
    *,
    ignore_index: int = -100,
    entropy: bool = False,
    mean_logit: bool = False,
    sum_p2: bool = False,
    top1: bool = False,
    tile: tiles.RowTile | None = None,
) -> RowStats:
    """Statistics of raw `logits` [C, V] (float32, bf16 or fp16; any row stride) at `labels` int64 [C] or [C, K]."""
    num_rows, num_vocab, num_labels = check_rows(logits, labels)
    transform = transform or Transform()
    tile = tile or tuned.row("row_stats", logits.device, num_vocab, logits.dtype)

    def vector(wanted: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        return torch.empty(num_rows, dtype=dtype, device=logits.device) if wanted else None

    lse = torch.empty(num_rows, dtype=torch.float32, device=logits.device)
    logprobs = torch.empty(labels.shape, dtype=torch.float32, device=logits.device)
    stats = RowStats(lse, logprobs, vector(entropy), vector(mean_logit), vector(sum_p2), vector(top1, torch.int64))
    if num_rows:
        row_stats_kernel[(num_rows,)](
            logits=logits,
            labels=labels,
            **stats._asdict(),
            num_vocab=num_vocab,
            num_labels=num_labels,
            row_stride=logits.stride(0),
            ignore_index=ignore_index,
            **transform.arguments(num_rows, num_vocab),
            LABELS=triton.next_power_of_2(num_labels),
            FOLD=tile.fold,
            LANES=tile.lanes,
            **tile.options(),
        )
    return stats
