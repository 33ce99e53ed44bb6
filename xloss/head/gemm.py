"""The three products of the head, always accumulated in float32 (float64 for float64).

bf16 and fp16 operands: on CUDA the tensor cores multiply them as they are and write float32
(``mm(..., out_dtype=float32)``, torch >= 2.8); elsewhere they are widened a block of the vocabulary at a time, which is
exact, because a product of two such numbers fits float32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

_WIDEN_ROWS = 8192  # vocabulary rows widened at once: a 32 MiB float32 temporary at H = 1024

LOW_PRECISION = (torch.bfloat16, torch.float16)


def accumulate_dtype(operand: torch.dtype) -> torch.dtype:
    """dtype of logits, statistics and gradient accumulators for GEMM operands of dtype ``operand``."""
    return torch.float64 if operand == torch.float64 else torch.float32


def _tensor_cores(x: Tensor) -> bool:
    return x.dtype in LOW_PRECISION and x.is_cuda


def _wide_blocks(weight: Tensor) -> Iterator[tuple[int, int, Tensor]]:
    """``(start, stop, weight[start:stop])`` in accumulator precision; one block, uncopied, where it is already wide."""
    if weight.dtype not in LOW_PRECISION:
        yield 0, weight.shape[0], weight
        return
    for start in range(0, weight.shape[0], _WIDEN_ROWS):
        stop = min(start + _WIDEN_ROWS, weight.shape[0])
        yield start, stop, weight[start:stop].float()


def project(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    """``out [C, V] = hidden [C, H] @ weight [V, H]^T``."""
    if _tensor_cores(hidden):
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
    else:
        wide = hidden.to(out.dtype)
        for start, stop, block in _wide_blocks(weight):
            torch.mm(wide, block.t(), out=out[:, start:stop])
    return out


def grad_hidden(dlogits: Tensor, weight: Tensor) -> Tensor:
    """``dlogits [C, V] @ weight [V, H]``, ``[C, H]`` in accumulator precision."""
    out = dlogits.new_empty(dlogits.shape[0], weight.shape[1], dtype=accumulate_dtype(weight.dtype))
    add_grad_hidden(out, dlogits, weight, first=True)
    return out


def add_grad_hidden(acc: Tensor, dlogits: Tensor, weight: Tensor, first: bool) -> None:
    """``acc [C, H] (+)= dlogits [C, V] @ weight [V, H]``. ``first`` overwrites: ``acc`` may be uninitialised."""
    if _tensor_cores(weight):
        _accumulate_narrow(acc, *_narrow(dlogits, weight.dtype), weight, first, transpose=False)
        return
    for start, stop, block in _wide_blocks(weight):
        _accumulate(acc, dlogits[:, start:stop], block, first and start == 0)


def add_grad_weight(acc: Tensor, dlogits: Tensor, hidden: Tensor, first: bool) -> None:
    """``acc [V, H] (+)= dlogits [C, V]^T @ hidden [C, H]``. ``first`` overwrites: ``acc`` may be uninitialised."""
    if _tensor_cores(hidden):
        _accumulate_narrow(acc, *_narrow(dlogits, hidden.dtype), hidden, first, transpose=True)
    else:
        _accumulate(acc, dlogits.t(), hidden.to(acc.dtype), first)


def _accumulate(acc: Tensor, left: Tensor, right: Tensor, first: bool) -> None:
    if first:
        torch.mm(left, right, out=acc)
    else:
        acc.addmm_(left, right)


def _accumulate_narrow(
    acc: Tensor, dlogits: Tensor, scale: Tensor | float, right: Tensor, first: bool, *, transpose: bool
) -> None:
    """``acc (+)= dlogits (or its transpose) @ right * scale`` of tensor-core operands, written in float32."""
    left = dlogits.t() if transpose else dlogits
    if isinstance(scale, Tensor):
        product = torch.mm(left, right, out_dtype=torch.float32).mul_(scale)
        acc.copy_(product) if first else acc.add_(product)
    elif first:
        torch.mm(left, right, out_dtype=torch.float32, out=acc)
    else:
        torch.addmm(acc, left, right, out_dtype=torch.float32, out=acc)


def _narrow(dlogits: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor | float]:
    """dlogits as a tensor-core operand and the factor its product must be multiplied by.

    float16 has too small a range for gradients that already hold ``1 / num_tokens``: they are brought to [-1, 1] by a
    power of two computed on the device (no sync), so that nothing underflows before a GradScaler could help.
    """
    if dtype != torch.float16:
        return dlogits.to(dtype), 1.0
    exponent = torch.ceil(torch.log2(dlogits.abs().amax().clamp(min=1e-38)))
    return (dlogits * torch.exp2(-exponent)).to(dtype), torch.exp2(exponent)
