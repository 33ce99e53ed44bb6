"""Asserts the launchers share. They guard our own invariants: users are checked at the public door."""

from __future__ import annotations

import torch


def check_rows(logits: torch.Tensor, labels: torch.Tensor) -> tuple[int, int, int]:
    """(C, V, K) of logits [C, V] with unit column stride and labels [C] or [C, K], int64 and contiguous."""
    assert logits.ndim == 2 and logits.shape[1] > 0, f"logits must be [C, V], got {tuple(logits.shape)}"
    assert logits.stride(1) == 1 or logits.shape[1] == 1, "logits need unit column stride"
    assert logits.dtype in (torch.float32, torch.bfloat16, torch.float16), f"logits are {logits.dtype}"
    return logits.shape[0], logits.shape[1], check_labels(labels, logits.shape[0])


def check_labels(labels: torch.Tensor, num_rows: int) -> int:
    """K of labels [C] (1) or [C, K]."""
    assert labels.ndim in (1, 2) and labels.shape[0] == num_rows, (
        f"labels are {tuple(labels.shape)} for {num_rows} rows"
    )
    assert labels.dtype == torch.int64 and labels.is_contiguous(), "labels must be contiguous int64"
    num_labels = 1 if labels.ndim == 1 else labels.shape[1]
    assert num_labels >= 1
    return num_labels


def check_vectors(shape: tuple[int, ...], **vectors: torch.Tensor | None) -> None:
    """Each given vector is float32, contiguous and of `shape`."""
    for name, vector in vectors.items():
        if vector is not None:
            assert tuple(vector.shape) == shape, f"{name} is {tuple(vector.shape)}, expected {shape}"
            assert vector.dtype == torch.float32 and vector.is_contiguous(), f"{name} must be contiguous float32"


def is_overlay(source: torch.Tensor, out: torch.Tensor) -> bool:
    """Whether `out` lies on `source` with a smaller item; refuses every other partial overlap of the two.

    Allowed: the same rows in place (same dtype, start and row stride), a half-size overlay (rows start at the same
    bytes), or memory that does not touch.
    """
    first, last = _span(source)
    start, stop = _span(out)
    if stop <= first or last <= start:
        return False
    same_rows = first == start and source.stride(0) * source.itemsize == out.stride(0) * out.itemsize
    assert same_rows or (first == start and source.shape[0] <= 1), "out overlaps the logits, but not row on row"
    assert out.itemsize <= source.itemsize, "out overlaps the logits with a larger item"
    return out.itemsize < source.itemsize


def _span(tensor: torch.Tensor) -> tuple[int, int]:
    if tensor.numel() == 0:
        return 0, 0
    size = 1 + sum((length - 1) * stride for length, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + size * tensor.itemsize
