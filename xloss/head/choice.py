"""Which kernels, and what sizes: the one place that chooses, from sizes alone.

There are two ways through the head:

- ``chunked_logits``: a matrix product writes the logits of a chunk of tokens, and row work reads them.
- ``no_logits``: the product's tiles become statistics while they are in registers, and in backward a strip of dlogits,
  ``[tokens, columns]``, which feeds both other products. It makes the logits a second time for a gradient.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from xloss.errors import UnsupportedError
from xloss.stats import StatSpec

PlanKind = Literal["one-pass", "two-pass", "forward-only", "eager", "chunked-autograd"]
Kernels = Literal["chunked_logits", "no_logits"]
KernelChoice = Literal["auto", "chunked_logits", "no_logits"]
KERNEL_CHOICES: tuple[str, ...] = ("auto", "chunked_logits", "no_logits")

MIB = 1 << 20
# Bytes of logits held at once, work chunk and saved chunks together. On a CPU 64 MiB is where larger chunks stop paying
# (measured at H=512 V=32000: 256-row chunks cost 4 % over one chunk); on CUDA less than 4096 rows pay for reading W.
DEFAULT_BUDGET = {"cpu": 64 * MIB, "cuda": 2048 * MIB}
_ALIGN_ROWS = {"cpu": 16, "cuda": 128}
_MAX_ROWS = 8192

# Rows of logits a budget must hold for chunks to be worth more than making the logits twice, by bytes of an operand.
# From 512 rows on reading W hides behind a bf16 product; what is left is reading and writing dW, 8VH bytes a chunk,
# against 2CVH operations for the second product of its C rows. At 4.3 TB/s and 790 TFLOP/s (H200) they are equal at
# C = 735, and the kernel's product is slower than cuBLAS. At 50 TFLOP/s (float32, no tensor cores): at 47. Calculated.
USEFUL_ROWS = {2: 512, 4: 64}

# A strip's products read hidden states and read and write dX, 10TH bytes, for 2TH operations a column: 918 columns
# balance on an H200. So not below 1024, and 4096 leave room; 32768 tokens of them are 256 MiB in bf16.
STRIP_COLUMNS, _LEAST_COLUMNS, _COLUMN_STEP = 4096, 1024, 256
_STRIP_ROWS, _LEAST_ROWS = 32768, 128
SPLIT_COLUMNS = 1024
"""Vocabulary entries of one partial of the statistics, as the kernels cut them."""
PARTIAL_BYTES = 24
"""Six float32 a token and split."""


@dataclass(frozen=True)
class PlanRequest:
    """Sizes and wishes that decide a plan.

    ``logit_bytes`` is the width of a logit and of an accumulator (4, or 8 for float64), ``operand_bytes`` that of the
    products' operands, ``strip_bytes`` that of a dlogit in a strip, ``weight_bytes`` and ``hidden_bytes`` those of the
    weight, the hidden states and the gradients they get, ``waiting_bytes`` that of the hidden gradient until it is
    handed out. ``stats``, ``softcap``, ``bias``: what row work has to do. ``weight_cast``: the weight is copied in the
    operands' dtype. ``retain``: gradients are handed out as copies. ``teacher_size``: hidden size of a second head
    whose logits stand beside the first's; 0: they are given; ``None``: there is none. ``no_logits_refused`` says why
    the ``no_logits`` kernels cannot take these tensors, or ``None``. ``num_parts``: ranks that share the vocabulary, of
    which ``vocab_size`` is one's. ``gathered``: the hidden states are a copy. ``rank``: of the adapters on the head
    together; ``adapter_bytes`` the width of their numbers, ``adapter_grad`` whether they have gradients.
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
    operand_bytes: int = 4
    strip_bytes: int = 4
    weight_bytes: int = 4
    hidden_bytes: int = 4
    waiting_bytes: int = 4
    stats: StatSpec = field(default_factory=StatSpec)
    softcap: bool = False
    bias: bool = False
    weight_cast: bool = False
    retain: bool = False
    chunk_size: int | None = None
    logits_budget: int | None = None
    kernels: KernelChoice = "auto"
    no_logits_refused: str | None = None
    main_grad: bool = False
    weight_grad: bool = True
    hidden_grad: bool = True
    teacher_size: int | None = None
    num_parts: int = 1
    gathered: bool = False
    rank: int = 0
    adapter_bytes: int = 4
    adapter_grad: bool = True
    reasons: tuple[str, ...] = ()

    @property
    def row_bytes(self) -> int:
        """Bytes of one token's logits, a teacher's among them."""
        return self.vocab_size * self.logit_bytes * (1 if self.teacher_size is None else 2)

    @property
    def scales_dlogits(self) -> bool:
        """Whether dlogits are brought to the range of float16 for the tensor cores."""
        return self.device_type == "cuda" and self.operand_bytes == 2 and self.strip_bytes == 4

    @property
    def narrow_bytes(self) -> int:
        """Bytes of the tensor-core copy of a dlogit beside it: none where a kernel writes bf16 itself, nor on a CPU."""
        if self.device_type != "cuda" or self.operand_bytes != 2:
            return 0
        return 0 if self.mode == "fused" and self.strip_bytes == 2 else 2


@dataclass(frozen=True)
class Choice:
    """Kernels, tokens a chunk (at most), columns a strip (0: there is none), and why."""

    kernels: Kernels
    rows: int
    columns: int
    why: tuple[str, ...]


def choose(r: PlanRequest) -> Choice:
    """Kernels and sizes. Raises ``UnsupportedError`` where a wish cannot be honoured."""
    _refuse_autograd(r)
    wish = "logits_budget=0" if r.logits_budget == 0 else "kernels='no_logits'" if r.kernels == "no_logits" else None
    refused = _no_logits_refused(r)
    if wish is not None:
        if refused is not None:
            raise UnsupportedError(f"{wish} needs kernels that write no logits, and {refused}")
        strip = strip_shape(r)
        if strip is None:
            rows, needed = _least_strip(r)
            raise UnsupportedError(
                f"{wish} holds a strip of dlogits and partial statistics, {needed} bytes for {rows} tokens, more than "
                f"logits_budget={r.logits_budget}; give that many, or logits_budget=0 for a strip of the usual size"
            )
        return Choice("no_logits", *strip, (f"{wish}: no logits are written",))
    if r.kernels == "auto" and r.chunk_size is None and refused is None:
        fit = budget_of(r) // r.row_bytes
        useful = min(r.num_live, USEFUL_ROWS[r.operand_bytes])
        strip = strip_shape(r) if fit < useful else None
        if strip is not None:
            why = f"the budget of {readable(budget_of(r))} holds the logits of {fit} tokens, {useful} would be useful"
            return Choice("no_logits", *strip, (f"{why}: no logits are written",))
    rows, sizes = _chunk_rows(r)
    asked = () if r.kernels == "auto" else (f"kernels={r.kernels!r} was asked for",)
    return Choice("chunked_logits", rows, 0, asked + sizes)


def _refuse_autograd(r: PlanRequest) -> None:
    """Autograd makes logits and gradients as it does: nothing can be asked of it."""
    if r.kind not in ("eager", "chunked-autograd"):
        return
    eager = r.kind == "eager"
    how = "mode='eager' runs" if eager else "a custom loss_fn runs"
    wishes = {
        f"kernels={r.kernels!r}": (r.kernels != "auto", "mode='fused'"),
        "logits_budget=0": (r.logits_budget == 0, "mode='fused'"),
        "accumulate_into_main_grad=True": (r.main_grad, "mode='chunk' or 'fused'"),
    }
    for wish, (given, mode) in wishes.items():
        if given:
            remedy = f"use {mode}" if eager else f"define token_loss and use {mode}"
            raise UnsupportedError(f"{wish} cannot be honoured: {how} through plain autograd; {remedy}")


def _no_logits_refused(r: PlanRequest) -> str | None:
    if r.mode != "fused":
        return f"mode={r.mode!r} has none; use mode='fused' (Triton on CUDA), or leave it out"
    return r.no_logits_refused


def strip_shape(r: PlanRequest) -> tuple[int, int] | None:
    """``(tokens a chunk, columns a strip)`` without logits, or ``None`` where the budget holds no strip worth having.

    A budget bounds strip and partial statistics; none, or one of 0, leaves them at their usual size. Without a gradient
    there is no strip.
    """
    live, budget = max(1, r.num_live), r.logits_budget
    widest = 0 if r.kind == "forward-only" else min(STRIP_COLUMNS, _up(r.vocab_size, _COLUMN_STEP))
    if not budget:
        return equal_rows(live, r.chunk_size or _STRIP_ROWS), widest
    least, (least_rows, needed) = min(_LEAST_COLUMNS, widest), _least_strip(r)
    if budget < needed:
        return None
    fit = budget // max(least * r.strip_bytes, partial_bytes(r.vocab_size, 1))
    most = live if fit >= live else max(least_rows, fit // _LEAST_ROWS * _LEAST_ROWS)
    rows = equal_rows(live, min(most, r.chunk_size or _STRIP_ROWS))
    columns = budget // (rows * r.strip_bytes) // _COLUMN_STEP * _COLUMN_STEP
    return rows, min(columns, widest)


def _least_strip(r: PlanRequest) -> tuple[int, int]:
    """The fewest tokens a chunk may have without logits, and the bytes that takes."""
    rows = min(max(1, r.num_live), r.chunk_size or _LEAST_ROWS)
    columns = 0 if r.kind == "forward-only" else min(_LEAST_COLUMNS, _up(r.vocab_size, _COLUMN_STEP))
    return rows, max(rows * columns * r.strip_bytes, partial_bytes(r.vocab_size, rows))


def partial_bytes(vocab_size: int, rows: int) -> int:
    """Bytes of the partial statistics of ``rows`` tokens."""
    return PARTIAL_BYTES * -(-vocab_size // SPLIT_COLUMNS) * rows


def budget_of(r: PlanRequest) -> int:
    """Bytes of logits that may be held at once: as given, else the device's, or more where more costs nothing.

    On CUDA the logits are gone when the float32 gradient of the weight is cast to the weight's own dtype. Logits of
    that size raise no peak, so a chunk is never smaller: with L-byte logits and a w-byte weight, T tokens take a single
    chunk where ``T <= max(C, H w / L)``, C rows being what the default holds. (With bf16 logits and a single chunk's dW
    rounded in registers the same argument gives ``T <= max(C + H, 2 H)``; here logits and dW are float32.)
    Where dlogits are copied for the tensor cores the copy takes its part.
    """
    if r.logits_budget is not None:
        return r.logits_budget
    default = DEFAULT_BUDGET.get(r.device_type, DEFAULT_BUDGET["cuda"])
    casts = r.weight_grad and r.weight_bytes != r.logit_bytes and not r.main_grad
    if r.device_type != "cuda" or not casts or r.kind not in ("one-pass", "two-pass"):
        return default
    free = r.vocab_size * r.hidden_size * r.weight_bytes
    return max(default, free * r.logit_bytes // (r.logit_bytes + r.narrow_bytes))


def _chunk_rows(r: PlanRequest) -> tuple[int, tuple[str, ...]]:
    most, row_bytes = max(1, r.num_live), r.row_bytes
    if r.kind == "eager":
        return most, ("eager holds the logits of all tokens",)
    if r.chunk_size is not None:
        return min(r.chunk_size, most), (f"chunk_size={r.chunk_size} was asked for",)
    budget = budget_of(r)
    if most * row_bytes <= budget:
        return most, (f"one chunk: {readable(most * row_bytes)} of logits fit the budget of {readable(budget)}",)
    fit = budget // row_bytes
    if fit < 1:
        raise UnsupportedError(
            f"logits_budget={budget} bytes does not hold one token's logits ({row_bytes} bytes at V={r.vocab_size}); "
            "give a larger logits_budget, or chunk_size=1, or logits_budget=0 with mode='fused'"
        )
    align = _ALIGN_ROWS.get(r.device_type, 128)
    rows = min(fit - fit % align or fit, _MAX_ROWS)
    chunks = -(-most // rows)
    rows = min(rows, _up(-(-most // chunks), align) if most > align else most)
    return max(1, rows), (f"{chunks} equal chunks: the budget of {readable(budget)} holds the logits of {fit} tokens",)


def equal_rows(total: int, most: int) -> int:
    """Size of equal parts of ``total``, each at most ``most``."""
    return -(-total // -(-total // most))


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def readable(count: int) -> str:
    """A byte count for people: ``62.5 MiB``."""
    for unit, size in (("GiB", 1 << 30), ("MiB", MIB), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.1f} {unit}"
    return f"{count} B"
