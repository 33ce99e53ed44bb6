"""Preference losses, pair by pair and sequence by sequence, from the papers. Float64; no formula is made stable here.

S = sum over tokens of log p (divided by the number of tokens where the loss averages), R the same of the reference,
u = S - R, s(x) = 1 / (1 + e^-x), x = b (u_w - u_l)
sigmoid, sigmoid_norm  -(1 - e) log s(x) - e log s(-x)             robust  (-(1 - e) log s(x) + e log s(-x)) / (1 - 2 e)
hinge  max(0, 1 - x)      ipo  (u_w - u_l - 1 / 2b)^2              exo_pair  sum_k q_k log(q_k / t_k), q = (s(x), s(-x)), t = (1 - e, e)
nca_pair  -log s(b u_w) - (log s(-b u_w) + log s(-b u_l)) / 2      bco_pair  -log s(b u_w - d) - log s(d - b u_l)
sppo_hard  (u_w - 1 / 2b)^2 + (u_l + 1 / 2b)^2                     discopop  (1 - g) (-log s(x)) + g e^-x, g = s(x / tau)
apo_zero  s(-b u_w) + s(b u_l)     apo_down  s(b u_w) + s(-x)      aot  the k-th smallest S_w - S_l against the k-th smallest R_w - R_l
cpo  sigmoid on b (S_w - S_l)      simpo  on b (S_w - S_l) - gamma alphapo  with (1 - p^-a) / a for S, p = e^S
orpo  -b log s(o_w - o_l), o = log(p / (1 - p))                    kto  s(-b (u - kl)) if desirable else s(b (u - kl))
f-divergence: f(u) for u, f = -e^-u | log s(u) | e^((a - 1) u) / (a - 1);  LD: tokens beyond the shorter length count a
WPO: each pair times exp(sum over both of the mean of log p - log sum p^2), constant
"""  # noqa: E501

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from tests.oracle.head import token_stats

AVERAGED = ("sigmoid_norm", "ipo", "simpo", "alphapo", "orpo")
UNPAIRED = ("kto", "apo_zero_unpaired", "bco")
REFERENCE_FREE = ("sft", "cpo", "simpo", "alphapo", "orpo")
NLL = {"sft": 1.0, "cpo": 1.0, "orpo": 1.0, "simpo": 0.0, "alphapo": 0.0}


@dataclass
class Sequence:
    """Tokens of one sequence that count: hidden [n, H], labels [n], reference [n]; which pair; chosen or not."""

    hidden: Tensor
    labels: Tensor
    ref: Tensor
    pair: int
    chosen: bool


@dataclass
class Objective:
    terms: list[dict[str, Any]]
    beta: float | None = None
    label_smoothing: float | None = None
    average: bool | None = None
    reference_free: bool = False
    f_divergence: str = "reverse_kl"
    f_alpha: float = 0.5
    ld_alpha: float | None = None
    use_weighting: bool = False
    max_weighting: float | None = None
    nll_reduction: str = "token"
    count_empty: bool = False
    kl: float = 0.0
    shift: float = 0.0


@dataclass
class Read:
    """What a loss reads of one sequence."""

    s: Tensor
    r: Tensor
    n: int
    nll: Tensor
    aligned: Tensor


@dataclass
class Result:
    loss: Tensor
    rewards: dict[str, list[float]] = field(default_factory=lambda: {"chosen": [], "rejected": []})


def sig(x: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-x))


def log_sig(x: Tensor) -> Tensor:
    return -torch.log(1 + torch.exp(-x)) if x > -30 else x - torch.log(1 + torch.exp(x))  # one thing; exp overflows


def score(u: Tensor, o: Objective) -> Tensor:
    if o.f_divergence == "forward_kl":
        return -torch.exp(-u)
    if o.f_divergence == "js":
        return log_sig(u)
    if o.f_divergence == "alpha" and o.f_alpha != 1:
        return torch.exp((o.f_alpha - 1) * u) / (o.f_alpha - 1)
    return u


def read(x: Sequence, weight: Tensor, shared: int, o: Objective, free: bool) -> Read:
    stats = token_stats(x.hidden, weight, x.labels)
    zero = torch.zeros((), dtype=torch.float64)
    s, r, nll, aligned = zero, zero, zero, zero
    for t in range(x.labels.numel()):
        share = 1.0 if t < shared or o.ld_alpha is None else o.ld_alpha
        s = s + share * stats.logprobs[t]
        r = r + (0.0 if free else share * float(x.ref[t]))
        nll = nll - stats.logprobs[t]
        aligned = aligned + (stats.logprobs[t] - torch.log(stats.sum_p2[t])).detach() / x.labels.numel()
    return Read(s, r, x.labels.numel(), nll, aligned)


def options(term: dict[str, Any], o: Objective) -> tuple[float, float, bool]:
    """beta, label smoothing and whether to average: the term's own, else the objective's, else the default."""

    def first(*found: Any) -> Any:
        return next(x for x in found if x is not None)

    name = term["loss_type"]
    beta = first(term.get("beta"), o.beta, 2.0 if name in ("simpo", "alphapo") else 0.1)
    eps = first(term.get("label_smoothing"), o.label_smoothing, 1e-3 if name == "exo_pair" else 0.0)
    return beta, eps, first(term.get("average_log_prob"), o.average, name in AVERAGED)


def logistic(x: Tensor, e: float) -> Tensor:
    return -(1 - e) * log_sig(x) - e * log_sig(-x)


def bend(s: Tensor, a: float) -> Tensor:
    return (1 - torch.exp(s) ** (-a)) / a if a else s


def odds(s: Tensor) -> Tensor:
    return s - torch.log(1 - torch.exp(s))


def pair(term: dict[str, Any], w: Read, lo: Read, o: Objective) -> Tensor:
    name = term["loss_type"]
    b, e, average = options(term, o)
    nw, nl = (max(w.n, 1), max(lo.n, 1)) if average else (1, 1)
    sw, sl = w.s / nw, lo.s / nl
    uw, ul = (w.s - w.r) / nw, (lo.s - lo.r) / nl
    fw, fl = score(w.s - w.r, o) / nw, score(lo.s - lo.r, o) / nl
    x = b * (fw - fl)
    if name in ("sigmoid", "sigmoid_norm"):
        return logistic(x, e)
    if name == "robust":
        return (-(1 - e) * log_sig(x) + e * log_sig(-x)) / (1 - 2 * e)
    if name == "hinge":
        return 1 - x if x < 1 else x * 0
    if name == "ipo":
        return (fw - fl - 1 / (2 * b)) ** 2
    if name == "exo_pair":
        return sig(x) * (log_sig(x) - math.log(1 - e)) + sig(-x) * (log_sig(-x) - math.log(e))
    if name == "nca_pair":
        return -log_sig(b * fw) - (log_sig(-b * fw) + log_sig(-b * fl)) / 2
    if name == "bco_pair":
        return -log_sig(b * fw - o.shift) - log_sig(o.shift - b * fl)
    if name == "sppo_hard":
        return (fw - 1 / (2 * b)) ** 2 + (fl + 1 / (2 * b)) ** 2
    if name == "apo_zero":
        return sig(-b * uw) + sig(b * ul)
    if name == "apo_down":
        return sig(b * uw) + sig(-x)
    if name == "discopop":
        g = sig(x / term.get("tau", 0.05))
        return (1 - g) * -log_sig(x) + g * torch.exp(-x)
    if name == "sft":
        return x * 0
    if name == "cpo":
        return logistic(b * (sw - sl), e)
    if name in ("simpo", "alphapo"):
        a = term.get("alpha", 0.25) if name == "alphapo" else 0.0
        return logistic(b * (bend(sw, a) - bend(sl, a)) - term.get("gamma", 0.5), e)
    assert name == "orpo"
    return -b * log_sig(odds(sw) - odds(sl))


def sorted_pairs(term: dict[str, Any], ws: list[Read], ls: list[Read], o: Objective) -> list[Tensor]:
    """aot and aot_unpaired, whose k-th loss compares k-th smallest."""
    b, e, average = options(term, o)
    both = [[x.s / (max(x.n, 1) if average else 1) for x in side] for side in (ws, ls)]
    refs = [[x.r / (max(x.n, 1) if average else 1) for x in side] for side in (ws, ls)]
    if term["loss_type"] == "aot":
        first = [w - lo for w, lo in zip(*both, strict=True)]
        second = [w - lo for w, lo in zip(*refs, strict=True)]
    else:
        first, second = ([s - r for s, r in zip(s, r, strict=True)] for s, r in zip(both, refs, strict=True))
    first, second = (sorted(side, key=lambda x: float(x.detach())) for side in (first, second))
    return [logistic(b * (x - y), e) for x, y in zip(first, second, strict=True)]


def single(term: dict[str, Any], x: Read, chosen: bool, o: Objective) -> Tensor:
    name = term["loss_type"]
    b, _, average = options(term, o)
    u = (x.s - x.r) / (max(x.n, 1) if average else 1)
    share = term.get("desirable_weight" if chosen else "undesirable_weight", 1.0)
    sign = 1 if chosen else -1
    if name == "bco":
        return -share * log_sig(sign * (b * u - o.shift))
    return share * sig(-sign * b * (u - (max(o.kl, 0.0) if name == "kto" else 0.0)))


def step(batches: list[list[Sequence]], weight: Tensor, o: Objective) -> Result:
    """The loss of one global batch, cut into micro-batches."""
    paired = o.terms[0]["loss_type"] not in UNPAIRED
    free = o.reference_free or all(t["loss_type"] in REFERENCE_FREE for t in o.terms)
    beta, _, average = options(o.terms[0], o)
    result = Result(torch.zeros((), dtype=torch.float64))
    losses: list[Tensor] = []
    nlls: list[Read] = []
    for batch in batches:
        reads: list[tuple[Read, Read]] = []
        if paired:
            by_pair: dict[int, dict[bool, Sequence]] = {}
            for x in batch:
                if x.pair >= 0:
                    by_pair.setdefault(x.pair, {})[x.chosen] = x
            for two in by_pair.values():
                lengths = [two[True].labels.numel(), two[False].labels.numel()]
                if min(lengths) or o.count_empty:
                    reads.append(tuple(read(two[c], weight, min(lengths), o, free) for c in (True, False)))  # type: ignore[arg-type]
            of_terms = [
                sorted_pairs(t, [w for w, _ in reads], [lo for _, lo in reads], o)
                if t["loss_type"].startswith("aot")
                else [pair(t, w, lo, o) for w, lo in reads]
                for t in o.terms
            ]
            for i, (w, lo) in enumerate(reads):
                wpo = (
                    min(float(torch.exp(w.aligned + lo.aligned)), o.max_weighting or math.inf)
                    if o.use_weighting
                    else 1.0
                )
                losses.append(sum(t.get("weight", 1.0) * wpo * x[i] for t, x in zip(o.terms, of_terms, strict=True)))  # type: ignore[arg-type]
                nlls.append(w)
                for name, x in (("chosen", w), ("rejected", lo)):
                    result.rewards[name].append(beta * float((x.s - x.r).detach()) / (max(x.n, 1) if average else 1))
            continue
        for x in batch:
            if x.labels.numel() or o.count_empty:
                found = read(x, weight, x.labels.numel(), o, free)
                losses.append(sum(t.get("weight", 1.0) * single(t, found, x.chosen, o) for t in o.terms))  # type: ignore[arg-type]
                result.rewards["chosen" if x.chosen else "rejected"].append(
                    beta * float((found.s - found.r).detach()) / (max(found.n, 1) if average else 1)
                )
    for x in losses:
        result.loss = result.loss + x / len(losses)
    factor = sum(t.get("weight", 1.0) * t.get("nll_coef", NLL.get(t["loss_type"], 0.0)) for t in o.terms)
    tokens = sum(x.n for x in nlls)
    for x in nlls:
        share = {"token": 1 / max(tokens, 1), "sample": 1 / (max(x.n, 1) * len(nlls)), "sample_sum": 1 / len(nlls)}
        result.loss = result.loss + factor * share[o.nll_reduction] * x.nll
    return result
