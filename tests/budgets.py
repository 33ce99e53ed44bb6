"""The only place where a tolerance is written. Every one follows from a dtype's rounding step and a size.

Errors are measured norm-wise: `|got - want|_F <= factor * eps * (1 + max|z|) * scale`.
- A logit of size |z| is known to eps |z|, and so is everything made of it: hence `1 + max|z|`.
- `scale` is the size the quantity could have, not the one it happens to have: a gradient `g (onehot - p)` may cancel to
  0 and still carries the rounding of its terms. For dW that is |upstream| |hidden| d(logit)/d(raw), and so on.
In float64 that leaves 1e-13: a wrong term cannot hide there. Low precision is judged three ways: float64 gold, eager in
the working dtype, ours; ours may be at most THREE_WAY_FACTOR times as far from gold as eager is.
"""

from __future__ import annotations

import torch
from torch import Tensor

ROUNDING_FACTOR = 64.0  # GEMM of up to 64 terms, exp, sum over V: each adds a few eps
F32_GRADIENT = 1e-6  # design bar: float32 gradients against float64, norm-wise relative, logits of unit scale
F32_LOSS = 1e-6  # the same for a loss, relative to the sum of its absolute terms
BF16_LOGPROB_NATS = 2e-3  # design bar: log-probs of bf16 inputs against float64 on the same inputs
THREE_WAY_FACTOR = 1.5
GRADCHECK = {"eps": 1e-6, "atol": 1e-7, "rtol": 1e-5}  # central differences: h^2 truncation and eps / h rounding
CHUNK_GROWTH = 1.5  # error with one token per chunk over error with one chunk: accumulation must not depend on the cut


def eps(dtype: torch.dtype) -> float:
    return torch.finfo(dtype).eps


def norm(x: Tensor | None) -> float:
    return 0.0 if x is None else float(torch.linalg.vector_norm(x.detach().double()))


def error(got: Tensor, want: Tensor) -> float:
    """Frobenius norm of the difference; inf when a shape differs or anything is not finite."""
    if got.shape != want.shape or not bool(torch.isfinite(got).all()):
        return float("inf")
    return norm(got.detach().double() - want.detach().double())


def rounding(dtype: torch.dtype, max_logit: float, scale: float) -> float:
    """Allowed norm-wise error of something of size `scale` computed in `dtype` from logits up to `max_logit`."""
    return ROUNDING_FACTOR * eps(dtype) * (1.0 + max_logit) * scale


def wide_sum(dtype: torch.dtype, terms: int) -> float:
    """Relative error of a sum of `terms` products, kept in float32 or wider and rounded once to `dtype`."""
    accumulator = torch.float64 if dtype == torch.float64 else torch.float32
    return eps(accumulator) * terms**0.5 + eps(dtype)


def assert_rounding(name: str, got: Tensor, want: Tensor, max_logit: float, scale: float) -> None:
    """`got` is `want` up to the rounding of its own dtype."""
    found, allowed = error(got, want), rounding(got.dtype, max_logit, scale + norm(want))
    assert found <= allowed, f"{name}: error {found:.3g} > {allowed:.3g} (|want| = {norm(want):.3g})"


def assert_relative(name: str, got: Tensor, want: Tensor, relative: float) -> None:
    """`got` is `want` to a relative norm-wise error; a zero `want` must be met exactly."""
    found, allowed = error(got, want), relative * norm(want)
    assert found <= allowed, f"{name}: error {found:.3g} > {allowed:.3g} ({relative:.1g} of {norm(want):.3g})"


def assert_three_way(name: str, ours: Tensor, base: Tensor, gold: Tensor, working: torch.dtype | None = None) -> None:
    """Ours is as close to float64 as eager in the working dtype is. The floor is the rounding of the result itself."""
    mine, theirs = error(ours, gold), error(base, gold)
    floor = eps(working or ours.dtype) * norm(gold)
    assert mine <= THREE_WAY_FACTOR * theirs + floor, f"{name}: error {mine:.3g}, eager {theirs:.3g}, floor {floor:.3g}"


FUSED_RELATIVE = {torch.float32: 3e-6, torch.float16: 2e-3}
"""The interpreted fused mode against float64, max |error| / max |value|: float32 sums; float16 inputs, gradients."""

DISTILL_RELATIVE = 4e-6
"""Losses and gradients of a small distillation, norm-wise: calibrated weights are float32, also in float64; in float32
a divergence is a difference of log-probs of size up to 10, each known to 1e-6."""
