"""KL penalties against a reference policy from the sampled token's log-probs, ``[T]`` to ``[T]``.

Estimators after J. Schulman, *Approximating KL divergence* (2020); names of the field as aliases.
"""

from __future__ import annotations

from typing import Literal

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
_K3_INPUT_LIMIT, _K3_OUTPUT_LIMIT = 20.0, 10.0  # XTuner and verl; the gradient is 0 beyond either limit


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kl_type: KLType) -> Tensor:
    """Per-token penalty with ``x = logprobs - ref_logprobs``.

    ``kl``, ``k1``: ``x``; ``abs``: ``|x|``; ``mse``, ``k2``: ``x^2 / 2``; ``low_var_kl``, ``k3``:
    ``exp(-x) + x - 1`` with ``-x`` clamped to +-20 and the value to +-10. Raises ``ValueError`` for another name.
    """
    if kl_type not in KL_ESTIMATOR:
        raise ValueError(f"kl_type must be one of {tuple(KL_ESTIMATOR)}; got {kl_type!r}")
    estimator, x = KL_ESTIMATOR[kl_type], logprobs - ref_logprobs
    if estimator == "k1":
        return x
    if estimator == "abs":
        return x.abs()
    if estimator == "k2":
        return 0.5 * x.square()
    diff = torch.clamp(-x, -_K3_INPUT_LIMIT, _K3_INPUT_LIMIT)
    return torch.clamp(torch.expm1(diff) - diff, -_K3_OUTPUT_LIMIT, _K3_OUTPUT_LIMIT)
