"""How a call will run: which plan, with which kernels, in which chunks, with how many bytes, and why.

``make_plan`` is a pure function of sizes, so that ``explain()`` says what the step will do without doing it.
"""

from __future__ import annotations

from dataclasses import dataclass

from xloss.head import memory
from xloss.head.choice import Choice, Kernels, PlanKind, PlanRequest, budget_of, choose, partial_bytes, readable

__all__ = ["Plan", "PlanKind", "PlanRequest", "make_plan"]


@dataclass(frozen=True)
class Plan:
    """What one call of the head does. Sizes are rows (tokens) and bytes; ``str(plan)`` is a readable report.

    ``logits_bytes`` is the largest buffer of vocabulary-sized work held at once: logits, or, where no logits are
    written, a strip of dlogits ``[chunk_rows, strip_columns]`` or the partial statistics of a chunk. ``grad_bytes``:
    where gradients are summed. ``scratch_bytes``: what chunks need beside both. ``copy_bytes``: gradients in the dtype
    they are handed out in, where that is another; the logits are gone by then. ``adapter_bytes``: what adapters of
    ``rank`` hold all along.
    """

    kind: PlanKind
    mode: str
    kernels: Kernels
    num_rows: int
    num_live: int
    num_grad: int
    hidden_size: int
    vocab_size: int
    chunk_rows: int
    strip_columns: int
    saved_chunks: int
    logits_bytes: int
    grad_bytes: int
    scratch_bytes: int
    copy_bytes: int
    reasons: tuple[str, ...]
    teacher_size: int | None = None
    rank: int = 0
    adapter_bytes: int = 0

    @property
    def num_chunks(self) -> int:
        """Chunks that the live rows are cut into (rows with and without gradient apart)."""
        if self.kind == "eager":
            return 1
        grad, rest = -(-self.num_grad // self.chunk_rows), -(-(self.num_live - self.num_grad) // self.chunk_rows)
        return grad + rest

    @property
    def peak_bytes(self) -> int:
        """Most bytes above the inputs, vectors of a number per token apart; of what autograd runs only a part."""
        return self.adapter_bytes + self.grad_bytes + max(self.logits_bytes + self.scratch_bytes, self.copy_bytes)

    @property
    def flops(self) -> int:
        """Floating-point operations of the head's matrix products, backward included."""
        recomputed = 0
        if self.kind == "two-pass" or (self.kernels == "no_logits" and self.kind != "forward-only"):
            recomputed = max(0, self.num_grad - self.saved_chunks * self.chunk_rows)
        projected = self.num_live + recomputed
        backward = 0 if self.kind == "forward-only" else 2 * self.num_grad
        width = (self.hidden_size + self.rank) * (projected + backward) + (self.teacher_size or 0) * projected
        return 2 * self.vocab_size * width

    def chunks(self, start: int, stop: int) -> list[tuple[int, int]]:
        """``start:stop`` cut into equal chunks of at most ``chunk_rows``."""
        count = -(-(stop - start) // self.chunk_rows)
        size = -(-(stop - start) // count) if count else 0
        return [(i, min(i + size, stop)) for i in range(start, stop, size)] if size else []

    def strips(self, num_rows: int) -> list[slice]:
        """``num_rows`` rows of the head in strips of at most ``strip_columns``."""
        return [slice(i, min(i + self.strip_columns, num_rows)) for i in range(0, num_rows, self.strip_columns)]

    def __str__(self) -> str:
        if self.kernels == "chunked_logits":
            kept, held = f"{self.saved_chunks} kept for backward", "logits"
        elif self.strip_columns:
            kept, held = "no logits written", f"strip memory (dlogits of {self.strip_columns} columns at a time)"
        else:
            kept, held = "no logits written", "partial statistics"
        lines = [
            f"plan {self.kind}, mode {self.mode}: {self.num_rows} tokens, {self.num_live} live,"
            f" {self.num_grad} with a gradient",
            f"  head   H={self.hidden_size} V={self.vocab_size}, {self.flops / 1e9:.3g} GFLOP",
            f"  chunks {self.num_chunks} of up to {self.chunk_rows} tokens, {kept}",
            f"  memory {readable(self.logits_bytes)} of {held}, {readable(self.grad_bytes)} of gradients",
        ]
        if self.kind not in ("eager", "chunked-autograd"):
            scratch, copies = readable(self.scratch_bytes), readable(self.copy_bytes)
            if self.rank:
                lines.append(f"  lora   adapters of rank {self.rank}, {readable(self.adapter_bytes)}")
            lines.append(
                f"  peak   {readable(self.peak_bytes)}, with {scratch} of scratch, {copies} of copies at the end"
            )
        return "\n".join(lines + [f"  why    {reason}" for reason in self.reasons])


def make_plan(request: PlanRequest) -> Plan:
    """Chunk sizes in bytes, not by a ratio of T to V: each chunk reads W once and reads and writes dW once."""
    r, choice = request, choose(request)
    live_chunk = min(choice.rows, max(r.num_grad, r.num_live - r.num_grad))
    why, saved = choice.why, 0
    if r.teacher_size is not None:
        why += ("half of the logits held are the teacher's",)
    if choice.kernels == "no_logits":
        strip = min(choice.rows, r.num_grad) * choice.columns * r.strip_bytes
        held = max(strip, partial_bytes(r.vocab_size, live_chunk))
    elif r.kind == "eager":
        held = _eager_bytes(r)
    else:
        saved, kept_why = _saved_chunks(r, choice)
        why += kept_why
        work = 0 if saved and saved * choice.rows >= r.num_grad == r.num_live else 1
        held = (saved + work) * live_chunk * r.row_bytes
    return Plan(
        kind=r.kind,
        mode=r.mode,
        kernels=choice.kernels,
        num_rows=r.num_rows,
        num_live=r.num_live,
        num_grad=r.num_grad,
        hidden_size=r.hidden_size,
        vocab_size=r.vocab_size,
        chunk_rows=choice.rows,
        strip_columns=choice.columns,
        saved_chunks=saved,
        logits_bytes=held,
        grad_bytes=0 if r.kind == "forward-only" else _grad_bytes(r, choice),
        scratch_bytes=memory.scratch_bytes(r, choice, live_chunk, saved),
        copy_bytes=memory.copy_bytes(r),
        reasons=r.reasons + why + _main_grad_why(r),
        teacher_size=r.teacher_size,
        rank=r.rank,
        adapter_bytes=memory.adapter_bytes(r),
    )


def _saved_chunks(r: PlanRequest, choice: Choice) -> tuple[int, tuple[str, ...]]:
    """Chunks of logits that the two-pass plan keeps for its second pass."""
    if r.kind != "two-pass":
        return 0, ()
    chunks = -(-r.num_grad // choice.rows)
    fit = budget_of(r) // max(1, min(choice.rows, max(r.num_grad, 1)) * r.row_bytes)
    work = r.num_live > r.num_grad  # tokens without a gradient have their statistics made beside the kept chunks
    saved = chunks if chunks + work <= fit else max(0, fit - 1)
    return saved, (f"{saved} chunks of logits are kept for backward, {chunks - saved} are computed again there",)


def _eager_bytes(r: PlanRequest) -> int:
    """Logits, log-softmax and its gradient for live rows, and the logits of all rows where that is another tensor."""
    return r.row_bytes * (3 * r.num_live + (r.num_rows if r.num_live < r.num_rows else 0))


def _grad_bytes(r: PlanRequest, choice: Choice) -> int:
    """Sums of dW (none where products add to ``main_grad``), db and dX, which strips add up a chunk at a time."""
    own_weight = r.weight_grad and not (r.main_grad and r.kind == "two-pass")
    summed = min(choice.rows, r.num_grad) if choice.kernels == "no_logits" else 0
    hidden = (r.num_rows * r.waiting_bytes + summed * r.logit_bytes) * r.hidden_grad
    return r.hidden_size * (r.vocab_size * r.logit_bytes * own_weight + hidden)


def _main_grad_why(r: PlanRequest) -> tuple[str, ...]:
    if not (r.main_grad and r.weight_grad) or r.kind == "forward-only":
        return ()
    if r.kind == "two-pass":
        return ("the products of the weight's gradient add to main_grad",)
    return ("the weight's gradient is added to main_grad in backward, once the upstream gradient is known",)
