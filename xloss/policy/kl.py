"""KL penalties against a reference policy from the sampled token's log-probs, ``[T]`` to ``[T]``.

Estimators after J. Schulman, *Approximating KL divergence* (2020); names of the field as aliases.
"""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

KLType = Literal["kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3"]
KL_TYPES: tuple[str, ...] = get_args(KLType)
_K3_INPUT_LIMIT, _K3_OUTPUT_LIMIT = 20.0, 10.0  # XTuner and verl; the gradient is 0 beyond either limit


def kl_penalty(logprobs: Tensor, ref_logprobs: Tensor, kl_type: KLType) -> Tensor:
    """Per-token penalty with ``x = logprobs - ref_logprobs``.

    ``kl``, ``k1``: ``x``; ``abs``: ``|x|``; ``mse``, ``k2``: ``x^2 / 2``; ``low_var_kl``, ``k3``:
    ``exp(-x) + x - 1`` with ``-x`` clamped to +-20 and the value to +-10. Raises ``ValueError`` for another name.
    """
    if kl_type in ("kl", "k1"):
        return logprobs - ref_logprobs
    if kl_type == "abs":
        return (logprobs - ref_logprobs).abs()
    if kl_type in ("mse", "k2"):
        return 0.5 * (logprobs - ref_logprobs).square()
    if kl_type in ("low_var_kl", "k3"):
        diff = torch.clamp(ref_logprobs - logprobs, -_K3_INPUT_LIMIT, _K3_INPUT_LIMIT)
        return torch.clamp(torch.expm1(diff) - diff, -_K3_OUTPUT_LIMIT, _K3_OUTPUT_LIMIT)
    raise ValueError(f"kl_type must be one of {KL_TYPES}; got {kl_type!r}")
