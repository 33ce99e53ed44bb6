"""Preference losses over two processes (gloo).

Contract: pairs dealt to two ranks in uneven micro-batches give, after the engine's reduction, the loss and gradient of
one process that holds them all, KTO's global reference point included; a rank without a pair takes part.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import budgets
from tests.distributed.ranks import spawn
from tests.oracle.preference import Objective
from tests.property.preferences import Case, case, config, gold_step, items, run_step
from xloss import PreferenceLossContext, finalize_metrics

pytestmark = pytest.mark.distributed
WORLD = 2
OBJECTIVES = {
    "dpo": Objective([{"loss_type": "sigmoid"}, {"loss_type": "sft", "weight": 0.5}]),
    "kto": Objective([{"loss_type": "kto", "undesirable_weight": 1.3}], kl=0.4),
}


def whole() -> Case:
    return case(8, packed=True, layout="ids", micro_batches=3)


def part(rank: int, name: str) -> Case:
    """Micro-batches 0 and 1, or 2; ``-dead``: the second rank's tokens are all ignored."""
    full = whole()
    mine = full.batches[:2] if rank == 0 else full.batches[2:]
    if name.endswith("dead") and rank == 1:
        for b in mine:
            b.labels.fill_(-100)
    return Case(full.weight, mine, full.layout)


def job(rank: int, name: str, reduce: str) -> dict[str, Any]:
    problem, o = part(rank, name), OBJECTIVES[name.removesuffix("-dead")]
    got = run_step(problem, o, grad_reduce=reduce)
    metrics = finalize_metrics([info.metrics for info in got.infos])
    found = {"loss": got.loss, "grad": got.weight, "metrics": {n: float(m) for n, m in metrics.items()}}
    if name == "kto":  # each rank's own estimates: the reference point is the mean of all five
        cfg = config(problem, o)
        given = items(problem, cfg, o)
        for i, item in enumerate(given):
            item.kl = torch.full((1 + i + rank,), float(i + rank))
        bounds = [b.cu_seq_lens for b in problem.batches if b.cu_seq_lens is not None]
        built = PreferenceLossContext.build_batches_loss_kwargs(given, cfg, cu_seq_lens_list=bounds)
        found["kl"] = [float(k.kl_point) for k in built]
    return found


NAMES = ("dpo", "kto", "dpo-dead", "kto-dead")


def jobs(rank: int) -> dict[Any, dict[str, Any]]:
    return {(name, reduce): job(rank, name, reduce) for name in NAMES for reduce in ("sum", "mean")}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, dict[str, Any]]]:
    """What both ranks saw."""
    return spawn(WORLD, jobs, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("name", NAMES)
def test_two_ranks_are_one_process(ranks: list[dict[Any, dict[str, Any]]], name: str, reduce: str) -> None:
    parts = [part(rank, name) for rank in range(WORLD)]
    problem = Case(parts[0].weight, [b for p in parts for b in p.batches], parts[0].layout)
    want, result = gold_step(problem, OBJECTIVES[name.removesuffix("-dead")])
    seen = [r[name, reduce] for r in ranks]
    divide = WORLD if reduce == "mean" else 1
    budgets.assert_relative("grad", sum(s["grad"] for s in seen) / divide, want.weight, budgets.F32_GRADIENT)
    budgets.assert_relative("loss", sum(s["loss"] for s in seen) / divide, want.loss, budgets.F32_LOSS)
    for s in seen:
        assert s["metrics"]["num_chosen"] == len(result.rewards["chosen"])
        assert s["metrics"]["reward_chosen"] == pytest.approx(
            sum(result.rewards["chosen"]) / len(result.rewards["chosen"])
        )
    if name.endswith("dead"):
        assert not bool(seen[1]["grad"].any())


def test_reference_point_is_global(ranks: list[dict[Any, dict[str, Any]]]) -> None:
    """Rank 0: one 0 and two 1; rank 1: two 1."""
    assert [r["kto", "sum"]["kl"] for r in ranks] == [[pytest.approx(0.8)] * 2, [pytest.approx(0.8)]]
