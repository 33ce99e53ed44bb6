"""What the tests of supervised losses share: small tensors, one step by xloss, the same by materialised logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.property.helpers import leaf
from tests.property.steps import contexts

RUNS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "one_pass": {"mode": "chunk", "plan": "one_pass"},
    "two_pass": {"mode": "chunk", "plan": "two_pass"},
    "auto": {},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
both_dtypes = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=["f64", "f32"])
T, H, V = 12, 5, 11
BOUNDS = torch.tensor([0, 5, 5, 6, 12], dtype=torch.int32)


def tensors(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states [1, T, H], weight and labels, some ignored, one of them with a NaN hidden state."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(1, T, H, generator=g, dtype=dtype), torch.randn(V, H, generator=g, dtype=dtype)
    labels = torch.randint(0, V, (1, T), generator=g)
    labels[0, 0], labels[0, 1], labels[0, [3, 5, 7]] = V - 1, 0, -100
    return hidden, weight, labels


def step(
    cfg: Any, item: Any, hidden: Tensor, weight: Tensor, bounds: Tensor | None = BOUNDS, upstream: float = 1.7
) -> list[Tensor]:
    """Loss and gradients of one micro-batch."""
    leaves = [leaf(hidden), leaf(weight)]
    (ctx,) = contexts(cfg, [item], None if bounds is None else [bounds])
    loss, _ = ctx.forward(*leaves)
    return [loss.detach(), *torch.autograd.grad(upstream * loss, leaves)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], dtype: torch.dtype = torch.float64) -> None:
    """Calibrated weights are float32, whence the float64 budget."""
    relative = budgets.F32_GRADIENT if dtype == torch.float64 else 10 * budgets.F32_GRADIENT
    for name, a, b in zip(("loss", "d hidden", "d weight"), ours, theirs, strict=True):
        budgets.assert_relative(name, a.double(), b.double(), relative)


def gold(loss: Any, hidden: Tensor, weight: Tensor, upstream: float = 1.7) -> list[Tensor]:
    """Loss of materialised logits [T, V] and its gradients, float64."""
    leaves = [hidden.double().nan_to_num(0).requires_grad_(), weight.double().requires_grad_()]
    value = loss((leaves[0] @ leaves[1].T).flatten(0, -2))
    return [value.detach(), *torch.autograd.grad(upstream * value, leaves)]
