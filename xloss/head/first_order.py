"""Backwards whose result must not be differentiated again, and that say so when it is."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from xloss.errors import GraphError

Backward = Callable[..., tuple[Tensor | None, ...]]


class _Refuse(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.view_as(grad)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        raise GraphError(
            "the second derivative of an xloss head is not available in chunked modes; use mode='eager' for it"
        )


def first_order(backward: Backward) -> Backward:
    """Decorate an autograd backward: under ``create_graph=True``, differentiating its gradients raises ``GraphError``.

    torch's ``once_differentiable`` stays silent when the upstream gradient is a constant, and the second derivative
    then takes the gradient for a constant too.
    """

    @wraps(backward)
    def wrapped(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        with torch.no_grad():
            out = backward(ctx, *grads)
        if not torch.is_grad_enabled():
            return out
        return tuple(_Refuse.apply(g.detach().requires_grad_()) if isinstance(g, Tensor) else g for g in out)

    return wrapped
