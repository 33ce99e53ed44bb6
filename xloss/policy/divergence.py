"""Divergence of a student's distribution p from a constant teacher's q, over the last axis of their logits.

Values and their derivatives, one formula each. Sources: forward and reverse KL; generalised JSD(beta) of GKD (arXiv
2306.13649); skewed KL of DistiLLM (arXiv 2402.03898); total variation, ``-log alpha`` and the LK hybrid of draft-model
training (arXiv 2602.23881), with ``alpha = sum_v min(p_v, q_v) = 1 - TVD`` the acceptance rate.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from xloss.errors import OptionError

DivergenceKind = Literal[
    "forward_kl",
    "reverse_kl",
    "jsd",
    "mixed",
    "skewed_forward_kl",
    "skewed_reverse_kl",
    "tvd",
    "nla",
    "lk_hybrid",
    "cross_entropy",
    "cosine",
]
DEFAULT_MIX: dict[str, float] = {"jsd": 0.5, "mixed": 0.5, "skewed_forward_kl": 0.1, "skewed_reverse_kl": 0.1}
_LK_RATE = 3.0
FLOOR = -1e30
"""Stands for a log-prob or logit of -inf: its probability is exactly 0, and 0 times it is 0 instead of NaN."""


@dataclass(frozen=True)
class Divergence:
    """Which divergence of the student p from the teacher q; F is KL(q, p), R is KL(p, q), with x = ``mix``:

    - ``forward_kl``: ``F = sum q (log q - log p)``
    - ``reverse_kl``: ``R = sum p (log p - log q)``
    - ``jsd``: ``x KL(q, m) + (1 - x) KL(p, m)``, ``m = (1 - x) p + x q``; by convention F at x = 0 and R at x = 1
    - ``mixed``: ``x F + (1 - x) R``
    - ``skewed_forward_kl``: ``KL(q, x q + (1 - x) p)``
    - ``skewed_reverse_kl``: ``KL(p, (1 - x) q + x p)``
    - ``tvd``: ``sum |p - q| / 2``
    - ``nla``: ``-log alpha``
    - ``lk_hybrid``: ``k F + (1 - k) TVD``, ``k = exp(-3 alpha)`` held constant
    - ``cross_entropy``: ``-sum q log p``, F without the teacher's entropy
    - ``cosine``: ``1 - cos(z_p, z_q)`` of the logits themselves

    Raises ``OptionError`` for another kind, for ``mix`` outside [0, 1] (skewed: [0, 1)), and for a kind that has none.
    """

    kind: DivergenceKind = "forward_kl"
    mix: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(DivergenceKind):
            raise OptionError(f"divergence must be one of {get_args(DivergenceKind)}; got {self.kind!r}")
        if self.mix is not None and self.kind not in DEFAULT_MIX:
            raise OptionError(f"mix={self.mix} belongs to {tuple(DEFAULT_MIX)}; divergence={self.kind!r} has none")
        if self.mix is not None and not 0 <= self.mix <= 1:
            raise OptionError(f"mix must be in [0, 1]; got {self.mix}")
        if self.mix == 1 and self.kind.startswith("skewed"):
            raise OptionError(f"mix must be below 1 for divergence={self.kind!r}, which is 0 at 1 whatever p and q are")

    @property
    def share(self) -> float:
        """``mix``, or the default of its kind."""
        return DEFAULT_MIX.get(self.kind, 0.0) if self.mix is None else self.mix

    @property
    def needs_acceptance(self) -> bool:
        """Whether ``log alpha`` is one of its sums, the last."""
        return self.kind in ("nla", "lk_hybrid")


def divergence(student_logits: Tensor, teacher_logits: Tensor, of: Divergence) -> Tensor:
    """Value ``[..]`` from logits ``[.., V]``; differentiable in the student's. Entries of -inf must be ``FLOOR``."""
    if of.kind == "cosine":
        return divergence_value(divergence_sums(student_logits, teacher_logits, of), of)
    return divergence_value(
        divergence_sums(torch.log_softmax(student_logits, -1), torch.log_softmax(teacher_logits, -1), of), of
    )


def divergence_grad(student_logits: Tensor, teacher_logits: Tensor, of: Divergence) -> Tensor:
    """Derivative of ``divergence`` with respect to the student's logits, ``[.., V]``, without autograd.

    With ``s = p * dD/dp`` it is ``s - p sum(s)``: whatever is constant over the vocabulary in ``dD/dp`` drops out.
    """
    if of.kind == "cosine":
        return cosine_grad(student_logits, teacher_logits, divergence_sums(student_logits, teacher_logits, of))
    log_p, log_q = torch.log_softmax(student_logits, -1), torch.log_softmax(teacher_logits, -1)
    slope = divergence_slope(log_p, log_q, of, log_acceptance(log_p, log_q) if of.needs_acceptance else None)
    return slope.sub_(log_p.exp_().mul_(slope.sum(-1, keepdim=True)))


def divergence_sums(log_p: Tensor, log_q: Tensor, of: Divergence) -> Tensor:
    """What the value is made of, ``[.., m]``: such that those of parts of the vocabulary can be added (``add_sums``).

    Of log-probs, which are normalised over all of it: sums, and last ``log_acceptance``, where it is needed. Of logits
    for ``cosine``: the cosine and both norms.
    """
    kind, x = _limit(of)
    if kind == "cosine":
        norms = [torch.linalg.vector_norm(x, dim=-1) for x in (log_p, log_q)]
        return torch.stack([torch.cosine_similarity(log_p, log_q, dim=-1), *norms], -1)
    if kind == "nla":
        return log_acceptance(log_p, log_q).unsqueeze(-1)
    if kind == "lk_hybrid":
        tvd = divergence_sums(log_p, log_q, Divergence("tvd")).squeeze(-1)
        return torch.stack([kl(log_q, log_p), tvd, log_acceptance(log_p, log_q)], -1)
    if kind == "forward_kl":
        found = kl(log_q, log_p)
    elif kind == "reverse_kl":
        found = kl(log_p, log_q)
    elif kind == "jsd":
        log_m = _log_mix(log_p, log_q, x)
        found = x * kl(log_q, log_m) + (1 - x) * kl(log_p, log_m)
    elif kind == "mixed":
        found = x * kl(log_q, log_p) + (1 - x) * kl(log_p, log_q)
    elif kind == "skewed_forward_kl":
        found = kl(log_q, _log_mix(log_p, log_q, x))
    elif kind == "skewed_reverse_kl":
        found = kl(log_p, _log_mix(log_p, log_q, 1 - x))
    elif kind == "tvd":
        found = 0.5 * (log_p.exp() - log_q.exp()).abs().sum(-1)
    else:
        found = -(log_q.exp() * log_p).sum(-1)
    return found.unsqueeze(-1)


def add_sums(parts: Tensor, of: Divergence) -> Tensor:
    """``divergence_sums`` of the whole vocabulary from those of its parts, ``[n, .., m]``."""
    if of.kind == "cosine":
        cosines, *norms = parts.unbind(-1)
        whole = [torch.linalg.vector_norm(n, dim=0) for n in norms]
        shares = [n / w for n, w in zip(norms, whole, strict=True)]
        return torch.stack([(cosines * shares[0] * shares[1]).sum(0), *whole], -1)
    total = parts.sum(0)
    if of.needs_acceptance:
        total[..., -1] = torch.logsumexp(parts[..., -1], 0)
    return total


def divergence_value(sums: Tensor, of: Divergence) -> Tensor:
    """The divergence ``[..]`` from ``divergence_sums``."""
    if of.kind == "cosine":
        return 1 - sums[..., 0]
    if of.kind == "nla":
        return -sums[..., 0]
    if of.kind == "lk_hybrid":
        forward, tvd, acceptance = sums.unbind(-1)
        k = _lk_weight(acceptance)
        return k * forward + (1 - k) * tvd
    return sums[..., 0]


def cosine_grad(student_logits: Tensor, teacher_logits: Tensor, sums: Tensor) -> Tensor:
    """Derivative of ``cosine`` with respect to the student's logits."""
    cosine, norm, norm_other = (x.unsqueeze(-1) for x in sums.unbind(-1))
    return (student_logits / norm * cosine - teacher_logits / norm_other) / norm


def divergence_slope(log_p: Tensor, log_q: Tensor, of: Divergence, acceptance: Tensor | None) -> Tensor:
    """``p * dD/dp``, a new tensor, up to a multiple of p; ``acceptance``: ``log_acceptance`` where it is needed."""
    kind, x = _limit(of)
    if kind in ("forward_kl", "cross_entropy"):
        return log_q.exp().neg_()
    if kind == "reverse_kl":
        return log_p.exp() * (log_p - log_q)
    if kind == "jsd":
        return (1 - x) * log_p.exp() * (log_p - _log_mix(log_p, log_q, x))
    if kind == "mixed":
        return (1 - x) * log_p.exp() * (log_p - log_q) - x * log_q.exp()
    if kind == "skewed_forward_kl":
        return (x - 1) * (log_p + log_q - _log_mix(log_p, log_q, x)).exp_()
    if kind == "skewed_reverse_kl":
        ratio = log_p - _log_mix(log_p, log_q, 1 - x)
        return log_p.exp() * (ratio - x * ratio.exp())
    half_sign = 0.5 * torch.sign(log_p - log_q)
    if kind == "tvd":
        return half_sign * log_p.exp()
    assert acceptance is not None
    if kind == "nla":  # p / alpha where p < q, at most 1 however small alpha is; half of it where they are equal
        share = (log_p - acceptance.unsqueeze(-1)).clamp_(max=0).exp_()
        return share * (half_sign - 0.5)
    k = _lk_weight(acceptance).unsqueeze(-1)
    return (1 - k) * half_sign * log_p.exp() - k * log_q.exp()


def log_acceptance(log_p: Tensor, log_q: Tensor) -> Tensor:
    """``log alpha = log sum_v min(p_v, q_v)``."""
    return torch.logsumexp(torch.minimum(log_p, log_q), -1)


def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
    """``sum a (log a - log b)`` over the last axis."""
    return (log_a.exp() * (log_a - log_b)).sum(-1)


def _limit(of: Divergence) -> tuple[DivergenceKind, float]:
    """JSD is 0 at both ends; the field puts there what JSD, divided by its vanishing weight, tends to."""
    x = of.share
    if of.kind == "jsd" and x in (0.0, 1.0):
        return ("forward_kl" if x == 0 else "reverse_kl"), x
    return of.kind, x


def _log_mix(log_p: Tensor, log_q: Tensor, share_q: float) -> Tensor:
    """``log((1 - share_q) p + share_q q)``."""
    if share_q in (0.0, 1.0):
        return log_q if share_q else log_p
    return torch.logaddexp(log_p + math.log1p(-share_q), log_q + math.log(share_q))


def _lk_weight(acceptance: Tensor) -> Tensor:
    return torch.exp(-_LK_RATE * acceptance.detach().exp())
