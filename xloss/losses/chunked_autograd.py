"""A custom ``loss_fn`` run chunk by chunk: each chunk is differentiated at once, so only its logits live."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from xloss.errors import GraphError, OptionError
from xloss.head.first_order import first_order
from xloss.head.gemm import accumulate_dtype
from xloss.head.plan import Plan

if TYPE_CHECKING:
    from xloss.losses.base import BaseLossContext

Extra = dict[str, Any]


def run_chunked(
    ctx: BaseLossContext[Any], hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan
) -> tuple[Tensor, list[Extra]]:
    """Sum of ``loss_fn`` over chunks along the last token axis, with gradients; and each chunk's extra info."""
    extras: list[Extra] = []
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    rows = hidden.shape[0] if hidden.ndim == 3 else 1
    pieces = ctx.loss_kwargs.chunk(max(1, plan.chunk_rows // max(rows, 1)))
    if not tracked:
        losses, start = [], 0
        for piece in pieces:
            stop = start + piece.shifted_labels.shape[-1]
            losses.append(_call(ctx, hidden[..., start:stop, :], weight, bias, piece, extras))
            start = stop
        return torch.stack(losses).sum(), extras
    loss: Tensor = _ChunkedAutograd.apply(hidden, weight, bias, ctx, pieces, extras)
    return loss, extras


def split_result(result: Any) -> tuple[Tensor, Tensor | None, dict[str, Any]]:
    """What a ``loss_fn`` may return, as ``(loss, logits, extra_info)``."""
    pair: tuple[Any, Any] = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
    loss, rest = pair
    more: tuple[Any, Any] = rest if isinstance(rest, tuple) and len(rest) == 2 else (rest, {})
    logits, extra = more
    if not isinstance(loss, Tensor) or loss.ndim != 0:
        raise OptionError("loss_fn must return a scalar loss, (loss, logits) or (loss, (logits, extra_info))")
    return loss, logits, dict(extra or {})


def _call(
    ctx: BaseLossContext[Any], hidden: Tensor, weight: Tensor, bias: Tensor | None, piece: Any, extras: list[Extra]
) -> Tensor:
    loss, _, extra = split_result(ctx.loss_fn(hidden, weight, bias, piece))
    extras.append({k: v.detach() if isinstance(v, Tensor) else v for k, v in extra.items()})
    return loss


class _ChunkedAutograd(torch.autograd.Function):
    @staticmethod
    def forward(
        fctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ctx: BaseLossContext[Any],
        pieces: list[Any],
        extras: list[Extra],
    ) -> Tensor:
        whole = (hidden, weight, bias)
        need = [t is not None and n for t, n in zip(whole, fctx.needs_input_grad[:3], strict=True)]
        sums = [
            torch.zeros(t.shape, dtype=accumulate_dtype(t.dtype), device=t.device) if t is not None and n else None
            for t, n in zip(whole, need, strict=True)
        ]
        total = torch.zeros((), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
        head = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(whole[1:], need[1:], strict=True)]
        start = 0
        for piece in pieces:
            span = slice(start, start + piece.shifted_labels.shape[-1])
            leaf = hidden[..., span, :].detach().requires_grad_(need[0])
            with torch.enable_grad():
                loss = _call(ctx, leaf, head[0], head[1], piece, extras)  # type: ignore[arg-type]
            total += loss.detach()
            start = span.stop
            wanted = [x for x, n in zip((leaf, *head), need, strict=True) if n and x is not None]
            if not loss.requires_grad:
                continue
            grads = iter(torch.autograd.grad(loss, wanted, allow_unused=True))
            for i, acc in enumerate(sums):
                grad = next(grads) if acc is not None else None
                if acc is not None and grad is not None:
                    (acc[..., span, :] if i == 0 else acc).add_(grad)
        fctx.save_for_backward(*sums)
        fctx.dtypes = [None if t is None else t.dtype for t in whole]
        fctx.keep, fctx.spent = ctx.loss_cfg.allow_retain_graph, False
        return total

    @staticmethod
    @first_order
    def backward(fctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if fctx.spent:
            raise GraphError("backward ran a second time through a chunked loss_fn; set allow_retain_graph=True")
        fctx.spent = not fctx.keep
        out: list[Tensor | None] = []
        for grad, dtype in zip(fctx.saved_tensors, fctx.dtypes, strict=True):
            if grad is None or dtype is None:
                out.append(None)
            else:
                scaled = grad * grad_loss if fctx.keep else grad.mul_(grad_loss.to(grad.dtype))
                out.append(scaled.to(dtype))
        return (*out, None, None, None)
