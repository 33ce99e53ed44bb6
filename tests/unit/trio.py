"""What the tests of the trio share: tensors, modes, comparisons."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests import budgets

VANILLA = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.2}
T, H, V = 11, 4, 13
MODES = [{"mode": "eager"}, {"mode": "chunk", "chunk_size": 3}, {"mode": "chunk"}, {"mode": "auto", "chunk_size": 4}]
every_mode = pytest.mark.parametrize("run", MODES, ids=["eager", "chunk-3", "chunk", "auto"])


def tensors(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and labels, the first and the fifth ignored."""
    hidden = torch.randn(1, T, H, dtype=dtype, requires_grad=True)
    weight = torch.randn(V, H, dtype=dtype, requires_grad=True)
    labels = torch.randint(0, V, (1, T))
    labels[0, [0, 4]] = -100
    labels[0, 1], labels[0, -1] = V - 1, 0
    return hidden, weight, labels


def grads(loss: Tensor, *inputs: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, inputs))


def assert_same(ours: list[Tensor], theirs: list[Tensor], relative: float = 1e-6) -> None:
    """To float32, the precision of calibrated weights."""
    for index, (a, b) in enumerate(zip(ours, theirs, strict=True)):
        budgets.assert_relative(f"value {index}", a, b, relative)
