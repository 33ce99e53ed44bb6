"""Divergence from a teacher of whom only K log-probs per token are known, ``[.., K]`` to ``[..]``; plain autograd."""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from xloss.errors import OptionError
from xloss.policy.divergence import FLOOR, Divergence, divergence, kl

TopKMode = Literal["full", "renormalized", "tail"]
FULL_KINDS = ("forward_kl", "reverse_kl", "mixed", "cross_entropy")


def topk_divergence(
    logprobs: Tensor,
    teacher_logprobs: Tensor,
    of: Divergence,
    mode: TopKMode,
    *,
    present: Tensor | None = None,
    entropy: Tensor | None = None,
    outside_logprob: float | None = None,
    log_prob_min: float | None = None,
) -> Tensor:
    """Divergence of the student p from the teacher q with K log-probs of each, taken over the same ids.

    - ``renormalized``: of both, softmaxed over the K (NeMo RL's default); only differences of log-probs matter.
    - ``tail``: over K + 1 classes, the last holding ``1 - sum_k`` of each (TRL ``add_tail``).
    - ``full``: sums over the K alone, with log-probs of the full vocabulary. With ``outside_logprob`` c, the teacher
      has log-prob c everywhere else (NeMo RL ``zero_outside_topk``, c = -100): R gains
      ``sum_rest p log p - c sum_rest p``, found from ``entropy [..]``. F's sum over the rest, ``exp(c)``, is left out.

    Args:
        present: mask ``[.., K]`` of entries that exist; ``None``: all.
        log_prob_min: the log-probs of both are raised to it first, with gradient 0 there (verl); ``full`` only.

    Raises ``OptionError`` for another mode and for what a mode cannot honour.
    """
    check_topk(of, mode, log_prob_min)
    lp, lq = logprobs, teacher_logprobs
    if log_prob_min is not None:
        lp, lq = lp.clamp(min=log_prob_min), lq.clamp(min=log_prob_min)
    lq = lq.clamp(min=FLOOR)
    if present is not None:
        lp, lq = (x.masked_fill(~present, FLOOR) for x in (lp, lq))
    if mode == "renormalized":
        return divergence(lp, lq, of)
    if mode == "tail":
        return divergence(with_tail(lp), with_tail(lq), of)
    if of.kind == "cross_entropy":
        return -(lq.exp() * lp).sum(-1)
    forward_share = {"forward_kl": 1.0, "reverse_kl": 0.0}.get(of.kind, of.share)
    total = torch.zeros_like(lp[..., 0])
    if forward_share > 0:
        total = total + forward_share * kl(lq, lp)
    if forward_share < 1:
        reverse = kl(lp, lq)
        if outside_logprob is not None:
            assert entropy is not None
            p = lp.exp()
            reverse = reverse - entropy - (p * lp).sum(-1) - outside_logprob * (1 - p.sum(-1))
        total = total + (1 - forward_share) * reverse
    return total


def check_topk(of: Divergence, mode: str, log_prob_min: float | None) -> None:
    """Raise ``OptionError`` for combinations that ``topk_divergence`` cannot honour."""
    if mode not in get_args(TopKMode):
        raise OptionError(f"topk_mode must be one of {get_args(TopKMode)}; got {mode!r}")
    if of.kind == "cosine":
        raise OptionError("divergence='cosine' compares logits of the whole vocabulary; it has no top-k form")
    if mode == "full" and of.kind not in FULL_KINDS:
        raise OptionError(
            f"divergence={of.kind!r} needs two whole distributions; with topk_mode='full' use one of {FULL_KINDS}, "
            "or topk_mode='renormalized' or 'tail'"
        )
    if log_prob_min is not None and mode != "full":
        raise OptionError(f"log_prob_min_clamp needs topk_mode='full'; got {mode!r}")


def with_tail(logprobs: Tensor) -> Tensor:
    """``[.., K]`` and, as entry K, ``log(1 - sum_k exp)`` of the probability left."""
    known = torch.logsumexp(logprobs, -1, keepdim=True).clamp(max=-torch.finfo(logprobs.dtype).eps)
    return torch.cat([logprobs, log1mexp(known)], -1)


def log1mexp(x: Tensor) -> Tensor:
    """``log(1 - exp(x))`` for x < 0, to the last bits at both ends (M. Maechler, *Accurately computing log(1 - e^-a)*).

    The unused branch is kept from a NaN gradient.
    """
    near = x > -math.log(2.0)
    small, large = torch.where(near, x, -0.5), torch.where(near, -1.0, x)
    return torch.where(near, torch.log(-torch.expm1(small)), torch.log1p(-torch.exp(large)))
