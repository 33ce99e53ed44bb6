"""The chunk loops: statistics of all live rows, and gradients from adjoints. Shared by all chunked backends.

Nothing here knows a loss. ``HeadCall`` is the one options object that crosses; tensors that autograd tracks are passed
beside it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from xloss.head import gemm
from xloss.head.backend import Adjoints, LossTwin, RawRows, RowBackend, RowState
from xloss.head.options import HeadOptions, LiveRows
from xloss.head.plan import Plan
from xloss.head.teacher import Teacher
from xloss.stats import DIFFERENTIABLE, TokenStats, mask_ignored


@dataclass(frozen=True)
class HeadCall:
    """One call of the head on flattened tokens: labels ``[T]`` or ``[T, K]``, temperature scalar or ``[T]``."""

    labels: Tensor
    temperature: float | Tensor
    options: HeadOptions
    rows: LiveRows
    plan: Plan
    backend: RowBackend
    operand_dtype: torch.dtype
    allow_retain_graph: bool = False
    teacher: Teacher | None = None


@dataclass
class Chunk:
    """A chunk of live rows after its forward: rows ``start:stop`` of the live order, their hidden states and state."""

    start: int
    stop: int
    hidden: Tensor
    state: RowState


class ChunkRunner:
    """Runs chunks of one call over one work buffer, operands cast once."""

    def __init__(self, call: HeadCall, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> None:
        self.call = call
        self.hidden = hidden.detach()
        self.weight = weight.detach().to(call.operand_dtype)
        self.bias = None if bias is None else bias.detach()
        self._buffer: Tensor | None = None

    def new_buffer(self, rows: int) -> Tensor:
        """An uninitialised ``[1, rows, V]`` buffer of logits; ``[2, rows, V]`` where a teacher's stand beside them."""
        dtype = gemm.accumulate_dtype(self.call.operand_dtype)
        sides = 1 if self.call.teacher is None else 2
        return self.hidden.new_empty((sides, rows, self.weight.shape[0]), dtype=dtype)

    def work_buffer(self, rows: int) -> Tensor:
        """The shared buffer's first rows; grows to the largest chunk and is reused."""
        if self._buffer is None or self._buffer.shape[1] < rows:
            self._buffer = None  # free the smaller one first
            self._buffer = self.new_buffer(rows)
        return self._buffer[:, :rows]

    def operand(self, places: Tensor | slice) -> Tensor:
        """Hidden states at ``places`` as a GEMM operand. What stands at an ignored token must not matter, be it NaN."""
        hidden = self.hidden[places].to(self.call.operand_dtype)
        if self.call.rows.counted:
            return hidden
        ignored = self.call.labels[places] == self.call.options.ignore_index
        return hidden.masked_fill((ignored if ignored.ndim == 1 else ignored.all(1)).unsqueeze(1), 0)

    def project(self, hidden: Tensor, places: Tensor | slice, buffer: Tensor) -> RawRows:
        """Raw logits of operands ``hidden [C, H]``, which stand at ``places`` in ``[T]``, with what belongs to them."""
        call = self.call
        temperature = call.temperature[places] if isinstance(call.temperature, Tensor) else call.temperature
        teacher = None if call.teacher is None else call.teacher.rows(places, buffer[1])
        logits = gemm.project(hidden, self.weight, buffer[0])
        return RawRows(logits, call.labels[places], temperature, self.bias, teacher)

    def forward(self, start: int, stop: int, buffer: Tensor, *, for_backward: bool) -> Chunk:
        """Logits and statistics of live rows ``start:stop`` in ``buffer``."""
        places = row_places(self.call.rows, start, stop)
        hidden = self.operand(places)
        rows = self.project(hidden, places, buffer)
        state = self.call.backend.forward(rows, self.call.options, for_backward=for_backward)
        return Chunk(start, stop, hidden, state)


class GradSink:
    """Gradients of hidden, weight and bias, added up chunk by chunk in float32; absent ones cost nothing."""

    def __init__(self, runner: ChunkRunner, needs: tuple[bool, bool, bool]) -> None:
        hidden, weight = runner.hidden, runner.weight
        acc = gemm.accumulate_dtype(runner.call.operand_dtype)
        self.runner = runner
        # bf16 has float32's range, so its gradient can wait in bf16; float16's cannot
        keep = torch.bfloat16 if hidden.dtype == torch.bfloat16 else acc
        self.hidden = torch.zeros(hidden.shape, dtype=keep, device=hidden.device) if needs[0] else None
        self.weight = torch.empty(weight.shape, dtype=acc, device=weight.device) if needs[1] else None
        self.bias = torch.zeros(weight.shape[0], dtype=acc, device=weight.device) if needs[2] else None
        self._first = True

    def add(self, dlogits: Tensor, hidden: Tensor, rows: Tensor | slice) -> None:
        """A chunk's gradient of raw logits ``[C, V]`` with its hidden states ``[C, H]`` and places in ``[T]``."""
        if self.hidden is not None:
            self.hidden[rows] = gemm.grad_hidden(dlogits, self.runner.weight).to(self.hidden.dtype)
        if self.weight is not None:
            gemm.add_grad_weight(self.weight, dlogits, hidden, self._first)
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)
        self._first = False

    def finish(self) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        """The sums; zero where no row had a gradient."""
        if self._first and self.weight is not None:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias


def row_places(rows: LiveRows, start: int, stop: int) -> Tensor | slice:
    """Where live rows ``start:stop`` stand in ``[T]``."""
    return slice(start, stop) if rows.index is None else rows.index[start:stop]


def masked_stats(call: HeadCall, chunk: Chunk) -> TokenStats:
    """The chunk's statistics as the outside sees them: 0 at ignored labels."""
    return mask_ignored(chunk.state.stats, chunk.state.rows.labels, call.options.ignore_index)


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
    parts = []
    with torch.autocast(runner.hidden.device.type, enabled=False):
        for a, b in runner.call.plan.chunks(start, stop):
            chunk = runner.forward(a, b, runner.work_buffer(b - a), for_backward=False)
            parts.append(masked_stats(runner.call, chunk))
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
        places = row_places(call.rows, a, b)
        hidden = runner.operand(places)
        rows = runner.project(hidden, places, runner.work_buffer(b - a))
        done = call.backend.loss_rows(rows, call.options, loss.twin.rows(a, b), operand) if loss.twin else None
        if done is not None:
            stats, losses, dlogits = done
            loss.take(a, b, stats, losses)
        else:
            state = call.backend.forward(rows, call.options, for_backward=True)
            stats = mask_ignored(state.stats, rows.labels, call.options.ignore_index)
            dlogits = call.backend.backward(state, loss.adjoints_of(a, b, stats), call.options, operand)
        parts.append(stats)
        sink.add(dlogits, hidden, places)
    for a, b in call.plan.chunks(call.rows.num_grad, call.rows.num_live):
        chunk = runner.forward(a, b, runner.work_buffer(b - a), for_backward=False)
        parts.append(masked_stats(call, chunk))
        loss.take(a, b, parts[-1], None)
    return cat_stats(parts, runner)


def two_pass_forward(runner: ChunkRunner) -> tuple[TokenStats, TokenStats, list[Chunk]]:
    """Pass 1: statistics of all live rows (masked, and as the backward needs them) and the chunks kept for pass 2."""
    call, masked, exact, kept = runner.call, [], [], []
    spans = call.plan.chunks(0, call.rows.num_grad)
    for i, (a, b) in enumerate(spans):
        keep = i < call.plan.saved_chunks
        buffer = runner.new_buffer(b - a) if keep else runner.work_buffer(b - a)
        chunk = runner.forward(a, b, buffer, for_backward=keep)
        masked.append(masked_stats(call, chunk))
        exact.append(chunk.state.stats)
        if keep:
            kept.append(chunk)
    rest = forward_stats(runner, call.rows.num_grad, call.rows.num_live)
    return cat_stats([*masked, rest], runner), cat_stats(exact, runner), kept


def two_pass_backward(
    runner: ChunkRunner, sink: GradSink, kept: list[Chunk], stats: TokenStats, adjoints: Adjoints
) -> None:
    """Pass 2: gradients from adjoints of the first ``num_grad`` live rows; kept logits first, then recomputed ones."""
    call = runner.call
    for chunk, alive in _alive_rows(kept, adjoints):
        state, hidden, places = chunk.state, chunk.hidden, row_places(call.rows, chunk.start, chunk.stop)
        span = slice(chunk.start, chunk.stop)
        if alive is not None:
            state, hidden = state.keep_rows_(alive), hidden.index_select(0, alive)
            places = alive + chunk.start if isinstance(places, slice) else places[alive]
        if hidden.shape[0]:
            own = {k: v[span] if alive is None else v[span][alive] for k, v in adjoints.items()}
            sink.add(call.backend.backward(state, own, call.options, call.operand_dtype), hidden, places)
    done = kept[-1].stop if kept else 0
    alive = _nonzero_rows(adjoints, done, call.rows.num_grad)
    count = call.rows.num_grad - done if alive is None else alive.numel()
    for a, b in call.plan.chunks(0, count):
        rows = slice(done + a, done + b) if alive is None else alive[a:b]
        places = row_places(call.rows, 0, call.rows.num_grad)
        places = rows if isinstance(places, slice) else places[rows]
        hidden = runner.operand(places)
        raw = runner.project(hidden, places, runner.work_buffer(b - a))
        known = stats.map(lambda x, rows=rows: x[rows])  # type: ignore[misc]
        state = call.backend.resume(raw, call.options, known)
        own = {k: v[rows] for k, v in adjoints.items()}
        sink.add(call.backend.backward(state, own, call.options, call.operand_dtype), hidden, places)


def _nonzero_rows(adjoints: Adjoints, start: int, stop: int) -> Tensor | None:
    """Rows with an adjoint that is not 0 (clipped tokens have none), or ``None`` where leaving rows out does not pay.

    Counting them would make a CUDA stream wait, so there they all take part.
    """
    if next(iter(adjoints.values())).is_cuda:
        return None
    used = torch.zeros(stop - start, dtype=torch.bool)
    for adjoint in adjoints.values():
        part = adjoint[start:stop] != 0
        used |= part if part.ndim == 1 else part.any(1)
    alive = used.nonzero().squeeze(1)
    return None if alive.numel() > 0.97 * (stop - start) else alive + start


def _alive_rows(kept: list[Chunk], adjoints: Adjoints) -> Iterator[tuple[Chunk, Tensor | None]]:
    for chunk in kept:
        alive = _nonzero_rows(adjoints, chunk.start, chunk.stop)
        yield chunk, None if alive is None else alive - chunk.start
