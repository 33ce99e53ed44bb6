"""From what a product wrote to logits: bias, scale, cap and temperature, in place."""

from __future__ import annotations

from torch import Tensor

from xloss.policy.divergence import FLOOR


def transform_(
    raw: Tensor, bias: Tensor | None, temperature: float | Tensor, logit_scale: float, softcap: float | None
) -> Tensor:
    """``softcap(logit_scale * (raw + bias)) / temperature`` of ``raw [C, V]``; temperature a number or ``[C]``.

    A banned token's bias of -inf becomes ``FLOOR``, so that p * z stays 0.
    """
    t = column(temperature)
    if bias is not None:
        raw += bias.to(raw.dtype).clamp(min=FLOOR)
    if softcap is not None:
        return raw.mul_(logit_scale / softcap).tanh_().mul_(softcap / t)
    factor = logit_scale / t
    return raw.mul_(factor) if isinstance(factor, Tensor) or factor != 1.0 else raw


def column(x: float | Tensor) -> float | Tensor:
    """A per-row vector ``[C]`` as a column, ready to meet ``[C, V]``."""
    return x.unsqueeze(1) if isinstance(x, Tensor) else x
