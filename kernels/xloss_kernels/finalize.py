"""Partial statistics of vocabulary splits -> the outputs of `row_stats`, in a fixed order.

Their layout is in head_forward.py.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xloss_kernels import online, tiles
from xloss_kernels.checks import check_labels, check_vectors
from xloss_kernels.row_stats import RowStats, store_stats

_ELEMENTS = 4096


@triton.jit
def load_merged(partials, rows, row_mask, num_splits, num_tokens, ENTROPY: tl.constexpr, MEAN: tl.constexpr,
                SUM_P2: tl.constexpr, TOP1: tl.constexpr, SPLITS: tl.constexpr):  # fmt: skip
    """Merge all splits of `rows`: six vectors."""
    splits = tl.arange(0, SPLITS)
    at = partials + splits.to(tl.int64)[:, None] * 6 * num_tokens + rows[None, :]
    mask = (splits < num_splits)[:, None] & row_mask[None, :]
    peak = tl.load(at, mask=mask, other=online.NEG_INF)
    total = tl.load(at + num_tokens, mask=mask, other=0.0)
    moment = tl.load(at + 2 * num_tokens, mask=mask & ENTROPY, other=0.0)
    square = tl.load(at + 3 * num_tokens, mask=mask & SUM_P2, other=0.0)
    plain = tl.load(at + 4 * num_tokens, mask=mask & MEAN, other=0.0)
    best = tl.load(at + 5 * num_tokens, mask=mask & TOP1, other=0.0).to(tl.int32)
    return online.merge(peak, total, moment, square, plain, best, 0, ENTROPY, MEAN, SUM_P2, TOP1)


@triton.jit
def finalize_kernel(partials, label_logits, labels, lse, logprobs, entropy, mean_logit, sum_p2, top1,
                    num_splits, num_tokens, num_labels, num_vocab, ignore_index,
                    SPLITS: tl.constexpr, ROWS: tl.constexpr):  # fmt: skip
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    row_mask = rows < num_tokens
    peak, total, moment, square, plain, best = load_merged(
        partials, rows, row_mask, num_splits, num_tokens, entropy is not None, mean_logit is not None,
        sum_p2 is not None, top1 is not None, SPLITS)  # fmt: skip
    log_total, entropy_value, mean_value, p2_value = online.conclude(total, moment, square, plain, num_vocab)
    live_row = rows < 0
    for k in range(num_labels):
        at = rows * num_labels + k
        counted = tl.load(labels + at, mask=row_mask, other=ignore_index) != ignore_index
        z = tl.load(label_logits + at, mask=row_mask, other=0.0)
        tl.store(logprobs + at, tl.where(counted, (z - peak) - log_total, 0.0), mask=row_mask)
        live_row = live_row | counted
    store_stats(rows, row_mask, live_row, peak + log_total, entropy_value, mean_value, p2_value, best,
                lse, entropy, mean_logit, sum_p2, top1)  # fmt: skip


def _launch_shape(partials: torch.Tensor) -> tuple[int, int, dict[str, object]]:
    assert (
        partials.ndim == 3 and partials.shape[1] == 6 and partials.dtype == torch.float32 and partials.is_contiguous()
    )
    splits = triton.next_power_of_2(partials.shape[0])
    rows = max(1, _ELEMENTS // splits)
    options = {"SPLITS": splits, "ROWS": rows, "num_warps": 8, "enable_fp_fusion": tiles.FP_FUSION}
    return partials.shape[2], triton.cdiv(partials.shape[2], rows), options


def finalize(
    partials: torch.Tensor,
    label_logits: torch.Tensor,
    labels: torch.Tensor,
    num_vocab: int,
    *,
    ignore_index: int = -100,
    entropy: bool = False,
    mean_logit: bool = False,
    sum_p2: bool = False,
    top1: bool = False,
) -> RowStats:
    """RowStats from partials [num_splits, 6, T] and label_logits, both as in head_forward.py, for labels [T] or [T, K].

    Ask for no statistic that the partials were made without. `num_vocab` is the size of the whole vocabulary.
    """
    num_tokens, programs, options = _launch_shape(partials)
    num_labels = check_labels(labels, num_tokens)
    check_vectors(tuple(labels.shape), label_logits=label_logits)

    def vector(wanted: bool, dtype: torch.dtype = torch.float32) -> torch.Tensor | None:
        return torch.empty(num_tokens, dtype=dtype, device=partials.device) if wanted else None

    lse = torch.empty(num_tokens, dtype=torch.float32, device=partials.device)
    stats = RowStats(lse, torch.empty_like(label_logits), vector(entropy), vector(mean_logit), vector(sum_p2),
                     vector(top1, torch.int64))  # fmt: skip
    if num_tokens:
        finalize_kernel[(programs,)](
            partials=partials, label_logits=label_logits, labels=labels, **stats._asdict(),
            num_splits=partials.shape[0], num_tokens=num_tokens, num_labels=num_labels, num_vocab=num_vocab,
            ignore_index=ignore_index, **options)  # fmt: skip
    return stats
