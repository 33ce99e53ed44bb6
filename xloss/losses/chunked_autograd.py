"""A custom ``loss_fn`` run chunk by chunk: each chunk is differentiated at once, so only its logits live."""

from __future__ import annotations

from dataclasses import dataclass
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
Inputs = tuple[Tensor, Tensor, Tensor | None]


def run_chunked(
    ctx: BaseLossContext[Any], hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: Plan
) -> tuple[Tensor, list[Extra]]:
    """Sum of ``loss_fn`` over chunks along the last token axis, with gradients; and each chunk's extra info."""
    extras: list[Extra] = []
    tracked = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (hidden, weight, bias))
    rows = hidden.shape[0] if hidden.ndim == 3 else 1
    pieces = ctx.loss_kwargs.chunk(max(1, plan.chunk_rows // max(rows, 1)))
    job = _Job(ctx, pieces)
    if not tracked:
        return job.run((hidden, weight, bias), (False,) * 3, extras)[0], extras
    loss: Tensor = _ChunkedAutograd.apply(hidden, weight, bias, job, extras)
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


@dataclass(frozen=True)
class _Job:
    """A custom loss cut in pieces: ``run`` takes the loss of each, and its gradients if they are wanted."""

    ctx: BaseLossContext[Any]
    pieces: list[Any]

    def run(
        self, inputs: Inputs, need: tuple[bool, ...], extras: list[Extra], upstream: Tensor | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Sum of the pieces' losses (times ``upstream``) and the gradients of the ``inputs`` that ``need`` them."""
        hidden = inputs[0]
        sums = [
            torch.zeros(t.shape, dtype=accumulate_dtype(t.dtype), device=t.device) if t is not None and n else None
            for t, n in zip(inputs, need, strict=True)
        ]
        total = torch.zeros((), dtype=accumulate_dtype(hidden.dtype), device=hidden.device)
        head = [None if t is None else t.detach().requires_grad_(n) for t, n in zip(inputs[1:], need[1:], strict=True)]
        start = 0
        for piece in self.pieces:
            span = slice(start, start + piece.shifted_labels.shape[-1])
            start = span.stop
            leaf = hidden[..., span, :].detach().requires_grad_(need[0])
            with torch.set_grad_enabled(any(need)):
                loss = _call(self.ctx, leaf, head[0], head[1], piece, extras)  # type: ignore[arg-type]
                scaled = loss if upstream is None else loss * upstream
            total += loss.detach()
            if not scaled.requires_grad:
                continue
            wanted = [x for x, acc in zip((leaf, *head), sums, strict=True) if acc is not None and x is not None]
            grads = iter(torch.autograd.grad(scaled, wanted, allow_unused=True))
            for i, acc in enumerate(sums):
                grad = None if acc is None else next(grads)
                if acc is not None and grad is not None:
                    (acc[..., span, :] if i == 0 else acc).add_(grad)
        return total, sums


class _ChunkedAutograd(torch.autograd.Function):
    """Gradients formed in forward; for float16 in backward instead, where a GradScaler's factor is known.

    float16 has too small a range for gradients that already hold ``1 / num_tokens``: scaling them afterwards would be
    too late, so the pieces run once more.
    """

    @staticmethod
    def forward(
        fctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, job: _Job, extras: list[Extra]
    ) -> Tensor:
        inputs: Inputs = (hidden, weight, bias)
        need = tuple(t is not None and n for t, n in zip(inputs, fctx.needs_input_grad[:3], strict=True))
        fctx.late = any(t is not None and t.dtype == torch.float16 for t in inputs)
        total, grads = job.run(inputs, (False,) * 3 if fctx.late else need, extras)
        fctx.save_for_backward(*(inputs if fctx.late else grads))
        fctx.dtypes = [None if t is None else t.dtype for t in inputs]
        fctx.job, fctx.need = job, need
        fctx.keep, fctx.spent = job.ctx.loss_cfg.allow_retain_graph, False
        return total

    @staticmethod
    @first_order
    def backward(fctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if fctx.late:
            _, grads = fctx.job.run(fctx.saved_tensors, fctx.need, [], grad_loss)
            factor = torch.ones_like(grad_loss)
        else:
            if fctx.spent:
                raise GraphError("backward ran a second time through a chunked loss_fn; set allow_retain_graph=True")
            fctx.spent = not fctx.keep
            grads, factor = list(fctx.saved_tensors), grad_loss
        out: list[Tensor | None] = []
        for grad, dtype in zip(grads, fctx.dtypes, strict=True):
            if grad is None or dtype is None:
                out.append(None)
            else:
                scaled = grad * factor if fctx.keep else grad.mul_(factor.to(grad.dtype))
                out.append(scaled.to(dtype))
        return (*out, None, None)
