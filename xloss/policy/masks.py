"""Which tokens the policy term is taken over: masks from the mismatch of a sequence and from entropy. ``[T]`` bool."""

from __future__ import annotations

import torch
from torch import Tensor

from xloss.packing import Segments


def off_policy_sequence_mask(
    logprobs: Tensor, sampled_logprobs: Tensor, advantages: Tensor, sequences: Segments, *, delta: float
) -> Tensor:
    """True at tokens to keep: ``A >= 0``, or ``mean_i (sampled - logprobs) <= delta`` over their sequence.

    Source: off-policy sequence masking of DeepSeek-V3.2, arXiv 2512.02556.
    """
    drift = sequences.mean((sampled_logprobs - logprobs).detach())
    return (advantages >= 0) | sequences.spread(drift <= delta)


def top_entropy_mask(entropy: Tensor, valid: Tensor, *, quantile: float) -> Tensor:
    """True at the ``quantile`` of valid tokens of highest entropy, ties included; the threshold is interpolated.

    Source: arXiv 2506.01939 (the paper keeps 0.2), TRL ``top_entropy_quantile``.
    """
    if valid.numel() == 0:
        return valid
    known = entropy.detach().masked_fill(~valid, torch.nan)
    return valid & (known >= torch.nanquantile(known, 1.0 - quantile))
