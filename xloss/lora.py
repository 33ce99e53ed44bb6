"""Low-rank adapters on the head (LoRA, Hu et al. 2021, arXiv:2106.09685), without the dense ``B A`` ``[V, H]``."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from xloss.errors import DeviceError, DtypeError, OptionError, ShapeError


@dataclass(frozen=True)
class Lora:
    """One adapter, ``scale * B dropout(A h)`` as peft has it: ``scale * (dropout(h) A^T) B^T``.

    Args:
        a: ``[r, H]``. b: ``[V, r]``; any float dtype.
        scale: ``alpha / r``, or ``alpha / sqrt(r)`` (rsLoRA).
        dropout: applied to the hidden states on their way to ``A``; an ``nn.Dropout`` in training.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    dropout: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True)
class LoraWeight:
    """A head ``W + sum_i scale_i B_i A_i``: give it where a ``head_weight`` is taken.

    ``z = h W^T + sum_i scale_i (dropout_i(h) A_i^T) B_i^T``: two thin products beside the head's own. A frozen ``W``
    has no product for its gradient.
    """

    weight: Tensor
    adapters: tuple[Lora, ...]

    def __post_init__(self) -> None:
        if not isinstance(self.weight, Tensor) or self.weight.ndim != 2:
            raise OptionError("LoraWeight needs a weight [V, H], a torch.Tensor")
        if not self.adapters:
            raise OptionError("LoraWeight needs an adapter; give the weight itself where there is none")
        vocab, hidden = self.weight.shape
        for lora in self.adapters:
            rank = lora.a.shape[0]
            for name, x, shape in (("a", lora.a, (rank, hidden)), ("b", lora.b, (vocab, rank))):
                if tuple(x.shape) != shape:
                    raise ShapeError(f"{name} of an adapter of rank {rank} must be {shape}; got {tuple(x.shape)}")
                if not x.dtype.is_floating_point:
                    raise DtypeError(f"{name} of an adapter must be floating point; got {x.dtype}")
                if x.device != self.weight.device:
                    raise DeviceError(
                        f"{name} of an adapter is on {x.device}, the head's weight on {self.weight.device}"
                    )

    @property
    def rank(self) -> int:
        """Rank of all adapters together."""
        return sum(lora.a.shape[0] for lora in self.adapters)

    def down(self, hidden: Tensor) -> Tensor:
        """``scale_i dropout_i(h) A_i^T`` of ``hidden [T, H]``, side by side: ``[T, rank]``."""
        parts = []
        for lora in self.adapters:
            x = hidden.to(lora.a.dtype)
            x = x if lora.dropout is None else lora.dropout(x)
            parts.append(x @ lora.a.t() * lora.scale)
        return torch.cat(parts, dim=1)

    def up(self) -> Tensor:
        """All ``B_i`` side by side: ``[V, rank]``."""
        return self.adapters[0].b if len(self.adapters) == 1 else torch.cat([lora.b for lora in self.adapters], dim=1)

    def tensors(self) -> list[Tensor]:
        """Every ``A`` and ``B``."""
        return [x for lora in self.adapters for x in (lora.a, lora.b)]

    def detach(self) -> LoraWeight:
        """The same head as a constant."""
        adapters = tuple(replace(lora, a=lora.a.detach(), b=lora.b.detach()) for lora in self.adapters)
        return LoraWeight(self.weight.detach(), adapters)
