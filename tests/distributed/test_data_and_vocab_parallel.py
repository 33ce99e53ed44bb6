"""Data parallelism beside vocabulary parallelism, two by two over four processes (gloo).

Contract: each pair of ranks has one data-parallel rank's micro-batches, cut unevenly, and half of the head each; the
batch is built over the ranks that hold distinct tokens (`data_mesh`). Losses and gradients, summed over these, are
those of one process that holds everything, and no token is counted twice: by the oracle. Ranks that share the tokens
agree on loss and metrics to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from tests import budgets
from tests.distributed import vocab_ranks
from tests.distributed.test_calibration import ce_config, grpo_config, micro_batches, reference, weight
from xloss import CELossContextInputItem, GRPOLossConfig, RLLossContextInputItem, finalize_metrics

pytestmark = pytest.mark.distributed
CONFIGS: dict[str, Callable[..., Any]] = {
    "ce-token": lambda **k: ce_config("token", **k),
    "ce-sample": lambda **k: ce_config("sample", **k),
    "grpo": grpo_config,
}


def job(rank: int) -> Callable[[], dict[str, Any]]:
    return lambda: {name: step(make(grad_reduce="sum")) for name, make in CONFIGS.items()}


def step(cfg: Any) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    batches = micro_batches(mesh["dp"].get_local_rank())
    items: list[Any] = [
        RLLossContextInputItem(shifted_labels=b.labels, advantages=b.advantages, old_logprobs=b.old, ref_logprobs=b.ref)
        if isinstance(cfg, GRPOLossConfig)
        else CELossContextInputItem(shifted_labels=b.labels)
        for _, b, _ in batches
    ]
    ctx_cls = cfg.loss_ctx_cls
    built = ctx_cls.build_batches_loss_kwargs(items, cfg, [cu for _, _, cu in batches], data_mesh=mesh["dp"])
    head = distribute_tensor(weight(), mesh["tp"], [Shard(0)]).requires_grad_()
    outs = [ctx_cls(cfg, kwargs).forward(h, head) for kwargs, (h, _, _) in zip(built, batches, strict=True)]
    loss = torch.stack([x for x, _ in outs]).sum()
    loss.backward()
    assert head.grad is not None
    own, group = head.grad.to_local(), mesh["dp"].get_group()
    total = loss.detach().clone()
    for x in (own, total):
        dist.all_reduce(x, group=group)
    metrics = finalize_metrics([info.metrics for _, info in outs], mesh["dp"])
    return {"loss": loss.detach(), "total": total, "grad": head.grad.full_tensor(), "metrics": metrics}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return [r["steps"] for r in vocab_ranks.spawn(tmp_path_factory.mktemp("ranks"), 4, {"steps": job})]


@pytest.mark.parametrize("name", CONFIGS)
def test_four_ranks_are_one_process(ranks: list[dict[str, Any]], name: str) -> None:
    loss, grad = reference(name)
    for seen in (r[name] for r in ranks):
        budgets.assert_relative("loss", seen["total"], loss, budgets.F32_LOSS)
        budgets.assert_relative("grad", seen["grad"], grad, budgets.F32_GRADIENT)
        live = sum(int((b.labels != -100).sum()) for rank in range(2) for _, b, _ in micro_batches(rank))
        assert int(seen["metrics"]["num_tokens"]) == live
    for first, second in ((0, 1), (2, 3)):
        assert torch.equal(ranks[first][name]["loss"], ranks[second][name]["loss"])
        assert not torch.equal(ranks[0][name]["loss"], ranks[2][name]["loss"])
        for metric, value in ranks[first][name]["metrics"].items():
            assert torch.equal(value, ranks[second][name]["metrics"][metric]), metric
