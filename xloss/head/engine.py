"""The chunk loops: statistics of all live rows, and gradients from adjoints. Shared by all chunked backends.

Nothing here knows a loss.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from xloss.head.backend import Adjoints, LossTwin
from xloss.head.partials import Begun, one_behind
from xloss.head.runner import Chunk, ChunkRunner, GradSink, HeadCall, masked_stats, row_places
from xloss.stats import DIFFERENTIABLE, TokenStats


def cat_stats(parts: list[TokenStats], runner: ChunkRunner) -> TokenStats:
    """Statistics of consecutive chunks as one; empty tensors of the right kind where there is no chunk."""
    if not parts:
        labels, spec = runner.call.labels, runner.call.options.stats
        empty = runner.new_buffer(0)[0, :, :0].sum(1)
        wanted = {n: empty for n in DIFFERENTIABLE if getattr(spec, n, False)}
        top1 = empty.to(torch.int64) if spec.top1 else None
        return TokenStats(empty.new_empty((0, *labels.shape[1:])), empty, **wanted, top1=top1)
    names = [n for n in (*DIFFERENTIABLE, "top1") if getattr(parts[0], n) is not None]
    return replace(parts[0], **{n: torch.cat([getattr(p, n) for p in parts]) for n in names})


def forward_stats(runner: ChunkRunner, start: int, stop: int) -> TokenStats:
    """Statistics of live rows ``start:stop``, nothing kept."""
    with torch.autocast(runner.hidden.device.type, enabled=False):
        begun = (runner.begin_statistics(a, b) for a, b in runner.call.plan.chunks(start, stop))
        parts = list(one_behind(begun))
    return cat_stats(parts, runner)


class OnePassLoss(Protocol):
    """A token-local loss as the one-pass loop sees it."""

    twin: LossTwin | None
    """The loss as a kernel knows it, over all live rows, where it has one."""

    def adjoints_of(self, start: int, stop: int, stats: TokenStats) -> Adjoints:
        """Take the loss of live rows ``start:stop`` and return one adjoint per statistic it used."""
        ...

    def take(self, start: int, stop: int, stats: TokenStats, losses: Tensor | None) -> None:
        """Take losses of live rows that a kernel computed, or (``None``) that need no gradient."""
        ...


def one_pass(runner: ChunkRunner, sink: GradSink, loss: OnePassLoss) -> TokenStats:
    """Statistics of all live rows, with gradients formed chunk by chunk for those that can have one."""
    call, parts = runner.call, []
    operand = call.operand_dtype
    for a, b in call.plan.chunks(0, call.rows.num_grad):
        if call.head is not None:
            parts.append(runner.statistics(a, b))
            _add_strips(runner, sink, a, b, parts[-1], loss.adjoints_of(a, b, parts[-1]))
            continue
        places = row_places(call.rows, a, b)
        hidden = runner.operand(places)
        rows = runner.project(hidden, places, runner.work_buffer(b - a))
        twin = loss.twin if call.part is None else None  # a kernel's loss would need the whole row
        done = call.backend.loss_rows(rows, call.options, twin.rows(a, b), operand) if twin else None
        if done is not None:
            stats, losses, dlogits = done
            loss.take(a, b, stats, losses)
        else:
            state = runner.begin_rows(rows, for_backward=True).finish()
            stats = masked_stats(call, state.stats, rows.labels)
            dlogits = runner.dlogits(state, loss.adjoints_of(a, b, stats))
        parts.append(stats)
        sink.add(dlogits, hidden, places)
    for a, b in call.plan.chunks(call.rows.num_grad, call.rows.num_live):
        parts.append(runner.statistics(a, b))
        loss.take(a, b, parts[-1], None)
    return cat_stats(parts, runner)


def two_pass_forward(runner: ChunkRunner) -> tuple[TokenStats, TokenStats, list[Chunk]]:
    """Pass 1: statistics of all live rows (masked, and as the backward needs them) and the chunks kept for pass 2."""
    call, masked, exact = runner.call, [], []
    kept: list[Chunk] = []
    if call.head is not None:
        stats = forward_stats(runner, 0, call.rows.num_live)
        return stats, stats.map(lambda x: x[: call.rows.num_grad]), []
    spans = call.plan.chunks(0, call.rows.num_grad)

    def begin(i: int, a: int, b: int) -> Begun[Chunk]:
        keep = i < call.plan.saved_chunks
        buffer = runner.new_buffer(b - a) if keep else runner.work_buffer(b - a)
        return runner.begin(a, b, buffer, for_backward=keep)

    for chunk in one_behind(begin(i, a, b) for i, (a, b) in enumerate(spans)):
        masked.append(masked_stats(call, chunk.state.stats, chunk.state.rows.labels))
        exact.append(chunk.state.stats)
        if len(kept) < call.plan.saved_chunks:
            kept.append(chunk)
    rest = forward_stats(runner, call.rows.num_grad, call.rows.num_live)
    return cat_stats([*masked, rest], runner), cat_stats(exact, runner), kept


def two_pass_backward(
    runner: ChunkRunner, sink: GradSink, kept: list[Chunk], stats: TokenStats, adjoints: Adjoints
) -> None:
    """Pass 2: gradients from adjoints of the first ``num_grad`` live rows; kept logits first, then recomputed ones."""
    call = runner.call
    if call.head is not None:
        for a, b in call.plan.chunks(0, call.rows.num_grad):
            part = {k: v[a:b] for k, v in adjoints.items()}
            _add_strips(runner, sink, a, b, stats.map(lambda x, a=a, b=b: x[a:b]), part)  # type: ignore[misc]
        return
    for chunk, alive in _alive_rows(kept, adjoints, call):
        state, hidden, places = chunk.state, chunk.hidden, row_places(call.rows, chunk.start, chunk.stop)
        span = slice(chunk.start, chunk.stop)
        if alive is not None:
            state, hidden = state.keep_rows_(alive), hidden.index_select(0, alive)
            places = alive + chunk.start if isinstance(places, slice) else places[alive]
        if hidden.shape[0]:
            own = {k: v[span] if alive is None else v[span][alive] for k, v in adjoints.items()}
            sink.add(runner.dlogits(state, own), hidden, places)
    done = kept[-1].stop if kept else 0
    alive = _nonzero_rows(adjoints, done, call.rows.num_grad, call)
    count = call.rows.num_grad - done if alive is None else alive.numel()
    for a, b in call.plan.chunks(0, count):
        rows = slice(done + a, done + b) if alive is None else alive[a:b]
        places = row_places(call.rows, 0, call.rows.num_grad)
        places = rows if isinstance(places, slice) else places[rows]
        hidden = runner.operand(places)
        raw = runner.project(hidden, places, runner.work_buffer(b - a))
        known = stats.map(lambda x, rows=rows: x[rows])  # type: ignore[misc]
        own = {k: v[rows] for k, v in adjoints.items()}
        sink.add(runner.dlogits(runner.resume(raw, known), own), hidden, places)


def _add_strips(
    runner: ChunkRunner, sink: GradSink, start: int, stop: int, stats: TokenStats, adjoints: Adjoints
) -> None:
    """Gradients of live rows ``start:stop`` without logits, rows with no adjoint last.

    The kernel leaves out tiles of such rows; sorted, they fill whole tiles. Their number never leaves the device.
    """
    order = torch.argsort(_has_adjoint(adjoints).to(torch.uint8), descending=True, stable=True)
    places = row_places(runner.call.rows, start, stop)
    places = order + start if isinstance(places, slice) else places[order]
    known = stats.map(lambda x: x[order])
    sink.add_strips(runner.token_rows(places), places, known, {k: v[order] for k, v in adjoints.items()})


def _has_adjoint(adjoints: Adjoints) -> Tensor:
    """Mask ``[C]`` of rows with an adjoint that is not 0."""
    used = [v != 0 if v.ndim == 1 else (v != 0).any(1) for v in adjoints.values()]
    return torch.stack(used).any(0)


def _nonzero_rows(adjoints: Adjoints, start: int, stop: int, call: HeadCall) -> Tensor | None:
    """Rows with an adjoint that is not 0 (clipped tokens have none), or ``None`` where leaving rows out does not pay.

    Counting them would make a CUDA stream wait, so there they all take part. So they do where ranks share the
    vocabulary: what they exchange has a size, which no value may decide.
    """
    if next(iter(adjoints.values())).is_cuda or call.part is not None:
        return None
    used = _has_adjoint({k: v[start:stop] for k, v in adjoints.items()})
    alive = used.nonzero().squeeze(1)
    return None if alive.numel() > 0.97 * (stop - start) else alive + start


def _alive_rows(kept: list[Chunk], adjoints: Adjoints, call: HeadCall) -> Iterator[tuple[Chunk, Tensor | None]]:
    for chunk in kept:
        alive = _nonzero_rows(adjoints, chunk.start, chunk.stop, call)
        yield chunk, None if alive is None else alive - chunk.start
