"""Sequences split over two processes (gloo), for every loss there is.

Contract: with one micro-batch split over two ranks, contiguous or head-tail, packed or padded, whole items split by us
or parts declared as such, each of two ranks gives its share of the loss, the gradients of its own tokens and its share
of the head's; together they are those of one process, whether the loss couples tokens or not, in chunks and in eager
mode. Both ranks report the metrics of one process.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh

from tests import budgets
from tests.distributed.cut import Cut, merged, run_rank
from tests.distributed.ranks import spawn
from tests.property.registry import PLAIN
from tests.property.world import WHOLE, Case, Layout, ask

pytestmark = pytest.mark.distributed
WORLD = 2
ALL = (WHOLE.batches,)
CUTS = {
    "contiguous": Cut(ALL),
    "head-tail": Cut(ALL, order="head_tail"),
    "padded": Cut(ALL, packed=False, order="head_tail"),
    "parts": Cut(ALL, order="head_tail", parts=True),
    "dead-rank": Cut((((0, 1, 8, 9, 5),),)),  # the second rank has no token of the loss
    "dead": Cut((((8, 9),),)),
}
RUNS: dict[str, dict[str, Any]] = {"contiguous": {"mode": "eager"}, "parts": {"plan": "two_pass", "mode": "chunk"}}


def cuts_of(case: Case) -> dict[str, Cut]:
    wrong = {"padded"} if case.by_place else {"dead-rank"} if "pair_ids" in case.fields else set()
    return {name: cut for name, cut in CUTS.items() if name not in wrong}


def job(rank: int, names: list[str]) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (WORLD,))
    return {
        (name, how): run_rank(PLAIN[name], cut, 0, mesh, **RUNS.get(how, {"mode": "chunk", "chunk_size": 5}))
        for name in names
        for how, cut in cuts_of(PLAIN[name]).items()
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return spawn(WORLD, job, tmp_path_factory.mktemp("ranks"), list(PLAIN))


@pytest.mark.parametrize("how", CUTS)
@pytest.mark.parametrize("name", PLAIN)
def test_two_parts_are_one_process(ranks: list[Any], name: str, how: str) -> None:
    case, cut = PLAIN[name], CUTS[how]
    if how not in cuts_of(case):
        return
    want = ask(case, Layout(cut.batches[0], cut.packed))
    got = merged([[seen[name, how] for seen in ranks]], cut)
    factor = 1 if name == "logprob" else WORLD  # log-probs have no weight, and so nothing of the engine's average
    budgets.assert_rounding("loss", got["loss"] / factor, want.loss, 10.0, 1.0)
    for field, value in want.grads.items():
        budgets.assert_rounding(f"d {field}", got[field] / factor, value, 10.0, 1.0)
    for metrics in got["metrics"]:
        assert metrics.keys() == want.metrics.keys()
        for figure, value in want.metrics.items():
            budgets.assert_rounding(figure, torch.tensor(metrics[figure], dtype=torch.float64), value, 10.0, 1.0)
