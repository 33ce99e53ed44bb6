"""Divergence of a student from a teacher over one vocabulary, from the definitions, with probabilities in plain sight.

    p = softmax(z_S / tau)      q = softmax(z_T / tau_T)        KL(a, b) = sum_v a_v log(a_v / b_v)

    forward_kl KL(q, p)         reverse_kl KL(p, q)             jsd x KL(q, m) + (1 - x) KL(p, m), m = (1 - x) p + x q
    mixed x KL(q, p) + (1 - x) KL(p, q)                         skewed_forward_kl KL(q, x q + (1 - x) p)
    skewed_reverse_kl KL(p, x p + (1 - x) q)                    tvd sum |p - q| / 2
    nla -log alpha, alpha = sum min(p, q)                       lk_hybrid k KL(q, p) + (1 - k) tvd, k = exp(-3 alpha)
    cross_entropy -sum q log p                                  cosine 1 - z_S . z_T / (|z_S| |z_T|)

Top k of the teacher at ids I: `renormalized` divides both by their sums over I; `tail` adds a class with the rest of
each; `full` sums over I only, and with an outside log-prob c lets the teacher be exp(c) everywhere else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from tests.oracle.head import Head, logits

MIX = {"jsd": 0.5, "mixed": 0.5, "skewed_forward_kl": 0.1, "skewed_reverse_kl": 0.1}
KINDS = ("forward_kl", "reverse_kl", "jsd", "mixed", "skewed_forward_kl", "skewed_reverse_kl",
         "tvd", "nla", "lk_hybrid", "cross_entropy", "cosine")  # fmt: skip


def kl(a: Tensor, b: Tensor) -> Tensor:
    return (a * torch.log(a / b)).sum(-1)


def of_probs(p: Tensor, q: Tensor, kind: str, x: float) -> Tensor:
    if kind == "forward_kl":
        return kl(q, p)
    if kind == "reverse_kl":
        return kl(p, q)
    if kind == "jsd":
        m = (1 - x) * p + x * q
        return x * kl(q, m) + (1 - x) * kl(p, m)
    if kind == "mixed":
        return x * kl(q, p) + (1 - x) * kl(p, q)
    if kind == "skewed_forward_kl":
        return kl(q, x * q + (1 - x) * p)
    if kind == "skewed_reverse_kl":
        return kl(p, x * p + (1 - x) * q)
    if kind == "cross_entropy":
        return -(q * torch.log(p)).sum(-1)
    alpha = torch.minimum(p, q).sum(-1)
    if kind == "nla":
        return -torch.log(alpha)
    tvd = (p - q).abs().sum(-1) / 2
    if kind == "tvd":
        return tvd
    assert kind == "lk_hybrid"
    k = torch.exp(-3 * alpha.detach())
    return k * kl(q, p) + (1 - k) * tvd


def of_logits(z: Tensor, z_teacher: Tensor, kind: str, x: float | None = None) -> Tensor:
    """[N] from logits at temperature [N, V]."""
    x = MIX.get(kind, 0.0) if x is None else x
    if kind == "cosine":
        return 1 - (z * z_teacher).sum(-1) / (z.norm(dim=-1) * z_teacher.norm(dim=-1))
    return of_probs(torch.softmax(z, -1), torch.softmax(z_teacher, -1), kind, x)


def of_topk(z: Tensor, ids: Tensor, teacher_logprobs: Tensor, kind: str, mode: str, x: float | None = None,
            outside: float | None = None) -> Tensor:  # fmt: skip
    """[N] from the student's logits [N, V], token by token; ids [N, K] hold -100 where there is none."""
    x = MIX.get(kind, 0.0) if x is None else x
    values = []
    for row, i, lq in zip(z, ids, teacher_logprobs.double(), strict=True):
        known = i != -100
        everywhere = torch.softmax(row, -1)
        p, q = everywhere[i[known]], torch.exp(lq[known])
        if mode == "renormalized":
            value = of_probs(p / p.sum(), q / q.sum(), kind, x)
        elif mode == "tail":
            value = of_probs(torch.cat([p, 1 - p.sum()[None]]), torch.cat([q, 1 - q.sum()[None]]), kind, x)
        elif kind in ("forward_kl", "cross_entropy"):
            value = of_probs(p, q, kind, x)
        else:
            reverse = kl(p, q)
            if outside is not None:
                spread = torch.full_like(everywhere, outside).index_put((i[known],), lq[known])
                reverse = (everywhere * (torch.log(everywhere) - spread)).sum()
            share = 0.0 if kind == "reverse_kl" else x
            value = share * kl(q, p) + (1 - share) * reverse
        values.append(value)
    return torch.stack(values) if values else z.new_zeros(0)


def student_logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: Head, live: Tensor) -> Tensor:
    """z [N, V] of the live tokens, at temperature 1."""
    return logits(hidden.reshape(-1, hidden.shape[-1])[live], weight, bias, head)
