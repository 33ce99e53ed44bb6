"""The autograd functions around the chunk loops: one for each plan that has gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from xloss.distributed.routes import gather_again
from xloss.errors import GraphError
from xloss.head import engine
from xloss.head.backend import Adjoints, LossTwin
from xloss.head.first_order import first_order
from xloss.head.options import HeadTensors
from xloss.head.runner import Chunk, ChunkRunner, GradSink, HeadCall
from xloss.stats import DIFFERENTIABLE, TokenStats

Grads = tuple[Tensor | None, ...]
_TENSORS = len(HeadTensors._fields)


class OnePass(torch.autograd.Function):
    """Gradients formed in forward, scaled in backward by the upstream scalar (no host sync)."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> Tensor:
        tensors, call, job = HeadTensors(*given[:_TENSORS]), given[_TENSORS], given[_TENSORS + 1]
        with torch.autocast(tensors.hidden.device.type, enabled=False):
            runner = ChunkRunner(call, tensors)
            sink = GradSink(runner, ctx.needs_input_grad[:_TENSORS])
            job.stats = engine.one_pass(runner, sink, job)
        ctx.save_for_backward(*sink.finish())
        ctx.dtypes = tuple(None if x is None else x.dtype for x in tensors)
        ctx.keep, ctx.spent, ctx.scale = call.allow_retain_graph, False, call.backend.scale
        ctx.main_grad = call.main_grad
        ctx.adapted = None if tensors.low_hidden is None else tensors.weight
        return job.total()

    @staticmethod
    @first_order
    def backward(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.spent:
            raise GraphError(
                "backward ran a second time through a one-pass loss, whose gradients were handed out by the first; "
                "set allow_retain_graph=True (keeps a copy) or plan='two_pass' (computes them again)"
            )
        ctx.spent = not ctx.keep
        if ctx.adapted is not None:
            gather_again(ctx.adapted)  # the product with A comes next, and A is in the unit of W
        saved, main_grad = list(ctx.saved_tensors), ctx.main_grad
        if main_grad is not None and saved[1] is not None:
            main_grad.add(saved[1], grad_loss)
            saved[1] = None
        scaled = [
            None if g is None else ctx.scale(g, grad_loss, dtype, in_place=not ctx.keep)
            for g, dtype in zip(saved, ctx.dtypes, strict=True)
        ]
        if main_grad is not None:
            scaled[1] = main_grad.given_to_autograd()
        return (*scaled, None, None)


class OnePassJob:
    """A token-local loss on its way through one pass: collects statistics and the loss of each token.

    ``loss_of(start, stop, stats)`` returns the losses ``[C]`` of live rows ``start:stop``, differentiable in ``stats``.
    """

    def __init__(
        self, loss_of: Callable[[int, int, TokenStats], Tensor], like: Tensor, twin: LossTwin | None = None
    ) -> None:
        self.loss_of, self.like, self.twin = loss_of, like, twin
        self.losses: list[Tensor] = []
        self.stats: TokenStats | None = None

    def adjoints_of(self, start: int, stop: int, stats: TokenStats) -> Adjoints:
        """Loss of one chunk and its derivative with respect to every statistic."""
        leaves = {name: value.detach().requires_grad_() for name, value in stats.differentiable()}
        with torch.enable_grad():
            loss = self.loss_of(start, stop, TokenStats(**leaves, top1=stats.top1))
            total = loss.sum()
        self.losses.append(loss.detach())
        zero = torch.zeros_like(leaves["logprobs"])
        if not loss.requires_grad:
            return {"logprobs": zero}
        grads = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        found = {name: g for name, g in zip(leaves, grads, strict=True) if g is not None}
        return {"logprobs": zero} | found

    def take(self, start: int, stop: int, stats: TokenStats, losses: Tensor | None) -> None:
        """Losses that came without autograd; the torch formula still runs on the vectors, for the metrics."""
        with torch.no_grad():
            seen = self.loss_of(start, stop, stats)
        self.losses.append(seen if losses is None else losses)

    def token_losses(self) -> Tensor:
        """Losses of all live rows in live order, ``[num_live]``."""
        return torch.cat(self.losses) if self.losses else self.like.new_zeros(0)

    def total(self) -> Tensor:
        return self.token_losses().sum()


class LinearLogprobs(torch.autograd.Function):
    """Token statistics as differentiable outputs, in live order; the backward takes any adjoints (two-pass plan)."""

    @staticmethod
    def forward(ctx: Any, *given: Any) -> tuple[Tensor | None, ...]:
        tensors, call = HeadTensors(*given[:_TENSORS]), given[_TENSORS]
        with torch.autocast(tensors.hidden.device.type, enabled=False):
            masked, exact, ctx.kept = engine.two_pass_forward(ChunkRunner(call, tensors))
        temperature = call.temperature if isinstance(call.temperature, Tensor) else None
        teacher = [] if call.teacher is None else call.teacher.source.tensors()
        # writing to any of them before is an error
        ctx.save_for_backward(*tensors, call.labels, temperature, *teacher)
        ctx.call, ctx.exact = call, exact
        ctx.set_materialize_grads(False)
        if masked.top1 is not None:
            ctx.mark_non_differentiable(masked.top1)
        return (*(getattr(masked, name) for name in DIFFERENTIABLE), masked.top1)

    @staticmethod
    @first_order
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        call: HeadCall = ctx.call
        tensors = HeadTensors(*ctx.saved_tensors[:_TENSORS])
        gather_again(tensors.weight)
        kept, ctx.kept = ctx.kept, []  # a second backward computes the logits again
        acc = {n: g[: call.rows.num_grad] for n, g in zip(DIFFERENTIABLE, grads, strict=False) if g is not None}
        sums = _two_pass_sums(call, tensors, ctx.needs_input_grad[:_TENSORS], kept, ctx.exact, acc)
        given = [None if g is None or x is None else g.to(x.dtype) for g, x in zip(sums, tensors, strict=True)]
        if call.main_grad is not None:
            given[1] = call.main_grad.given_to_autograd()
        return (*given, None)


def _two_pass_sums(
    call: HeadCall,
    tensors: HeadTensors,
    needs: tuple[bool, ...],
    kept: list[Chunk],
    exact: TokenStats,
    adjoints: Adjoints,
) -> Grads:
    """Pass 2 in accumulator precision; its buffers end with it."""
    with torch.autocast(tensors.hidden.device.type, enabled=False):
        runner = ChunkRunner(call, tensors)
        sink = GradSink(runner, needs, None if call.main_grad is None else call.main_grad.buffer)
        if adjoints:
            adjoints.setdefault("logprobs", torch.zeros_like(exact.logprobs))
            engine.two_pass_backward(runner, sink, kept, exact, adjoints)
        kept.clear()  # before gradients are rounded beside their sums
    return sink.finish()
