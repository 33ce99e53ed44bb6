"""Log-ratios and ratios: the one place where a difference of log-probs is exponentiated."""

from __future__ import annotations

import torch
from torch import Tensor


def clamped_ratio(log_ratio: Tensor, low: float | None = None, high: float | None = None) -> Tensor:
    """``exp(clamp(log_ratio, low, high))`` ``[T]``; the gradient is 0 outside the clamp.

    XTuner and verl clamp at +-20; ``None`` leaves that side open.
    """
    if low is not None or high is not None:
        log_ratio = torch.clamp(log_ratio, min=low, max=high)
    return torch.exp(log_ratio)


def ratio_within(log_ratio: Tensor, limit: float | None) -> Tensor:
    """``clamped_ratio`` between ``-limit`` and ``limit``; ``None`` does not clamp."""
    return clamped_ratio(log_ratio, None if limit is None else -limit, limit)
