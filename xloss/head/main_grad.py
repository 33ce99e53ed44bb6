"""The weight's gradient straight into ``weight.main_grad``, as Megatron-LM keeps it (``gradient_accumulation_fusion``).

Megatron's contract, as its DDP hook reads it: the backward adds to ``main_grad`` and sets
``weight.grad_added_to_main_grad = True`` where that attribute exists; autograd is then given a gradient that nobody
adds (the hook only wants one to be there), and nothing where the attribute does not exist.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from xloss.errors import OptionError


@dataclass(frozen=True)
class MainGrad:
    """A weight and the buffer its gradient is added to."""

    weight: Tensor
    buffer: Tensor

    @classmethod
    def of(cls, weight: Tensor, dtype: torch.dtype) -> MainGrad:
        """The ``main_grad`` of ``weight``, checked. ``dtype`` is the one gradients accumulate in."""
        buffer = getattr(weight, "main_grad", None)
        wanted = f"a {dtype} tensor of shape {tuple(weight.shape)} on {weight.device} that requires no gradient"
        if not isinstance(buffer, Tensor):
            found = "no such attribute" if buffer is None else type(buffer).__name__
        elif (buffer.shape, buffer.dtype, buffer.device) != (weight.shape, dtype, weight.device):
            found = f"{buffer.dtype} {tuple(buffer.shape)} on {buffer.device}"
        elif buffer.requires_grad:
            found = "a tensor that requires a gradient"
        else:
            return cls(weight, buffer)
        raise OptionError(f"accumulate_into_main_grad=True needs head_weight.main_grad, {wanted}; got {found}")

    def add(self, grad: Tensor, upstream: Tensor) -> None:
        """``main_grad += grad * upstream``, ``upstream`` a scalar on the device; no host sync, no temporary."""
        self.buffer.addcmul_(grad, upstream.to(grad.dtype))

    def given_to_autograd(self) -> Tensor | None:
        """Mark the gradient as added. What autograd gets in its stead: zeros that take no memory, or nothing."""
        if not hasattr(self.weight, "grad_added_to_main_grad"):
            return None
        self.weight.grad_added_to_main_grad = True
        return self.weight.new_zeros(()).expand(self.weight.shape)
