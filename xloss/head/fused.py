"""``mode="fused"``: row work in Triton kernels, which read raw logits where the GEMM wrote them.

The buffer keeps raw logits until ``backward`` or ``loss_rows`` overwrites it with their gradient. With bf16 operands
that gradient is written as bf16 into the first half of each float32 row, ready for the tensor cores: no second buffer,
no cast.
"""

from __future__ import annotations

import torch
from torch import Tensor

from xloss.head.backend import Adjoints, LossTwin, RawRows, RowState
from xloss.head.options import HeadOptions
from xloss.stats import StatSpec, TokenStats
from xloss_kernels.dlogits import dlogits
from xloss_kernels.policy_rows import PolicySpec, policy_rows
from xloss_kernels.row_stats import row_stats
from xloss_kernels.scale import cast_scale, scale_
from xloss_kernels.transform import Transform

_TWIN_STATS = StatSpec(entropy=True)  # what the loss kernel returns beside log-probs and lse


def forward(rows: RawRows, options: HeadOptions, *, for_backward: bool) -> RowState:
    """One read of the logits, which stay as they are."""
    want = options.stats
    found = row_stats(
        rows.logits,
        rows.labels,
        _transform(rows, options),
        ignore_index=options.ignore_index,
        entropy=want.entropy,
        mean_logit=want.mean_logit,
        sum_p2=want.sum_p2,
        top1=want.top1,
    )
    return RowState(rows, TokenStats(**found._asdict()))


def resume(rows: RawRows, options: HeadOptions, stats: TokenStats) -> RowState:
    """Nothing to do: the kernels start from raw logits."""
    return RowState(rows, stats)


def backward(state: RowState, adjoints: Adjoints, options: HeadOptions, operand: torch.dtype) -> Tensor:
    """One read and one write of the logits."""
    rows, stats = state.rows, state.stats
    given = {name: value.float().contiguous() for name, value in adjoints.items()}
    return dlogits(
        rows.logits,
        rows.labels,
        stats.lse,
        _transform(rows, options),
        entropy=stats.entropy,
        sum_p2=stats.sum_p2,
        d_logprobs=given.get("logprobs"),
        d_entropy=given.get("entropy"),
        d_lse=given.get("lse"),
        d_mean_logit=given.get("mean_logit"),
        d_sum_p2=given.get("sum_p2"),
        out=_out(rows.logits, operand),
        ignore_index=options.ignore_index,
    )


def loss_rows(
    rows: RawRows, options: HeadOptions, twin: LossTwin, operand: torch.dtype
) -> tuple[TokenStats, Tensor, Tensor] | None:
    """The loss in registers between two reads; ``None`` where statistics are wanted that the kernel does not return."""
    if (options.stats | _TWIN_STATS) != _TWIN_STATS or rows.labels.ndim != 1:
        return None
    out = _out(rows.logits, operand)
    vectors = {name: None if v is None else v.float().contiguous() for name, v in twin.vectors.items()}
    found = policy_rows(
        rows.logits,
        rows.labels,
        PolicySpec(loss=twin.loss, kl=twin.kl, kl_grad=twin.kl_grad, **twin.numbers),  # type: ignore[arg-type]
        _transform(rows, options),
        **vectors,  # type: ignore[arg-type]
        out=out,
        entropy=options.stats.entropy,
        ignore_index=options.ignore_index,
    )
    stats = TokenStats(found.logprobs, found.lse, found.entropy if options.stats.entropy else None)
    return stats, found.loss, out


def scale(grad: Tensor, upstream: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
    """The kernel reads the upstream scalar on the device; where it is 1 and nothing is cast, it does nothing else."""
    upstream = upstream.float()
    if in_place and grad.dtype == dtype:
        return scale_(grad, upstream)
    return cast_scale(grad, dtype, upstream)


def _transform(rows: RawRows, options: HeadOptions) -> Transform:
    bias = None if rows.bias is None else rows.bias.contiguous()
    return Transform(options.logit_scale, options.softcap, rows.temperature, bias)


def _out(logits: Tensor, operand: torch.dtype) -> Tensor:
    """Where the gradient goes: over the logits, or as bf16 into the first half of each float32 row."""
    if operand == torch.bfloat16 and logits.dtype == torch.float32:
        return logits.view(torch.bfloat16)[:, : logits.shape[1]]
    return logits
