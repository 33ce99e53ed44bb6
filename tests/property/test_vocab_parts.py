"""Statistics of parts of a vocabulary, merged, against the oracle on all of it.

Contract: however the rows of a head are dealt to ranks, in whatever order, with ranks that hold none, the merged
statistics are the oracle's; the lowest of equal largest logits is `top1`, whoever holds it; logits of 1e4, and a part
whose every token is banned, change nothing; where a label is on no rank its log-prob is -inf. Ranks are rows of a stack
here (over processes: tests/distributed).
"""

from __future__ import annotations

from typing import cast

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import budgets
from tests.oracle import head as oracle
from xloss.distributed.vocab import IGNORED, VocabPart
from xloss.head import chunk
from xloss.head.backend import RawRows
from xloss.head.options import HeadOptions
from xloss.head.partials import empty_stats, merge, pack
from xloss.stats import StatSpec, TokenStats, mask_ignored

V, H, T = 9, 4, 6
SPEC = StatSpec(entropy=True, mean_logit=True, sum_p2=True, top1=True)


def parts_of(bounds: tuple[tuple[int, int], ...]) -> list[VocabPart]:
    return [VocabPart(bounds, rank, cast(dist.ProcessGroup, None)) for rank in range(len(bounds))]


def merged(hidden: Tensor, weight: Tensor, bias: Tensor, labels: Tensor, parts: list[VocabPart]) -> TokenStats:
    """What every rank would merge from what each would send."""
    options, sent = HeadOptions(ignore_index=IGNORED, stats=SPEC), []
    for part in parts:
        local = part.local_labels(labels, -100)
        rows = slice(part.start, part.stop)
        if part.num_rows:
            logits = hidden @ weight[rows].T
            state = chunk.forward(RawRows(logits, local, 1.0, bias[rows], part=part), options, for_backward=False)
            sent.append(pack(state.stats, state.peak, local, part))
        else:
            sent.append(pack(*empty_stats(local, SPEC, hidden.dtype), local, part))
    return mask_ignored(merge(torch.stack(sent), SPEC, labels, parts[0].bounds), labels, -100)


@st.composite
def splits(draw: st.DrawFn) -> tuple[tuple[int, int], ...]:
    edges = sorted(draw(st.lists(st.integers(0, V), max_size=4)))
    return tuple(draw(st.permutations(list(zip([0, *edges], [*edges, V], strict=True)))))


@given(splits(), st.sampled_from([0, 3]), st.sampled_from([1.0, 1e4]), st.integers(0, 99))
def test_any_split(bounds: tuple[tuple[int, int], ...], several: int, scale: float, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    hidden, weight, bias = (torch.randn(*s, generator=g, dtype=torch.float64) for s in ((T, H), (V, H), (V,)))
    # eighths: products are exact in any order of their sums, so that equal logits are equal on every rank
    hidden, weight, bias = ((8 * f * x).round() / 8 for f, x in ((1.0, hidden), (scale, weight), (scale, bias)))
    weight[V - 1], bias[V - 1] = weight[0], bias[0]  # a tie from one end to the other
    labels = torch.randint(0, V, (T, several) if several else (T,), generator=g)
    labels[1] = -100
    want = oracle.token_stats(hidden, weight, labels, bias)
    got = merged(hidden, weight, bias, labels, parts_of(bounds))
    largest = float((hidden @ weight.T + bias).abs().max())
    for name in oracle.STATISTICS:
        budgets.assert_rounding(name, getattr(got, name), getattr(want, name), largest, 1.0)
    assert got.top1 is not None
    assert torch.equal(got.top1, want.top1)


def test_ties() -> None:
    """All logits are equal: the first token of the vocabulary is the largest, and rank 1 holds it."""
    hidden, weight, bias = torch.ones(1, H), torch.ones(V, H), torch.zeros(V)
    got = merged(hidden, weight, bias, torch.tensor([4]), parts_of(((3, 9), (0, 3))))
    assert got.top1 is not None and got.top1.tolist() == [0]


@pytest.mark.parametrize("banned", [(0, 3), (3, 9)])
def test_a_part_whose_every_token_is_banned(banned: tuple[int, int]) -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(T, H, generator=g, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    bias = torch.zeros(V, dtype=torch.float64)
    bias[slice(*banned)] = -torch.inf
    kept = [v for v in range(V) if not banned[0] <= v < banned[1]]
    labels = torch.full((T,), kept[1])
    want = oracle.token_stats(hidden, weight[kept], torch.ones_like(labels))
    got = merged(hidden, weight, bias, labels, parts_of(((0, 3), (3, 9))))
    for name in ("logprobs", "lse", "entropy", "sum_p2"):
        budgets.assert_rounding(name, getattr(got, name), getattr(want, name), 10.0, 1.0)


def test_nobody_has_the_label() -> None:
    """Labels that nobody checked (`check_labels=False`)."""
    hidden, weight, bias = torch.ones(2, H), torch.ones(V, H), torch.zeros(V)
    got = merged(hidden, weight, bias, torch.tensor([V, -1]), parts_of(((0, 3), (3, 9))))
    assert got.logprobs.tolist() == [-torch.inf, -torch.inf]
