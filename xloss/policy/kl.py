"""KL penalties against a reference policy from the sampled token's log-probs, ``[T]`` to ``[T]``.

Estimators after J. Schulman, *Approximating KL divergence* (2020); names of the field as aliases.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

KLType = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
KLEstimator = Literal["k1", "abs", "k2", "k3"]
KL_ESTIMATOR: dict[KLType, KLEstimator] = {
    "kl": "k1",
    "k1": "k1",
    "abs": "abs",
    "mse": "k2",
    "k2": "k2",
    "low_var_kl": "k3",
    "k3": "k3",
}
KLGrad = Literal["plain", "straight_through", "unbiased", "score_function"]
KLClamp = float | Literal["auto"] | None
"""A limit, ``None`` for no limit, or ``auto``: XTuner's and verl's limits for k3, none for the other estimators."""
_K3_LIMITS = (20.0, 10.0)  # of |x| and of the value


def kl_limits(kl_type: KLType, clamp_in: KLClamp, clamp_out: KLClamp) -> tuple[float | None, float | None]:
    """What ``auto`` stands for with this estimator."""
    auto = _K3_LIMITS if KL_ESTIMATOR[kl_type] == "k3" else (None, None)
    return auto[0] if clamp_in == "auto" else clamp_in, auto[1] if clamp_out == "auto" else clamp_out


def kl_penalty(
    logprobs: Tensor,
    ref_logprobs: Tensor,
    kl_type: KLType,
    *,
    grad: KLGrad = "plain",
    log_ratio: Tensor | None = None,
    clamp_in: KLClamp = "auto",
    clamp_out: KLClamp = "auto",
    clamp_straight_through: bool = False,
    clamp_weighted: bool = False,
) -> Tensor:
    """Per-token penalty with ``x = logprobs - ref_logprobs``.

    ``kl``, ``k1``: ``x``; ``abs``: ``|x|``; ``mse``, ``k2``: ``x^2 / 2``; ``low_var_kl``, ``k3``: ``exp(-x) + x - 1``.

    Args:
        grad: ``plain``: the estimator's own gradient. ``straight_through``: its value with the gradient of k2, ``x``
            (verl's names with a plus). ``unbiased``: ``r k`` with a differentiable ``r = exp(log_ratio)`` (TRL
            ``use_bias_correction_kl``, slime ``use_unbiased_kl``); for k3 the gradient is ``r x``. ``score_function``:
            ``exp(logprobs - sg(logprobs)) k``, the value unchanged (NeMo RL); for k3 the gradient is ``x``.
        log_ratio: of the current policy to the one that sampled, with its gradient; for ``unbiased``.
        clamp_in: limit of ``|x|``. clamp_out: limit of the value, before ``r``. The gradient is 0 beyond either.
        clamp_straight_through: the clamps act on values alone; the gradient beyond is that at the limit of ``x``.
        clamp_weighted: ``clamp_out`` limits ``r k``, and a clamped token has no gradient at all, none of ``r`` or of
            the score function either (NeMo RL).

    Raises:
        ValueError: unknown ``kl_type`` or ``grad``; ``unbiased`` without ``log_ratio``.
    """
    if kl_type not in KL_ESTIMATOR:
        raise ValueError(f"kl_type must be one of {tuple(KL_ESTIMATOR)}; got {kl_type!r}")
    if grad not in get_args(KLGrad):
        raise ValueError(f"grad must be one of {get_args(KLGrad)}; got {grad!r}")
    limit_in, limit_out = kl_limits(kl_type, clamp_in, clamp_out)
    x = logprobs - ref_logprobs
    limited = _limited(x, limit_in, clamp_straight_through)
    estimate = kl_estimate(limited, KL_ESTIMATOR[kl_type])
    value = _limited(estimate, limit_out, clamp_straight_through)
    if grad == "plain":
        return value
    if grad == "straight_through":
        surrogate = 0.5 * x.square()
        return value.detach() + (surrogate - surrogate.detach())
    if grad == "score_function":
        log_ratio = logprobs - logprobs.detach()
    if log_ratio is None:
        raise ValueError("grad='unbiased' needs log_ratio, of the current policy to the one that sampled")
    ratio = torch.exp(log_ratio)
    if not clamp_weighted:
        return ratio * value
    weighted = ratio * estimate
    value = _limited(weighted, limit_out, False)
    return torch.where((limited != x) | (value != weighted), value.detach(), value)


def kl_estimate(x: Tensor, estimator: KLEstimator) -> Tensor:
    """The estimator on ``x``, log-prob of the policy that sampled minus that of the other, unclamped."""
    if estimator == "k1":
        return x
    if estimator == "abs":
        return x.abs()
    if estimator == "k2":
        return 0.5 * x.square()
    return torch.expm1(-x) + x


def _limited(x: Tensor, limit: float | None, straight_through: bool) -> Tensor:
    """``x`` within ``+-limit``."""
    if limit is None:
        return x
    clamped = torch.clamp(x, -limit, limit)
    return clamped.detach() + (x - x.detach()) if straight_through else clamped
