"""Global calibration over two processes (gloo).

Contract: the global batch dealt to two ranks in uneven micro-batches gives, after the engine's reduction (`sum` or
`mean`), the gradient of one process that holds everything, for token, sample and square weights and for GRPO with a
KL term; a rank with nothing but ignored tokens takes part in the same collectives; reduced metrics are those of all
tokens; a sequence split over both ranks counts once. The reference is the oracle in the parent process, which has no
process group.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from tests import budgets
from tests.distributed.ranks import spawn
from tests.oracle import ce, grpo, head
from xloss import (
    CELossConfig,
    CELossContextInputItem,
    GRPOLossConfig,
    MTPLossConfig,
    RLLossContextInputItem,
    SoftCELossConfig,
    SoftCELossContextInputItem,
    finalize_metrics,
)

pytestmark = pytest.mark.distributed
WORLD, H, V = 2, 3, 11
# lengths of the packed sequences: rank -> micro-batch -> sequences
DEALT = {0: [[4, 1, 6], [2], [5, 5]], 1: [[1], [3, 7]]}
POLICY = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28}


def weight() -> Tensor:
    return torch.randn(V, H, dtype=torch.float64, generator=torch.Generator().manual_seed(99))


def micro_batches(rank: int, *, dead_rank: int | None = None) -> list[tuple[Tensor, grpo.Batch, Tensor]]:
    """Hidden states, batch and bounds of this rank's micro-batches; the same in every process."""
    g = torch.Generator().manual_seed(rank)
    out = []
    for lengths in DEALT[rank]:
        count = sum(lengths)
        labels = torch.randint(0, V, (1, count), generator=g)
        labels[torch.rand(1, count, generator=g) < 0.3] = -100
        if rank == dead_rank:
            labels.fill_(-100)
        rest = {n: torch.randn(1, count, generator=g, dtype=torch.float64) for n in ("advantages", "old", "ref")}
        batch = grpo.Batch(labels, rest["advantages"], rest["old"] - 2, rest["ref"] - 2)
        hidden = torch.randn(1, count, H, generator=g, dtype=torch.float64)
        out.append((hidden, batch, torch.tensor([0, *lengths]).cumsum(0)))
    return out


def ce_config(reduction: str, **fields: Any) -> CELossConfig:
    return CELossConfig(loss_reduction=reduction, mode="chunk", chunk_size=4, **fields)


def grpo_config(**fields: Any) -> GRPOLossConfig:
    kl = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3"}
    return GRPOLossConfig(policy_loss_cfg=POLICY, mode="chunk", chunk_size=4, **kl, **fields)


def step(cfg: Any, batches: list[tuple[Tensor, grpo.Batch, Tensor]]) -> dict[str, Any]:
    """This rank's loss, its gradient of the weight, and the step's reduced metrics."""
    items: list[Any] = [
        RLLossContextInputItem(shifted_labels=b.labels, advantages=b.advantages, old_logprobs=b.old, ref_logprobs=b.ref)
        if isinstance(cfg, GRPOLossConfig)
        else CELossContextInputItem(shifted_labels=b.labels)
        for _, b, _ in batches
    ]
    w, ctx_cls = weight().requires_grad_(), cfg.loss_ctx_cls
    built = ctx_cls.build_batches_loss_kwargs(items, cfg, cu_seq_lens_list=[cu for _, _, cu in batches])
    outs = [ctx_cls(cfg, kwargs).forward(h, w) for kwargs, (h, _, _) in zip(built, batches, strict=True)]
    loss = torch.stack([x for x, _ in outs]).sum()
    loss.backward()
    metrics = finalize_metrics([info.metrics for _, info in outs])
    return {"loss": loss.detach(), "grad": w.grad, "metrics": {n: float(m) for n, m in metrics.items()}}


def split_sequence(rank: int) -> dict[str, Any]:
    """Sequence parallelism: one pack of 13 tokens over both ranks, padded to 7 each; weights per sequence."""
    hidden, batch, cu = micro_batches(0)[0]
    mesh = init_device_mesh("cpu", (WORLD,))
    results = {}
    for reduction in ("token", "sample", "square"):
        cfg = ce_config(reduction, grad_reduce="sum")
        item = CELossContextInputItem(shifted_labels=batch.labels)
        item.sp_split(mesh)
        ctx_cls = cfg.loss_ctx_cls
        (kwargs,) = ctx_cls.build_batches_loss_kwargs([item], cfg, cu_seq_lens_list=[cu], sp_mesh=mesh)
        part = -(-batch.labels.shape[1] // WORLD)
        padded = torch.nn.functional.pad(hidden, (0, 0, 0, part * WORLD - hidden.shape[1]))
        w = weight().requires_grad_()
        loss, _ = ctx_cls(cfg, kwargs).forward(padded[:, rank * part : (rank + 1) * part], w)
        loss.backward()
        results[reduction] = {"loss": loss.detach(), "grad": w.grad}
    mtp = MTPLossConfig(mtp_depth=2, loss_reduction="sample", mode="chunk", chunk_size=4, grad_reduce="sum")
    ctx = mtp.build({"shifted_labels": batch.labels}, sp_mesh=mesh)
    assert ctx is not None
    type(ctx).build_batches([ctx], [cu], mesh)
    w = weight().requires_grad_()
    loss, _ = ctx.forward(padded[:, rank * part : (rank + 1) * part], w)
    loss.backward()
    results["mtp"] = {"loss": loss.detach(), "grad": w.grad}
    targets, weights = soft_targets(batch.labels)
    soft = SoftCELossConfig(mode="chunk", chunk_size=4, grad_reduce="sum")
    item = SoftCELossContextInputItem(shifted_labels=batch.labels, target_tokens=targets, target_weights=weights)
    (kwargs,) = soft.loss_ctx_cls.build_batches_loss_kwargs([item.sp_split(mesh)], soft, None, mesh)
    w = weight().requires_grad_()
    loss, _ = soft.loss_ctx_cls(soft, kwargs).forward(padded[:, rank * part : (rank + 1) * part], w)
    loss.backward()
    return results | {"soft": {"loss": loss.detach(), "grad": w.grad}}


def soft_targets(labels: Tensor) -> tuple[Tensor, Tensor]:
    """Three targets a token with random weights, the same in every process."""
    g = torch.Generator().manual_seed(5)
    shape = (*labels.shape, 3)
    return torch.randint(0, V, shape, generator=g), torch.randn(shape, generator=g, dtype=torch.float64)


def jobs(rank: int) -> dict[str, Callable[[], dict[str, Any]]]:
    """Everything one rank does, in the same order on both."""
    mine, dead = micro_batches(rank), micro_batches(rank, dead_rank=1)
    todo: dict[str, Callable[[], dict[str, Any]]] = {}
    for reduce in ("sum", "mean"):
        for reduction in ("token", "sample", "square"):
            cfg = ce_config(reduction, grad_reduce=reduce)
            todo[f"ce-{reduction}-{reduce}"] = lambda cfg=cfg: step(cfg, mine)
        todo[f"grpo-{reduce}"] = lambda reduce=reduce: step(grpo_config(grad_reduce=reduce), mine)
    todo["ce-dead"] = lambda: step(ce_config("sample", grad_reduce="sum"), dead)
    todo["grpo-dead"] = lambda: step(grpo_config(grad_reduce="sum"), dead)
    todo["sequence"] = lambda: split_sequence(rank)
    return todo


def job(rank: int) -> dict[str, Any]:
    return {name: todo() for name, todo in jobs(rank).items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What both ranks saw."""
    return spawn(WORLD, job, tmp_path_factory.mktemp("ranks"))


def reference(name: str, **data: Any) -> tuple[Tensor, Tensor]:
    """Loss and weight gradient of one process that holds every micro-batch, by the oracle."""
    batches = [b for rank in range(WORLD) for b in micro_batches(rank, **data)]
    (w,) = head.leaves(weight())
    if name.startswith("ce"):
        labels, bounds = [b.labels for _, b, _ in batches], [cu for _, _, cu in batches]
        weights = ce.step_weights(labels, bounds, name.split("-")[1])
        losses = [ce.loss(h, w, y, u) for (h, _, _), y, u in zip(batches, labels, weights, strict=True)]
    else:
        objective = grpo.Objective(POLICY, 0.1, "k3")
        weights = grpo.step_weights([b for _, b, _ in batches], objective)
        losses = [grpo.loss(h, w, b, u, objective) for (h, b, _), u in zip(batches, weights, strict=True)]
    total = torch.stack(losses).sum()
    return total.detach(), head.grads(total, [w])[0]


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("name", ["ce-token", "ce-sample", "ce-square", "grpo"])
def test_two_ranks_are_one_process(ranks: list[dict[str, Any]], name: str, reduce: str) -> None:
    """The cut is uneven on purpose: 3 micro-batches of 23 tokens against 2 of 11."""
    loss, grad = reference(name)
    seen = [r[f"{name}-{reduce}"] for r in ranks]
    divide = WORLD if reduce == "mean" else 1
    budgets.assert_relative("grad", sum(s["grad"] for s in seen) / divide, grad, budgets.F32_GRADIENT)
    budgets.assert_relative("loss", sum(s["loss"] for s in seen) / divide, loss, budgets.F32_LOSS)


@pytest.mark.parametrize("name", ["ce", "grpo"])
def test_rank_without_tokens(ranks: list[dict[str, Any]], name: str) -> None:
    """Its share is 0, the other's is everything; both ranks report the same metrics."""
    loss, grad = reference("ce-sample" if name == "ce" else name, dead_rank=1)
    seen = [r[f"{name}-dead"] for r in ranks]
    budgets.assert_relative("grad", seen[0]["grad"], grad, budgets.F32_GRADIENT)
    budgets.assert_relative("loss", seen[0]["loss"], loss, budgets.F32_LOSS)
    assert not bool(seen[1]["grad"].any())
    assert seen[0]["metrics"] == seen[1]["metrics"]
    live = sum(int((b.labels != -100).sum()) for _, b, _ in micro_batches(0))
    assert seen[0]["metrics"]["num_tokens"] == live


def test_metrics_are_global(ranks: list[dict[str, Any]]) -> None:
    batches = [b for rank in range(WORLD) for b in micro_batches(rank)]
    logprobs = [head.token_stats(h, weight(), b.labels).logprobs for h, b, _ in batches]
    want = grpo.metrics(logprobs, [b for _, b, _ in batches], 0.2, 0.28)
    for seen in (r["grpo-mean"]["metrics"] for r in ranks):
        for name, value in want.items():
            assert seen[name] == pytest.approx(value, rel=budgets.FIGURE_SAME), name


@pytest.mark.parametrize("name", ["token", "sample", "square", "mtp", "soft"])
def test_split_sequence(ranks: list[dict[str, Any]], name: str) -> None:
    """Two halves of a pack, the second padded: tokens of a sequence are counted, and labels rolled, over both."""
    hidden, batch, cu = micro_batches(0)[0]
    (w,) = head.leaves(weight())
    labels, reduction = batch.labels, name
    if name == "mtp":
        labels, reduction = torch.tensor([ce.rolled(labels[0].tolist(), cu.tolist(), 2, -100)]), "sample"
    if name == "soft":
        targets, target_weights = soft_targets(labels)
        loss = (ce.soft(hidden[0] @ w.T, targets[0], target_weights[0]) * (labels[0] != -100)).sum()
    else:
        (weights,) = ce.step_weights([labels], [cu], reduction)
        loss = ce.loss(hidden, w, labels, weights)
    seen = [r["sequence"][name] for r in ranks]
    budgets.assert_relative("loss", sum(s["loss"] for s in seen), loss, budgets.F32_LOSS)
    budgets.assert_relative("grad", sum(s["grad"] for s in seen), head.grads(loss, [w])[0], budgets.F32_GRADIENT)
