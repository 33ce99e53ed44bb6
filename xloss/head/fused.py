"""``mode="fused"``: row work in Triton kernels, which read raw logits where the GEMM wrote them.

The buffer keeps raw logits until ``backward`` or ``loss_rows`` overwrites it with their gradient. With bf16 operands
that gradient is written as bf16 into the first half of each float32 row, ready for the tensor cores: no second buffer,
no cast. ``head_stats`` and ``strip_dlogits`` need no logits: they start from hidden states.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xloss.head.backend import Adjoints, LossTwin, RawRows, RowState, TokenRows
from xloss.head.options import HeadOptions
from xloss.head.transform import transform_
from xloss.stats import TokenStats
from xloss_kernels.dlogits import dlogits
from xloss_kernels.finalize import finalize
from xloss_kernels.head_backward import head_dlogits
from xloss_kernels.head_forward import head_forward
from xloss_kernels.policy_rows import PolicySpec, policy_rows
from xloss_kernels.row_stats import row_stats
from xloss_kernels.scale import cast_scale, scale_
from xloss_kernels.transform import Transform


def forward(rows: RawRows, options: HeadOptions, *, for_backward: bool) -> RowState:
    """One read of the logits, which stay as they are."""
    found = row_stats(
        rows.logits,
        rows.labels,
        _transform(rows, options),
        ignore_index=options.ignore_index,
        **_wanted(options),
    )
    peak = _peak_logits(rows, found.top1, options) if rows.part is not None and found.top1 is not None else None
    return RowState(rows, TokenStats(**found._asdict()), peak=peak)


def resume(rows: RawRows, options: HeadOptions, stats: TokenStats) -> RowState:
    """Nothing to do: the kernels start from raw logits."""
    return RowState(rows, stats)


def backward(state: RowState, adjoints: Adjoints, options: HeadOptions, operand: torch.dtype) -> Tensor:
    """One read and one write of the logits."""
    rows, stats = state.rows, state.stats
    return dlogits(
        rows.logits,
        rows.labels,
        stats.lse,
        _transform(rows, options),
        **_known(stats, adjoints),
        out=_out(rows.logits, operand),
        ignore_index=options.ignore_index,
    )


def loss_rows(
    rows: RawRows, options: HeadOptions, twin: LossTwin, operand: torch.dtype
) -> tuple[TokenStats, Tensor, Tensor] | None:
    """The loss in registers between two reads; ``None`` for several labels a token, which the kernel does not take."""
    if rows.labels.ndim != 1:
        return None
    want = _wanted(options)
    out = _out(rows.logits, operand)
    vectors = {name: None if v is None else v.float().contiguous() for name, v in twin.vectors.items()}
    found = policy_rows(
        rows.logits,
        rows.labels,
        PolicySpec(loss=twin.loss, kl=twin.kl, kl_grad=twin.kl_grad, **twin.numbers),  # type: ignore[arg-type]
        _transform(rows, options),
        **vectors,  # type: ignore[arg-type]
        out=out,
        **want,
        ignore_index=options.ignore_index,
    )
    asked = {name: getattr(found, name) for name, wanted in want.items() if wanted}
    stats = TokenStats(found.logprobs, found.lse, **asked)
    return stats, found.loss, out


def head_stats(rows: TokenRows, options: HeadOptions) -> tuple[TokenStats, Tensor | None]:
    """Partial statistics of vocabulary splits in registers, merged in a fixed order."""
    want = _wanted(options)
    partials, label_logits = head_forward(rows.hidden, rows.weight, rows.labels, _transform(rows, options), **want)
    found = finalize(
        partials, label_logits, rows.labels, rows.weight.shape[0], ignore_index=options.ignore_index, **want
    )
    peak = partials[:, 0].amax(0) if rows.part is not None and options.stats.top1 else None
    return TokenStats(**found._asdict()), peak


def strip_dlogits(
    rows: TokenRows, stats: TokenStats, adjoints: Adjoints, options: HeadOptions, strip: slice, out: Tensor
) -> Tensor:
    """The strip's logits once more, turned into their gradient before they are written."""
    whole = _transform(rows, options)
    return head_dlogits(
        rows.hidden,
        rows.weight[strip],
        rows.labels,
        stats.lse,
        whole if whole.bias is None else replace(whole, bias=whole.bias[strip]),
        **_known(stats, adjoints),
        ignore_index=options.ignore_index,
        first_column=strip.start,
        whole_vocab=rows.weight.shape[0],
        out=out,
    )


def scale(grad: Tensor, upstream: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """The kernel reads the upstream scalar on the device; where it is 1 and nothing is cast, it does nothing else."""
    upstream = upstream.float()
    if in_place and grad.dtype == dtype:
        return scale_(grad, upstream)
    return cast_scale(grad, dtype, upstream)


def _wanted(options: HeadOptions) -> dict[str, Any]:
    """The statistics this call wants of the kernels; a divergence is not among theirs, and is refused before."""
    return {name: getattr(options.stats, name) for name in ("entropy", "mean_logit", "sum_p2", "top1")}


def _known(stats: TokenStats, adjoints: Adjoints) -> dict[str, Any]:
    """What a dlogits kernel is told: the adjoints, and the statistics their formulas need."""
    given = {f"d_{name}": value.float().contiguous() for name, value in adjoints.items()}
    return {"entropy": stats.entropy, "sum_p2": stats.sum_p2, **given}


def _peak_logits(rows: RawRows, top1: Tensor, options: HeadOptions) -> Tensor:
    """The effective logits at ``top1``, of raw ones."""
    at = top1.clamp(min=0)
    raw = rows.logits.gather(1, at.unsqueeze(1)).float()
    bias = None if rows.bias is None else rows.bias[at].unsqueeze(1)
    return transform_(raw, bias, rows.temperature, options.logit_scale, options.softcap).squeeze(1)


def _transform(rows: RawRows | TokenRows, options: HeadOptions) -> Transform:
    bias = None if rows.bias is None else rows.bias.contiguous()
    return Transform(options.logit_scale, options.softcap, rows.temperature, bias)


def _out(logits: Tensor, operand: torch.dtype) -> Tensor:
    """Where the gradient goes: over the logits, or as bf16 into the first half of each float32 row."""
    if operand == torch.bfloat16 and logits.dtype == torch.float32:
        return logits.view(torch.bfloat16)[:, : logits.shape[1]]
    return logits
