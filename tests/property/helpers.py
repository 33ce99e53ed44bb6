"""Running xloss and the oracle on one drawn head, for the tests of this folder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from tests import budgets
from tests.oracle import head as oracle
from tests.strategies import HeadCase
from xloss import TokenStats, linear_logprobs

ALL_STATISTICS = {f"return_{name}": True for name in ("entropy", "mean_logit", "sum_p2", "top1")}
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def leaf(x: Tensor | None, requires_grad: bool = True) -> Tensor | None:
    """The same memory layout, as a leaf."""
    return None if x is None else x.detach().requires_grad_(requires_grad)


def call(case: HeadCase, hidden: Tensor, weight: Tensor, bias: Tensor | None, **options: Any) -> TokenStats:
    head = case.head
    return linear_logprobs(
        hidden,
        weight,
        case.labels,
        bias,
        **{
            "temperature": head.temperature,
            "softcap": head.softcap,
            "logit_scale": head.logit_scale,
            "ignore_index": head.ignore_index,
            "chunk_size": case.chunk_size,
        }
        | options,
    )


def upstream_for(case: HeadCase) -> dict[str, Tensor]:
    """A random number per token and statistic, ignored tokens too: nothing uniform for a scaling bug to hide behind.

    None, half or most of the tokens get 0 for all statistics: clipped tokens, which a backward may leave out.
    """
    g = case.generator()
    share = (0.0, 0.5, 0.9)[int(torch.randint(0, 3, (), generator=g))]
    used = (torch.rand(case.leading, generator=g) >= share).double()
    shapes = dict.fromkeys(oracle.STATISTICS, tuple(case.leading)) | {"logprobs": tuple(case.labels.shape)}
    drawn = {name: torch.randn(shape, generator=g, dtype=torch.float64) for name, shape in shapes.items()}
    return {name: x * (used if x.shape == used.shape else used[..., None]) for name, x in drawn.items()}


def weigh(stats: Any, upstream: dict[str, Tensor]) -> Tensor:
    """sum over statistics and tokens of upstream * statistic, absent statistics left out."""
    present = {name: getattr(stats, name) for name in upstream if getattr(stats, name) is not None}
    return sum((upstream[n].to(v.dtype) * v).sum() for n, v in present.items())


@dataclass
class Gold:
    """What the oracle says, and the sizes that rounding errors are measured against."""

    stats: oracle.Stats
    grads: list[Tensor | None]
    max_logit: float
    scales: tuple[float, float, float]  # of the gradients of hidden, weight and bias


def gold_for(case: HeadCase, upstream: dict[str, Tensor]) -> Gold:
    leaves = oracle.leaves(case.hidden, case.weight, case.bias)
    stats = oracle.token_stats(leaves[0], leaves[1], case.labels, leaves[2], case.head)
    grads = oracle.grads(weigh(stats, upstream), leaves)
    live = case.labels != case.head.ignore_index
    rows = case.hidden.double()[live if live.shape == case.leading else live.any(-1)]
    raw = rows @ case.weight.double().t() + (0 if case.bias is None else case.bias.double())
    temperature = torch.as_tensor(case.head.temperature)
    coldest = float(temperature.min()) if temperature.numel() else 1.0
    slope = case.head.logit_scale / coldest
    adjoint = sum(budgets.norm(u) for u in upstream.values()) * slope
    return Gold(
        stats,
        grads,
        max_logit=float(raw.abs().max()) * slope if rows.numel() else 0.0,
        scales=(adjoint * budgets.norm(case.weight), adjoint * budgets.norm(rows), adjoint),
    )


def assert_stats(got: TokenStats, gold: Gold) -> None:
    """Every statistic is the oracle's, to rounding; what was not asked for is None."""
    for name in oracle.STATISTICS:
        ours, theirs = getattr(got, name), getattr(gold.stats, name)
        if ours is not None:
            scale = theirs.numel() ** 0.5
            budgets.assert_rounding(name, ours, theirs, gold.max_logit, scale)
            assert bool((ours[theirs.detach() == 0] == 0).all()) or name in ("logprobs", "entropy", "lse", "mean_logit")


def assert_grads(got: Grads | list[Tensor | None], gold: Gold) -> None:
    for name, ours, theirs, scale in zip(("hidden", "weight", "bias"), got, gold.grads, gold.scales, strict=True):
        if ours is not None:
            assert theirs is not None
            budgets.assert_rounding(f"d {name}", ours, theirs, gold.max_logit, scale)
