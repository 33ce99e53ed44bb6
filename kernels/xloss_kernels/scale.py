"""Multiply by a device scalar without a host sync, and cast.

The one-pass plan forms gradients before it knows the upstream gradient; `scale_` applies it in backward. The usual
upstream is exactly 1: each program reads the scalar and leaves.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from xloss_kernels import tiles

_BLOCK = 4096
_WAVES = 8


@triton.jit
def scale_kernel(source, out, scale, size, IN_PLACE: tl.constexpr, BLOCK: tl.constexpr):
    factor = 1.0
    if scale is not None:
        factor = tl.load(scale).to(tl.float32)
        if IN_PLACE:
            if factor == 1.0:
                return
    pid = tl.program_id(0).to(tl.int64)
    step = tl.arange(0, BLOCK)
    for start in range(pid * BLOCK, size, tl.num_programs(0).to(tl.int64) * BLOCK):
        at = start + step
        value = tl.load(source + at, mask=at < size).to(tl.float32) * factor
        tl.store(out + at, value.to(out.dtype.element_ty), mask=at < size)


def _launch(source: torch.Tensor, out: torch.Tensor, scale: torch.Tensor | None) -> None:
    assert source.is_contiguous() and out.is_contiguous() and source.numel() == out.numel()
    assert scale is None or scale.numel() == 1, "scale is one number on the device"
    size = source.numel()
    if size:
        blocks = triton.cdiv(size, _BLOCK)
        scale_kernel[(min(blocks, tiles.num_programs(source.device, _WAVES)),)](
            source, out, scale, size, IN_PLACE=source.data_ptr() == out.data_ptr(), BLOCK=_BLOCK,
            num_warps=8, enable_fp_fusion=tiles.FP_FUSION)  # fmt: skip


def scale_(tensor: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """tensor *= scale in place, product in float32; contiguous tensor, device scalar. Nothing is touched at 1."""
    _launch(tensor, tensor, scale)
    return tensor


def cast_scale(tensor: torch.Tensor, dtype: torch.dtype, scale: torch.Tensor | None = None) -> torch.Tensor:
    """(tensor * scale) rounded once to `dtype`, in a new tensor; `scale` is a device scalar or None (1)."""
    out = torch.empty_like(tensor, dtype=dtype, memory_format=torch.contiguous_format)
    _launch(tensor, out, scale)
    return out
