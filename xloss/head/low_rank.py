"""The thin product beside the head's: ``z += h2 B^T`` with ``h2 [T, r]`` and ``B [V, r]``, and its gradients."""

from __future__ import annotations

import torch
from torch import Tensor

from xloss.head import gemm

Places = Tensor | slice


class LowRank:
    """Adds to chunks of logits in their own precision; its gradients are products like those of the head."""

    def __init__(self, hidden: Tensor, weight: Tensor, operand: torch.dtype) -> None:
        acc = gemm.accumulate_dtype(operand)
        self._hidden, self._weight = hidden.detach().to(acc), weight.detach().to(acc)
        self._operand = operand
        self.hidden_grad: Tensor | None = None
        self.weight_grad: Tensor | None = None

    def want_grads(self, hidden: bool, weight: bool) -> None:
        """Start the sums that are wanted."""
        self.hidden_grad = torch.zeros_like(self._hidden) if hidden else None
        self.weight_grad = torch.zeros_like(self._weight) if weight else None

    def add_logits_(self, logits: Tensor, places: Places) -> None:
        """``logits [C, V] += h2 B^T`` of the tokens at ``places``."""
        logits.addmm_(self._hidden[places], self._weight.t())

    def add_grads(self, dlogits: gemm.Dlogits, places: Places) -> None:
        """The part of a chunk's gradient of raw logits ``[C, V]``."""
        if self.hidden_grad is not None:
            self.hidden_grad[places] = gemm.grad_hidden(dlogits, self._weight.to(self._operand))
        if self.weight_grad is not None:
            hidden = self._hidden[places].to(self._operand)
            gemm.add_grad_weight(self.weight_grad, dlogits, hidden, first=False)
