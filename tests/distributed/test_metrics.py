"""Metrics over two processes (gloo).

Contract: every reducer gives both ranks what one process gives that holds all parts, however many metrics there are
and whatever the order of their names; ranks whose metrics differ all raise, and the message names them. Each term of
a policy loss, added over ranks, is that term of the global loss, whatever the engine does to gradients. A sequence
split over both ranks counts once.
"""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests import budgets
from tests.distributed.ranks import spawn
from xloss import (
    CELossConfig,
    CELossContextInputItem,
    GRPOLossConfig,
    Metric,
    RLLossContextInputItem,
    finalize_metrics,
)
from xloss.errors import OptionError

pytestmark = pytest.mark.distributed
WORLD, H, V = 2, 3, 11


def parts(rank: int, many: int = 0) -> list[dict[str, Metric]]:
    """Two micro-batches of one rank, names in another order on the second."""
    g = torch.Generator().manual_seed(rank)
    found = []
    for count in (3, 4 + rank):
        x = torch.rand(count, generator=g)
        figures = Metric.means({"mean": x}) | {"total": Metric.total(x)}
        for reducer in ("max", "min"):
            figures[reducer] = Metric.extreme(x, "max" if reducer == "max" else "min")
        figures |= {"std": Metric.moments(x, "std"), "ess": Metric.moments(x, "ess")}
        figures |= {f"many_{i}": Metric(x.sum() * i, x.new_tensor(float(count)), "mean") for i in range(many)}
        found.append(dict(reversed(figures.items())) if rank else figures)
    return found


def differing(rank: int, how: str) -> str:
    mine = parts(rank)
    if rank == 1:
        if how == "name":
            mine = [{**p, "extra": p["total"]} for p in mine]
        elif how == "reducer":
            mine = [{**p, "max": Metric(p["max"].value, None, "min")} for p in mine]
        else:
            mine = parts(rank, 2000)
    with pytest.raises(OptionError) as error:
        finalize_metrics(mine)
    return str(error.value)


def problem() -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(4, 5, H, generator=g, dtype=torch.float64)
    fields = {n: torch.randn(4, 5, generator=g, dtype=torch.float64) for n in ("advantages", "old_logprobs")}
    fields["ref_logprobs"] = fields["old_logprobs"] + 0.1
    labels = torch.randint(0, V, (4, 5), generator=g)
    labels[0, 2:] = labels[3] = -100
    return hidden, torch.randn(V, H, generator=g, dtype=torch.float64), fields | {"shifted_labels": labels}


def terms(rows: slice, reduce: Literal["mean", "sum"]) -> tuple[float, dict[str, float]]:
    """This process's loss and the step's reduced metrics; it holds some rows of the batch."""
    hidden, weight, fields = problem()
    cfg = GRPOLossConfig(
        policy_loss_cfg={"loss_type": "ppo"},
        use_kl_loss=True,
        kl_loss_coef=0.3,
        kl_loss_type="k3",
        entropy_coef=0.2,
        positive_nll_coef=0.4,
        loss_reduction="sample",
        grad_reduce=reduce,
        chunk_size=4,
    )
    item = RLLossContextInputItem(**{name: value[rows] for name, value in fields.items()})
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
    loss, info = cfg.loss_ctx_cls(cfg, kwargs).forward(hidden[rows], weight)
    return float(loss), {name: float(x) for name, x in finalize_metrics([info.metrics]).items()}


def split_sequences() -> float:
    """A pack of three sequences, the second over both ranks, the last without a label."""
    mesh = init_device_mesh("cpu", (WORLD,))
    labels = torch.tensor([[1, 2, 3, 4, 5, 6, -100, -100]])
    cfg = CELossConfig(grad_reduce="sum")
    item = CELossContextInputItem(shifted_labels=labels).sp_split(mesh)
    bounds = [torch.tensor([0, 2, 6, 8])]
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg, bounds, mesh)
    return float(finalize_metrics([kwargs.built_metrics])["num_sequences"])


def job(rank: int) -> dict[str, Any]:
    rows = slice(0, 2) if rank == 0 else slice(2, 4)
    return {
        "few": finalize_metrics(parts(rank)),
        "many": finalize_metrics(parts(rank, 2000)),
        "errors": {how: differing(rank, how) for how in ("name", "reducer", "many")},
        "few-alone": finalize_metrics(parts(0) if rank == 0 else []),
        "many-alone": finalize_metrics(parts(0, 2000) if rank == 0 else []),
        "none": finalize_metrics([]),
        "mean": terms(rows, "mean"),
        "sum": terms(rows, "sum"),
        "split": split_sequences(),
    }


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(WORLD, job, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", ["few", "many"])
def test_ranks_are_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    count = 2000 if name == "many" else 0
    want = finalize_metrics([p for rank in range(WORLD) for p in parts(rank, count)])
    for rank, seen in enumerate(ranks):
        assert list(seen[name]) == list(parts(rank, count)[0])  # in the order of the rank
        for figure, value in want.items():
            torch.testing.assert_close(seen[name][figure].to(value.dtype), value, msg=figure)
    assert all(torch.equal(value, ranks[1][name][figure]) for figure, value in ranks[0][name].items())


def test_differing_metrics_raise_on_every_rank(ranks: list[dict[str, Any]]) -> None:
    for seen in ranks:
        assert "rank 0 lacks ['extra']" in seen["errors"]["name"]
        assert "max is max[1] on rank 0 and min[1] on rank 1" in seen["errors"]["reducer"]
        assert "rank 0 lacks ['many_0'" in seen["errors"]["many"]


@pytest.mark.parametrize("name", ["few", "many"])
def test_rank_without_a_micro_batch(ranks: list[dict[str, Any]], name: str) -> None:
    """It gets the figures of the others, and changes none."""
    want = finalize_metrics(parts(0, 2000 if name == "many" else 0))
    for seen in ranks:
        assert seen[f"{name}-alone"].keys() == want.keys()
        for figure, value in want.items():
            torch.testing.assert_close(seen[f"{name}-alone"][figure].to(value.dtype), value, msg=figure)
        assert seen["none"] == {}


@pytest.mark.parametrize("reduce", ["mean", "sum"])
def test_terms_add_up_to_the_loss(ranks: list[dict[str, Any]], reduce: str) -> None:
    total, want = terms(slice(0, 4), "sum")
    names = ("pg_loss", "kl_loss", "entropy_loss", "nll_loss")
    assert sum(want[n] for n in names) == pytest.approx(total, rel=budgets.FIGURE_SAME)
    assert all(abs(want[n]) > 1e-3 for n in names)
    for _, seen in (r[reduce] for r in ranks):
        assert {n: seen[n] for n in want} == pytest.approx(want, rel=budgets.FIGURE_F32)  # weights are float32
    assert want["num_sequences"] == 3


def test_split_sequences_count_once(ranks: list[dict[str, Any]]) -> None:
    assert [r["split"] for r in ranks] == [2.0, 2.0]
