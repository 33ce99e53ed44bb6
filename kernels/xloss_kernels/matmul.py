"""One tile of logits, hidden [T, H] x weight [V, H]^T, accumulated in float32 registers."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from xloss_kernels.tiles import HeadTile


@triton.jit
def logits_tile(hidden, weight, row0, column0, num_tokens, num_vocab, hidden_size, hidden_stride, weight_stride,
                BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, USE_TMA: tl.constexpr,
                EVEN_K: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Raw products of tokens row0.. and vocabulary column0..; rows and columns past the end hold garbage, not faults.

    With USE_TMA `hidden` and `weight` are tensor descriptors (which read 0 past the end), else pointers.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    if USE_TMA:
        for k in range(0, hidden_size, BLOCK_K):
            left = hidden.load([row0, k])
            right = weight.load([column0, k])
            acc = tl.dot(left, right.T, acc, input_precision=PRECISION)
    else:
        rows = row0 + tl.arange(0, BLOCK_M)
        columns = column0 + tl.arange(0, BLOCK_N)
        rows = tl.where(rows < num_tokens, rows, 0).to(tl.int64)
        columns = tl.where(columns < num_vocab, columns, 0).to(tl.int64)
        units = tl.arange(0, BLOCK_K)
        left_at = hidden + rows[:, None] * hidden_stride + units[None, :]
        right_at = weight + columns[None, :] * weight_stride + units[:, None]
        for k in range(0, hidden_size, BLOCK_K):
            if EVEN_K:
                left = tl.load(left_at)
                right = tl.load(right_at)
            else:
                left = tl.load(left_at, mask=units[None, :] < hidden_size - k, other=0.0)
                right = tl.load(right_at, mask=units[:, None] < hidden_size - k, other=0.0)
            acc = tl.dot(left, right, acc, input_precision=PRECISION)
            left_at += BLOCK_K
            right_at += BLOCK_K
    return acc


@triton.jit
def grouped(unit, num_m, num_n, GROUP_M: tl.constexpr):
    """Work unit -> (m, n): GROUP_M token tiles sweep the vocabulary together, so that both operands stay in L2."""
    per_group = GROUP_M * num_n
    first = unit // per_group * GROUP_M
    height = tl.minimum(num_m - first, GROUP_M)
    inside = unit % per_group
    return first + inside % height, inside // height


def check_head(hidden: torch.Tensor, weight: torch.Tensor) -> tuple[int, int, int]:
    """(T, V, H) of hidden [T, H] and weight [V, H] of one dtype and unit column strides."""
    assert hidden.ndim == 2 and weight.ndim == 2 and hidden.shape[1] == weight.shape[1] > 0
    assert hidden.dtype == weight.dtype and hidden.dtype in (torch.float32, torch.bfloat16, torch.float16)
    assert all(x.stride(1) == 1 or x.shape[1] == 1 for x in (hidden, weight)), "unit column strides"
    assert 0 < weight.shape[0] <= 2**24, "vocabulary ids travel in float32 partials: at most 2**24"
    return hidden.shape[0], weight.shape[0], hidden.shape[1]


def _describable(tensor: torch.Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0 and (tensor.stride(0) * tensor.itemsize) % 16 == 0


def operand_arguments(hidden: torch.Tensor, weight: torch.Tensor, tile: HeadTile) -> dict[str, object]:
    """Kernel arguments for the two operands; descriptors where the tile asks for them and the memory allows them."""
    use_tma = tile.use_tma and _describable(hidden) and _describable(weight)
    if use_tma:
        left: object = TensorDescriptor.from_tensor(hidden, [tile.block_m, tile.block_k])
        right: object = TensorDescriptor.from_tensor(weight, [tile.block_n, tile.block_k])
    else:
        left, right = hidden, weight
    return {
        "hidden": left,
        "weight": right,
        "hidden_size": hidden.shape[1],
        "hidden_stride": hidden.stride(0),
        "weight_stride": weight.stride(0),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_K": tile.block_k,
        "GROUP_M": tile.group_m,
        "USE_TMA": use_tma,
        "EVEN_K": hidden.shape[1] % tile.block_k == 0,
        "PRECISION": "ieee" if hidden.dtype == torch.float32 else "tf32",
    }
