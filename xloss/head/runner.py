"""One call of the head: its options, its operands, its buffers, and where its gradients go.

``HeadCall`` is the one options object that crosses; tensors that autograd tracks are passed beside it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xloss.distributed.vocab import VocabPart
from xloss.head import gemm, part_divergence
from xloss.head.backend import Adjoints, HeadBackend, RawRows, RowBackend, RowState, TokenRows
from xloss.head.low_rank import LowRank
from xloss.head.main_grad import MainGrad
from xloss.head.options import HeadOptions, HeadTensors, LiveRows
from xloss.head.partials import Begun, begin_sum, begin_whole, empty_stats, part_adjoints
from xloss.head.plan import Plan
from xloss.head.teacher import Teacher
from xloss.stats import TokenStats, mask_ignored


@dataclass(frozen=True)
class HeadCall:
    """One call of the head on flattened tokens: labels ``[T]`` or ``[T, K]``, temperature scalar or ``[T]``.

    ``head`` is there where the plan writes no logits; ``main_grad`` where the weight's gradient goes there; ``part``
    where the weight is a part of the vocabulary (labels are rows of it then).
    """

    labels: Tensor
    temperature: float | Tensor
    options: HeadOptions
    rows: LiveRows
    plan: Plan
    backend: RowBackend
    operand_dtype: torch.dtype
    head: HeadBackend | None = None
    main_grad: MainGrad | None = None
    allow_retain_graph: bool = False
    teacher: Teacher | None = None
    part: VocabPart | None = None


@dataclass
class Chunk:
    """A chunk of live rows after its forward: rows ``start:stop`` of the live order, their hidden states and state."""

    start: int
    stop: int
    hidden: Tensor
    state: RowState


class ChunkRunner:
    """Runs chunks of one call over one work buffer, operands cast once."""

    def __init__(self, call: HeadCall, tensors: HeadTensors) -> None:
        self.call = call
        self.hidden = tensors.hidden.detach()
        self.weight = tensors.weight.detach().to(call.operand_dtype)
        self.bias = None if tensors.bias is None else tensors.bias.detach()
        self.low: LowRank | None = None
        if tensors.low_hidden is not None and tensors.low_weight is not None:
            self.low = LowRank(tensors.low_hidden, tensors.low_weight, call.operand_dtype)
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

    def temperature(self, places: Tensor | slice) -> float | Tensor:
        """The scalar, or the part of the per-token temperature that belongs to ``places``."""
        t = self.call.temperature
        return t[places] if isinstance(t, Tensor) else t

    def project(self, hidden: Tensor, places: Tensor | slice, buffer: Tensor) -> RawRows:
        """Raw logits of operands ``hidden [C, H]``, which stand at ``places`` in ``[T]``, with what belongs to them."""
        call = self.call
        teacher = None if call.teacher is None else call.teacher.rows(places, buffer[1])
        logits = gemm.project(hidden, self.weight, buffer[0])
        if self.low is not None:
            self.low.add_logits_(logits, places)
        return RawRows(logits, call.labels[places], self.temperature(places), self.bias, teacher, call.part)

    def token_rows(self, places: Tensor | slice) -> TokenRows:
        """Tokens at ``places`` in ``[T]`` for the kernels that write no logits, which read contiguous rows."""
        hidden = self.operand(places)
        if hidden.stride(1) != 1:
            hidden = hidden.contiguous()
        call = self.call
        return TokenRows(hidden, self.weight, call.labels[places], self.temperature(places), self.bias, call.part)

    def begin(self, start: int, stop: int, buffer: Tensor, *, for_backward: bool) -> Begun[Chunk]:
        """Logits and statistics of live rows ``start:stop`` in ``buffer``."""
        places = row_places(self.call.rows, start, stop)
        hidden = self.operand(places)
        begun = self.begin_rows(self.project(hidden, places, buffer), for_backward=for_backward)
        return begun.then(lambda state: Chunk(start, stop, hidden, state))

    def begin_rows(self, rows: RawRows, *, for_backward: bool) -> Begun[RowState]:
        """Statistics of a chunk of logits; of the whole vocabulary, once they are finished."""
        call, part = self.call, self.call.part
        if part is None:
            return Begun.done(call.backend.forward(rows, call.options, for_backward=for_backward))
        if part.num_rows:
            state = call.backend.forward(rows, call.options, for_backward=for_backward)
        else:
            stats, peak = self._nothing(rows.labels)
            state = RowState(rows, stats, peak=peak)
        found = None if rows.teacher is None else part_divergence.value(rows, part)
        begun = begin_whole(state.stats, state.peak, rows.labels, part, call.options.stats)
        return begun.then(
            lambda whole: replace(
                state,
                stats=replace(whole, divergence=found),
                share=torch.exp(state.stats.lse - whole.lse) if state.holds_probs else None,
            )
        )

    def begin_statistics(self, start: int, stop: int) -> Begun[TokenStats]:
        """Statistics of live rows ``start:stop``, 0 at ignored labels; nothing kept."""
        call, part = self.call, self.call.part
        if call.head is None:
            begun = self.begin(start, stop, self.work_buffer(stop - start), for_backward=False)
            return begun.then(lambda chunk: masked_stats(call, chunk.state.stats, chunk.state.rows.labels))
        rows = self.token_rows(row_places(call.rows, start, stop))
        if part is None or part.num_rows:
            stats, peak = call.head.head_stats(rows, call.options)
        else:
            stats, peak = self._nothing(rows.labels)
        if part is None:
            return Begun.done(stats)
        whole = begin_whole(stats, peak, rows.labels, part, call.options.stats)
        return whole.then(lambda found: masked_stats(call, found, rows.labels))

    def statistics(self, start: int, stop: int) -> TokenStats:
        """``begin_statistics``, finished."""
        return self.begin_statistics(start, stop).finish()

    def resume(self, rows: RawRows, stats: TokenStats) -> RowState:
        """State of a chunk whose logits were computed again and whose statistics are known."""
        if not self.weight.shape[0]:
            return RowState(rows, stats)
        return self.call.backend.resume(rows, self.call.options, stats)

    def dlogits(self, state: RowState, adjoints: Adjoints) -> Tensor:
        """Gradient of a chunk's raw logits ``[C, V]``, in their buffer."""
        call = self.call
        if not self.weight.shape[0]:
            if call.part is not None and "divergence" in adjoints:
                part_divergence.to_grad_(state.rows, call.part, adjoints["divergence"])
            return state.rows.logits
        return call.backend.backward(state, part_adjoints(adjoints, call.part), call.options, call.operand_dtype)

    def _nothing(self, labels: Tensor) -> tuple[TokenStats, Tensor | None]:
        """Statistics where this rank holds no row of the head."""
        return empty_stats(labels, self.call.options.stats, gemm.accumulate_dtype(self.call.operand_dtype))


class GradSink:
    """Gradients of hidden, weight, bias and adapters, added up chunk by chunk in float32; absent ones cost nothing.

    ``into``: the weight's gradient is added to this buffer, and is not ``finish``'s to return.
    """

    def __init__(self, runner: ChunkRunner, needs: tuple[bool, ...], into: Tensor | None = None) -> None:
        hidden, weight = runner.hidden, runner.weight
        acc = gemm.accumulate_dtype(runner.call.operand_dtype)
        self.runner = runner
        keep = waiting_dtype(hidden.dtype, acc)
        self.hidden = torch.zeros(hidden.shape, dtype=keep, device=hidden.device) if needs[0] else None
        self._own_weight = into is None
        self.weight = into
        if self._own_weight and needs[1]:
            self.weight = torch.empty(weight.shape, dtype=acc, device=weight.device)
        self.bias = torch.zeros(weight.shape[0], dtype=acc, device=weight.device) if needs[2] else None
        if runner.low is not None:
            runner.low.want_grads(needs[3], needs[4])
        self._empty = True

    def add(self, dlogits: Tensor, hidden: Tensor, places: Tensor | slice) -> None:
        """A chunk's gradient of raw logits ``[C, V]`` with its hidden states ``[C, H]`` and places in ``[T]``."""
        if self.bias is not None:
            self.bias += dlogits.sum(0, dtype=self.bias.dtype)
        dz = gemm.narrow_(dlogits, self.runner.weight.dtype)
        begun = None
        if self.runner.low is not None:
            self.runner.low.add_grads(dz, places)
        if self.hidden is not None:
            begun = self._put_hidden(gemm.grad_hidden(dz, self.runner.weight), places)
        if self.weight is not None:
            gemm.add_grad_weight(self.weight, dz, hidden, self._own_weight and self._empty)
        if begun is not None:
            begun.finish()
        self._empty = False

    def _put_hidden(self, grad: Tensor, places: Tensor | slice) -> Begun[None] | None:
        """Put a chunk's hidden gradient ``[C, H]`` in its place, summed over ranks that have parts of the head."""
        hidden, part = self.hidden, self.runner.call.part
        assert hidden is not None
        if part is None:
            hidden[places] = grad.to(hidden.dtype)
            return None
        return begin_sum(grad, part).then(lambda whole: hidden.__setitem__(places, whole.to(hidden.dtype)))

    def add_strips(
        self, rows: TokenRows, places: Tensor | slice, stats: TokenStats, adjoints: dict[str, Tensor]
    ) -> None:
        """The same for a chunk whose gradient is made a strip of the vocabulary at a time."""
        call, hidden, weight = self.runner.call, rows.hidden, rows.weight
        assert call.head is not None
        tokens, dtype = hidden.shape[0], strip_dtype(call.operand_dtype)
        acc = gemm.accumulate_dtype(call.operand_dtype)
        total = hidden.new_empty(hidden.shape, dtype=acc) if self.hidden is not None else None
        buffer = hidden.new_empty((tokens, call.plan.strip_columns), dtype=dtype)
        own = part_adjoints(adjoints, call.part)
        if total is not None and not weight.shape[0]:
            total.zero_()
        for strip in call.plan.strips(weight.shape[0]):
            out = buffer[:, : strip.stop - strip.start]
            dlogits = call.head.strip_dlogits(rows, stats, own, call.options, strip, out)
            if self.bias is not None:
                self.bias[strip] += dlogits.sum(0, dtype=acc)
            dz = gemm.narrow_(dlogits, weight.dtype)
            if total is not None:
                gemm.add_grad_hidden(total, dz, weight[strip], first=strip.start == 0)
            if self.weight is not None:
                gemm.add_grad_weight(self.weight[strip], dz, hidden, self._own_weight and self._empty)
        if total is not None and (begun := self._put_hidden(total, places)) is not None:
            begun.finish()
        self._empty = False

    def finish(self) -> tuple[Tensor | None, ...]:
        """The sums, those of adapters last; zero where no row had a gradient."""
        low = self.runner.low
        adapters = (None, None) if low is None else (low.hidden_grad, low.weight_grad)
        if not self._own_weight:
            return self.hidden, None, self.bias, *adapters
        if self._empty and self.weight is not None:
            self.weight.zero_()
        return self.hidden, self.weight, self.bias, *adapters


def strip_dtype(operand: torch.dtype) -> torch.dtype:
    """dtype of a strip of dlogits: bf16 goes to the tensor cores as it is, float16 is first scaled, from float32."""
    return torch.bfloat16 if operand == torch.bfloat16 else torch.float32


def waiting_dtype(hidden: torch.dtype, acc: torch.dtype) -> torch.dtype:
    """dtype in which the hidden gradient waits for ``backward``: bf16 has float32's range and float16 has not."""
    return hidden if hidden == torch.bfloat16 else acc


def row_places(rows: LiveRows, start: int, stop: int) -> Tensor | slice:
    """Where live rows ``start:stop`` stand in ``[T]``."""
    return slice(start, stop) if rows.index is None else rows.index[start:stop]


def masked_stats(call: HeadCall, stats: TokenStats, labels: Tensor) -> TokenStats:
    """A chunk's statistics as the outside sees them: 0 at ignored labels."""
    return mask_ignored(stats, labels, call.options.ignore_index)
