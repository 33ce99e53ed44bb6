"""Inputs that are not finite at tokens of the loss: refused, or left out and counted, where batches are built."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from xloss.errors import NonFiniteError
from xloss.losses.model import TokenBatch
from xloss.metrics import Metric

NonFinite = Literal["raise", "drop"]


def finite_tokens(kwargs_list: Sequence[TokenBatch], ignore_idx: int, rule: NonFinite) -> list[Tensor]:
    """Tokens of the loss of each micro-batch, in the shape of its labels: not ignored and every float field finite.

    Calibrated weights and the temperature are not looked at. ``raise``: every such field must be finite, else
    ``NonFiniteError`` with its name and counts; waits for a CUDA device, which building a batch may.
    """
    out = []
    for number, kwargs in enumerate(kwargs_list):
        valid = kwargs.shifted_labels != ignore_idx
        for name, (value, mark) in kwargs.per_token().items():
            if mark.weight or name == "temperature" or not value.dtype.is_floating_point:
                continue
            finite = torch.isfinite(value)
            if mark.trailing:
                finite = finite.all(-1)
            if rule == "raise":
                _refuse(name, value, finite, valid, number)
            valid = valid & finite
        out.append(valid)
    return out


def nonfinite_metrics(finite: Tensor, labelled: Tensor) -> dict[str, Metric]:
    """``num_nonfinite`` tokens left out of the loss, and ``nonfinite_frac`` of all tokens with a label."""
    left_out = (labelled & ~finite).to(torch.float32)
    return {"num_nonfinite": Metric.total(left_out), "nonfinite_frac": Metric.mean(left_out, labelled)}


def _refuse(name: str, value: Tensor, finite: Tensor, valid: Tensor, number: int) -> None:
    bad = value[valid & ~finite]
    count = bad.shape[0]
    if count:
        nans = int(bad.isnan().reshape(count, -1).any(1).sum())
        raise NonFiniteError(
            f"{name} of micro-batch {number} is not finite at {count} of its {int(valid.sum())} tokens of the "
            f"loss ({nans} NaN, {count - nans} inf); give finite values, ignore those tokens' labels, or choose "
            "nonfinite='drop', which leaves them out and counts them"
        )
