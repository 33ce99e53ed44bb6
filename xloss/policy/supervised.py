"""Supervised per-token losses, one function a loss. All return losses ``[T]`` to minimise.

``p = exp(logprobs)`` is the probability of the label. Formulas and gradients are in ``docs/losses/cross-entropy.md``.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from xloss.errors import OptionError


def label_smoothed_nll(logprobs: Tensor, lse: Tensor, mean_logit: Tensor, *, label_smoothing: float) -> Tensor:
    """``(1 - eps) nll + eps (lse - mean_logit)``: cross-entropy with a mass of ``eps / V`` on every token of the
    vocabulary, the label included (arXiv 1512.00567; torch, Liger).
    """
    return -(1 - label_smoothing) * logprobs + label_smoothing * (lse - mean_logit)


def megatron_smoothing(label_smoothing: float, vocab_size: int) -> float:
    """The ``eps`` of ``label_smoothed_nll`` that puts a mass of ``label_smoothing / (V - 1)`` on every token but the
    label (Megatron-LM, NeMo): ``label_smoothing V / (V - 1)``. Raises ``OptionError`` where there is no other token.
    """
    if vocab_size < 2:
        raise OptionError(f"label_smoothing_kind='megatron' needs a vocabulary of at least 2 tokens; got {vocab_size}")
    return label_smoothing * vocab_size / (vocab_size - 1)


def z_loss(lse: Tensor, *, coef: float) -> Tensor:
    """``coef lse^2`` (PaLM, arXiv 2204.02311)."""
    return coef * lse.square()


def focal(logprobs: Tensor, *, gamma: float) -> Tensor:
    """``-(1 - p)^gamma logprobs`` (Lin et al., arXiv 1708.02002), with the gradient of both factors."""
    others = (-torch.expm1(logprobs)).clamp(min=torch.finfo(logprobs.dtype).tiny)  # 0^gamma has no finite slope
    return -others.pow(gamma) * logprobs


def dft(logprobs: Tensor) -> Tensor:
    """``-sg(p) logprobs``: dynamic fine-tuning (arXiv 2508.05629; TRL ``dft``, Liger ``use_token_scaling``)."""
    return -logprobs.detach().exp() * logprobs


def chord_phi(logprobs: Tensor, *, cutoff_prob: float = 1.0) -> Tensor:
    """``-sg(p (1 - p)) min(logprobs, log cutoff_prob)``: the supervised term of CHORD (arXiv 2508.11408; ms-swift,
    Trinity-RFT). Tokens above the cutoff have no gradient; 1 cuts nothing.
    """
    fixed = logprobs.detach()
    phi = fixed.exp() * -torch.expm1(fixed)
    kept = logprobs if cutoff_prob == 1.0 else logprobs.clamp(max=math.log(cutoff_prob))
    return -phi * kept


def soft_cross_entropy(logprobs: Tensor, target_weights: Tensor) -> Tensor:
    """``-sum_k w_k logprobs_k`` of ``[T, K]`` targets, ``[T]`` (Tinker ``cross_entropy`` with K targets).

    A target of weight 0 adds nothing, be its log-prob ``-inf``.
    """
    return -(target_weights * logprobs.masked_fill(target_weights == 0, 0)).sum(-1)
