"""Value losses of a critic, token by token, from the definitions. e = value - return.

mse e^2 / 2     mae |e|     huber e^2 / 2 for |e| <= d, else d |e| - d^2 / 2     smooth_l1 e^2 / (2 b) for |e| <= b, else |e| - b / 2
cauchy c^2 / 2 log(1 + (e / c)^2)
clipped: the larger of the loss of v and the loss of v held to [old - clip, old + clip]
"""  # noqa: E501

from __future__ import annotations

import torch
from torch import Tensor


def rho(e: Tensor, loss_type: str, scale: float) -> Tensor:
    size = abs(e)
    if loss_type == "mse":
        return e * e / 2
    if loss_type == "mae":
        return size
    if loss_type == "huber":
        return e * e / 2 if size <= scale else scale * size - scale * scale / 2
    if loss_type == "smooth_l1":
        return e * e / (2 * scale) if size <= scale else size - scale / 2
    assert loss_type == "cauchy"
    return scale * scale / 2 * torch.log(1 + (e / scale) ** 2)


def token(v: Tensor, ret: Tensor, old: Tensor, loss_type: str, scale: float, clip: float | None) -> Tensor:
    free = rho(v - ret, loss_type, scale)
    if clip is None:
        return free
    held = v if old - clip <= v <= old + clip else (old + clip if v > old + clip else old - clip)
    clipped = rho(held - ret, loss_type, scale)
    return clipped if clipped > free else free


def step(
    values: list[Tensor],
    returns: list[Tensor],
    old: list[Tensor],
    valid: list[Tensor],
    weights: list[Tensor],
    loss_type: str = "mse",
    scale: float = 1.0,
    clip: float | None = None,
) -> Tensor:
    """sum over micro-batches and valid tokens of weight * loss, float64."""
    total = torch.zeros((), dtype=torch.float64)
    for v, ret, o, keep, w in zip(values, returns, old, valid, weights, strict=True):
        for place in keep.nonzero():
            i = tuple(place)
            total = total + w[i].double() * token(v[i].double(), ret[i].double(), o[i].double(), loss_type, scale, clip)
    return total
