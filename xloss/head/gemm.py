"""The three products of the head, always accumulated in float32 (float64 for float64).

bf16 and fp16 operands: on CUDA the tensor cores multiply them as they are and write float32
(``mm(..., out_dtype=float32)``, torch >= 2.8); elsewhere they are widened a block of the vocabulary at a time, which is
exact, because a product of two such numbers fits float32.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from xloss.head.memory import WIDEN_ROWS

LOW_PRECISION = (torch.bfloat16, torch.float16)


def accumulate_dtype(operand: torch.dtype) -> torch.dtype:
    """dtype of logits, statistics and gradient accumulators for GEMM operands of dtype ``operand``."""
    return torch.float64 if operand == torch.float64 else torch.float32


class Dlogits(NamedTuple):
    """dlogits ``[C, V]`` as an operand, and what every product of them must be multiplied by (0-d, or ``None``)."""

    values: Tensor
    scale: Tensor | None = None


def _tensor_cores(x: Tensor) -> bool:
    return x.dtype in LOW_PRECISION and x.is_cuda


def _wide_blocks(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """``(start, stop, weight[start:stop])`` in accumulator precision; one block, uncopied, where it is already wide."""
    if weight.dtype not in LOW_PRECISION:
        yield 0, weight.shape[0], weight
        return
    rows = min(WIDEN_ROWS, weight.shape[0])
    buffer = weight.new_empty((rows, weight.shape[1]), dtype=torch.float32)  # one: two blocks never stand side by side
    for start in range(0, weight.shape[0], WIDEN_ROWS):
        stop = min(start + WIDEN_ROWS, weight.shape[0])
        yield start, stop, buffer[: stop - start].copy_(weight[start:stop])


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``out [C, V] = hidden [C, H] @ weight [V, H]^T``."""
    if _tensor_cores(hidden):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for start, stop, block in _wide_blocks(weight):
            torch.mm(wide, block.t(), out=out[:, start:stop])
    return out


def narrow_(dlogits: Tensor, operand: torch.dtype) -> Dlogits:
    """``dlogits`` for both products of the backward, rounded once; may overwrite it."""
    if not dlogits.is_cuda or operand not in LOW_PRECISION:
        return Dlogits(dlogits)
    return Dlogits(dlogits.to(operand)) if operand == torch.bfloat16 else scale_to_half_(dlogits)


def scale_to_half_(dlogits: Tensor) -> Dlogits:
    """float32 ``dlogits`` in float16, which has too small a range for gradients that already hold ``1 / num_tokens``.

    They are brought to [-1, 1] in place, by a power of two computed on the device (no sync), so that nothing underflows
    before a GradScaler could help.
    """
    exponent = torch.ceil(torch.log2(torch.linalg.vector_norm(dlogits, torch.inf).clamp(min=1e-38)))
    return Dlogits(dlogits.mul_(torch.exp2(-exponent)).to(torch.float16), torch.exp2(exponent))


def grad_hidden(dlogits: Dlogits, weight: Tensor) -> Tensor:
    """``dlogits [C, V] @ weight [V, H]``, ``[C, H]`` in accumulator precision."""
    out = weight.new_empty(dlogits.values.shape[0], weight.shape[1], dtype=accumulate_dtype(weight.dtype))
    add_grad_hidden(out, dlogits, weight, first=True)
    return out


def add_grad_hidden(acc: Tensor, dlogits: Dlogits, weight: Tensor, first: bool) -> None:
    """``acc [C, H] (+)= dlogits [C, V] @ weight [V, H]``. ``first`` overwrites: ``acc`` may be uninitialised."""
    if first and not weight.shape[0]:  # a rank that holds no row of the head
        acc.zero_()
        return
    if _tensor_cores(weight):
        _accumulate_narrow(acc, dlogits.values, weight, dlogits.scale, first)
        return
    for start, stop, block in _wide_blocks(weight):
        _accumulate(acc, dlogits.values[:, start:stop], block, first and start == 0)


def add_grad_weight(acc: Tensor, dlogits: Dlogits, hidden: Tensor, first: bool) -> None:
    """``acc [V, H] (+)= dlogits [C, V]^T @ hidden [C, H]``. ``first`` overwrites: ``acc`` may be uninitialised."""
    if _tensor_cores(hidden):
        _accumulate_narrow(acc, dlogits.values.t(), hidden, dlogits.scale, first)
    else:
        _accumulate(acc, dlogits.values.t(), hidden.to(acc.dtype), first)


def _accumulate(acc: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    if first:
        torch.mm(left, right, out=acc)
    else:
        acc.addmm_(left, right)


def _accumulate_narrow(acc: Tensor, left: Tensor, right: Tensor, scale: Tensor | None, first: bool) -> None:
    """``acc (+)= left @ right * scale`` of tensor-core operands, written in float32."""
    if scale is None:
        if first:
            torch.mm(left, right, out_dtype=torch.float32, out=acc)
        else:
            torch.addmm(acc, left, right, out_dtype=torch.float32, out=acc)
        return
    for start in range(0, acc.shape[0], WIDEN_ROWS):
        part, rows = acc[start : start + WIDEN_ROWS], left[start : start + WIDEN_ROWS]
        if first:
            torch.mm(rows, right, out_dtype=torch.float32, out=part).mul_(scale)
        else:
            part.add_(torch.mm(rows, right, out_dtype=torch.float32).mul_(scale))
