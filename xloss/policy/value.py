"""Value losses of a critic, ``[T]`` to ``[T]``, to minimise. ``values`` carries the gradient."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

ValueLossType = Literal["mse", "mae", "huber", "smooth_l1", "cauchy"]


def regression(error: Tensor, loss_type: ValueLossType, scale: float = 1.0) -> Tensor:
    """``rho(error)``, 0 and flat at 0.

    ``mse``: ``x^2 / 2``. ``mae``: ``|x|``. ``huber``: ``x^2 / 2`` up to ``|x| = scale``, ``scale (|x| - scale / 2)``
    beyond. ``smooth_l1``: that divided by ``scale``. ``cauchy``: ``scale^2 / 2 log(1 + (x / scale)^2)``.
    Raises ``ValueError`` for another name.
    """
    if loss_type == "mse":
        return 0.5 * error.square()
    if loss_type == "mae":
        return error.abs()
    if loss_type in ("huber", "smooth_l1"):
        huber = F.huber_loss(error, torch.zeros_like(error), reduction="none", delta=scale)
        return huber if loss_type == "huber" else huber / scale
    if loss_type == "cauchy":
        return 0.5 * scale**2 * torch.log1p((error / scale).square())
    raise ValueError(f"loss_type must be one of mse, mae, huber, smooth_l1, cauchy; got {loss_type!r}")


def value_loss(
    values: Tensor,
    returns: Tensor,
    old_values: Tensor | None = None,
    *,
    loss_type: ValueLossType = "mse",
    scale: float = 1.0,
    value_clip: float | None = None,
) -> Tensor:
    """``rho(values - returns)``, or with ``value_clip`` the larger of that and the same of ``values`` held to
    ``old_values +- value_clip``, whose gradient is 0 where they are held.

    With ``mse``: ``1/2 max((v - R)^2, (clip(v, v_old +- c) - R)^2)`` (PPO; verl, NeMo RL, OpenRLHF).
    """
    loss = regression(values - returns, loss_type, scale)
    if value_clip is None:
        return loss
    if old_values is None:
        raise ValueError(f"value_clip={value_clip} needs old_values, the critic's values at the start of the step")
    clipped = torch.clamp(values, old_values - value_clip, old_values + value_clip)
    return torch.maximum(loss, regression(clipped - returns, loss_type, scale))
