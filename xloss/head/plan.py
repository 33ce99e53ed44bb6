"""How a call will run: which plan, in which chunks, with how many bytes, and why.

``make_plan`` is a pure function of sizes, so that ``explain()`` says what the step will do without doing it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from xloss.errors import UnsupportedError

PlanKind = Literal["one-pass", "two-pass", "forward-only", "eager", "chunked-autograd"]
MIB = 1 << 20
# Bytes of logits held at once, work chunk and saved chunks together. On a CPU 64 MiB is where larger chunks stop paying
# (measured at H=512 V=32000: 256-row chunks cost 4 % over one chunk); on CUDA less than 4096 rows pay for reading W.
DEFAULT_BUDGET = {"cpu": 64 * MIB, "cuda": 2048 * MIB}
_ALIGN_ROWS = {"cpu": 16, "cuda": 128}
_MAX_ROWS = 8192


@dataclass(frozen=True)
class Plan:
    """What one call of the head does. Sizes are rows (tokens) and bytes; ``str(plan)`` is a readable report."""

    kind: PlanKind
    mode: str
    num_rows: int
    num_live: int
    num_grad: int
    hidden_size: int
    vocab_size: int
    chunk_rows: int
    saved_chunks: int
    logits_bytes: int
    grad_bytes: int
    reasons: tuple[str, ...]
    teacher_size: int | None = None

    @property
    def num_chunks(self) -> int:
        """Chunks that the live rows are cut into (rows with and without gradient apart)."""
        if self.kind == "eager":
            return 1
        grad, rest = -(-self.num_grad // self.chunk_rows), -(-(self.num_live - self.num_grad) // self.chunk_rows)
        return grad + rest

    @property
    def flops(self) -> int:
        """Floating-point operations of the head's matrix products, backward included."""
        recomputed = 0
        if self.kind == "two-pass":
            recomputed = max(0, self.num_grad - self.saved_chunks * self.chunk_rows)
        projected = self.num_live + recomputed
        backward = 0 if self.kind == "forward-only" else 2 * self.num_grad
        width = self.hidden_size * (projected + backward) + (self.teacher_size or 0) * projected
        return 2 * self.vocab_size * width

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """``start:stop`` cut into equal chunks of at most ``chunk_rows``."""
        count = -(-(stop - start) // self.chunk_rows)
        size = -(-(stop - start) // count) if count else 0
        return [(i, min(i + size, stop)) for i in range(start, stop, size)] if size else []

    def __str__(self) -> str:
        lines = [
            f"plan {self.kind}, mode {self.mode}: {self.num_rows} tokens, {self.num_live} live,"
            f" {self.num_grad} with a gradient",
            f"  head   H={self.hidden_size} V={self.vocab_size}, {self.flops / 1e9:.3g} GFLOP",
            f"  chunks {self.num_chunks} of up to {self.chunk_rows} tokens, {self.saved_chunks} kept for backward",
            f"  memory {_bytes(self.logits_bytes)} of logits, {_bytes(self.grad_bytes)} of gradients",
        ]
        return "\n".join(lines + [f"  why    {reason}" for reason in self.reasons])


def _bytes(count: int) -> str:
    """A byte count for people: ``62.5 MiB``."""
    for unit, size in (("GiB", 1 << 30), ("MiB", MIB), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"


@dataclass(frozen=True)
class PlanRequest:
    """Sizes and wishes that decide a plan. ``logit_bytes`` is the width of one logit (4, or 8 for float64).

    ``teacher_size``: hidden size of a second head whose logits stand beside the first's; 0: they are given; ``None``:
    there is none.
    """

    kind: PlanKind
    mode: str
    num_rows: int
    num_live: int
    num_grad: int
    hidden_size: int
    vocab_size: int
    logit_bytes: int
    device_type: str
    chunk_size: int | None = None
    logits_budget: int | None = None
    weight_grad: bool = True
    hidden_grad: bool = True
    teacher_size: int | None = None
    reasons: tuple[str, ...] = ()


def make_plan(request: PlanRequest) -> Plan:
    """Chunk sizes in bytes, not by a ratio of T to V: each chunk reads W once and reads and writes dW once."""
    r = request
    row_bytes = r.vocab_size * r.logit_bytes
    if r.teacher_size is not None:
        row_bytes *= 2
    rows, why = _chunk_rows(r, row_bytes)
    if r.teacher_size is not None:
        why += ("half of the logits held are the teacher's",)
    grad_chunks = -(-r.num_grad // rows)
    saved = 0
    if r.kind == "two-pass":
        fit = _budget(r) // max(1, min(rows, max(r.num_grad, 1)) * row_bytes)
        saved = grad_chunks if grad_chunks <= fit else max(0, fit - 1)
        again = grad_chunks - saved
        why += (f"{saved} chunks of logits are kept for backward, {again} are computed again there",)
    live_chunk = min(rows, max(r.num_grad, r.num_live - r.num_grad))
    held = saved if saved and saved == grad_chunks else saved + 1
    grads = r.logit_bytes * r.hidden_size * (r.vocab_size * r.weight_grad + r.num_rows * r.hidden_grad)
    return Plan(
        kind=r.kind,
        mode=r.mode,
        num_rows=r.num_rows,
        num_live=r.num_live,
        num_grad=r.num_grad,
        hidden_size=r.hidden_size,
        vocab_size=r.vocab_size,
        chunk_rows=rows,
        saved_chunks=saved,
        logits_bytes=_eager_bytes(r, row_bytes) if r.kind == "eager" else held * live_chunk * row_bytes,
        grad_bytes=0 if r.kind == "forward-only" else grads,
        reasons=r.reasons + why,
        teacher_size=r.teacher_size,
    )


def _eager_bytes(r: PlanRequest, row_bytes: int) -> int:
    """Logits, log-softmax and its gradient for live rows, and the logits of all rows where that is another tensor."""
    return row_bytes * (3 * r.num_live + (r.num_rows if r.num_live < r.num_rows else 0))


def _budget(r: PlanRequest) -> int:
    return r.logits_budget if r.logits_budget is not None else DEFAULT_BUDGET.get(r.device_type, DEFAULT_BUDGET["cuda"])


def _chunk_rows(r: PlanRequest, row_bytes: int) -> tuple[int, tuple[str, ...]]:
    most = max(1, r.num_live)
    if r.kind == "eager":
        return most, ("eager holds the logits of all tokens",)
    if r.chunk_size is not None:
        return min(r.chunk_size, most), (f"chunk_size={r.chunk_size} was asked for",)
    budget = _budget(r)
    if most * row_bytes <= budget:
        return most, (f"one chunk: {_bytes(most * row_bytes)} of logits fit the budget of {_bytes(budget)}",)
    align = _ALIGN_ROWS.get(r.device_type, 128)
    fit = budget // row_bytes
    if fit < 1:
        raise UnsupportedError(
            f"logits_budget={budget} bytes does not hold one token's logits ({row_bytes} bytes at V={r.vocab_size}); "
            "give a larger logits_budget, or chunk_size=1"
        )
    rows = min(fit - fit % align or fit, _MAX_ROWS)
    chunks = -(-most // rows)
    rows = min(rows, -(-most // chunks // align) * align if most > align else most)
    return max(1, rows), (f"{chunks} equal chunks: the budget of {_bytes(budget)} holds the logits of {fit} tokens",)
