"""From raw head products to effective logits, and the slope back.

z = softcap(logit_scale * (raw + bias)) / temperature        softcap(x) = c * tanh(x / c)
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl


@dataclass(frozen=True)
class Transform:
    """What the kernels apply to a raw logit. `temperature` is a float or float32 [rows]; `bias` is [V] or None."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float | torch.Tensor = 1.0
    bias: torch.Tensor | None = None

    def arguments(self, num_rows: int, num_vocab: int) -> dict[str, object]:
        """The kernels' keyword arguments for these settings."""
        per_row = self.temperature if isinstance(self.temperature, torch.Tensor) else None
        if per_row is not None:
            assert per_row.shape == (num_rows,) and per_row.dtype == torch.float32 and per_row.is_contiguous()
        if self.bias is not None:
            assert self.bias.shape == (num_vocab,) and self.bias.is_contiguous()
        return {
            "bias": self.bias,
            "temperature": per_row,
            "logit_scale": float(self.logit_scale),
            "softcap": None if self.softcap is None else float(self.softcap),
            "inv_temperature": 1.0 if per_row is not None else 1.0 / float(self.temperature),
        }


@triton.jit
def tanh(x):
    """tanh to about 2 ulp: a Pade quotient below 0.5, where 1 - exp(-2|x|) would cancel, and the exponential above."""
    size = tl.abs(x)
    t = tl.minimum(size, 0.5)
    t2 = t * t
    small = t * (10395.0 + t2 * (1260.0 + t2 * 21.0)) / (10395.0 + t2 * (4725.0 + t2 * (210.0 + t2)))
    decay = tl.exp(-2.0 * size)
    value = tl.where(size < 0.5, small, (1.0 - decay) / (1.0 + decay))
    return tl.where(x < 0.0, -value, value)


@triton.jit
def effective(raw, bias, logit_scale, softcap, inv_temperature):
    """raw (float32 block) -> (z, dz/draw). `bias` is a block that broadcasts against raw, or None."""
    x = raw
    if bias is not None:
        x = x + bias
    x = x * logit_scale
    if softcap is None:
        z = x * inv_temperature
        slope = logit_scale * inv_temperature
    else:
        t = tanh(x / softcap)
        z = softcap * t * inv_temperature
        slope = (1.0 - t * t) * logit_scale * inv_temperature
    return z, slope


@triton.jit
def row_inv_temperature(temperature, row, inv_temperature):
    """1 / temperature of `row` (a scalar or a block of rows), from the per-row tensor when there is one."""
    if temperature is not None:
        inv_temperature = 1.0 / tl.load(temperature + row)
    return inv_temperature
