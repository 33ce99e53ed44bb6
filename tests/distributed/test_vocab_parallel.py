"""Vocabulary parallelism over two and three processes (gloo), one of which may hold no row of the head.

Contract: every loss, in every plan, gives every rank the loss, the metrics and the hidden gradient of one process with
the whole head, and each rank the gradients of its rows. The reference is one process in eager mode in float64, which
the tests of properties hold to the oracles. All ranks see the same bits.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch

from tests import budgets
from tests.distributed import vocab_ranks
from tests.distributed.vocab_ranks import SPLITS, STATISTICS, WAYS, as_result, pairs
from tests.oracle import head as oracle
from tests.property.registry import PLAIN
from tests.property.same import assert_same
from tests.property.world import WORLD

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What the ranks of each split saw."""
    return {
        split: vocab_ranks.spawn(
            tmp_path_factory.mktemp(split),
            len(SPLITS[split]),
            {name: partial(getattr(vocab_ranks, name), split) for name in ("losses", "primitives", "dead")},
        )
        for split in SPLITS
    }


@pytest.mark.parametrize("split, name, run", [(split, *pair) for split in SPLITS for pair in pairs(split)])
def test_every_loss_is_one_process(seen: dict[str, list[Any]], split: str, name: str, run: str) -> None:
    ranks = [r["losses"][name, run] for r in seen[split]]
    assert_same(as_result(ranks, SPLITS[split]), WORLD.run(PLAIN[name], mode="eager"))
    for other in ranks[1:]:
        assert torch.equal(other["loss"], ranks[0]["loss"])
        assert torch.equal(other["grads"]["hidden"], ranks[0]["grads"]["hidden"])
        assert torch.equal(other["info"].logprobs, ranks[0]["info"].logprobs)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", STATISTICS)
@pytest.mark.parametrize("split", SPLITS)
def test_every_statistic_and_adjoint(seen: dict[str, list[Any]], split: str, kind: str, way: str) -> None:
    """A random adjoint for each number of each statistic, against the oracle."""
    several, between = STATISTICS[kind]
    x = vocab_ranks.primitive(several)
    leaves = oracle.leaves(*(x[n] for n in ("hidden", "weight", "bias")))
    hidden, weight, bias = leaves
    stats = oracle.token_stats(hidden, weight, x["labels"], bias, oracle.Head(**between))
    total = torch.stack([(x[n] * getattr(stats, n)).sum() for n in oracle.STATISTICS]).sum()
    want = {n: getattr(stats, n) for n in oracle.STATISTICS}
    want |= dict(zip(("d hidden", "d weight", "d bias"), oracle.grads(total, leaves), strict=True))
    ranks = [r["primitives"][kind, way] for r in seen[split]]
    order = sorted(range(len(ranks)), key=lambda r: SPLITS[split][r])
    got = ranks[0] | {n: torch.cat([ranks[r][n] for r in order]) for n in ("d weight", "d bias")}
    for name, theirs in want.items():
        budgets.assert_rounding(name, got[name], theirs, 10.0, 1.0)
    assert torch.equal(got["top1"], stats.top1)
    for name in (*oracle.STATISTICS, "top1", "d hidden"):
        assert all(torch.equal(r[name], ranks[0][name]) for r in ranks[1:])


@pytest.mark.parametrize("split", SPLITS)
def test_batches_without_a_token(seen: dict[str, list[Any]], split: str) -> None:
    """The loss and all gradients are 0, and ranks stay in step."""
    for rank, found in enumerate(seen[split]):
        start, stop = SPLITS[split][rank]
        for got in found["dead"]:
            assert got["weight"].shape == (stop - start, 5)
            assert not any(bool(x.any()) for x in got.values())
