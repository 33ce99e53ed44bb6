"""Rollout corrections over two processes (gloo).

Contract: micro-batches dealt to two ranks, and sequences split over them, give the loss, gradient and metrics of one
process that holds everything, for corrections that look at a token, a sequence or the whole batch.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from tests import budgets
from tests.distributed.ranks import spawn
from tests.property.correction_problem import problem
from xloss import GRPOLossConfig, OrealLossConfig, finalize_metrics

pytestmark = pytest.mark.distributed
WORLD = 2
PPO = {"policy_loss_cfg": {"loss_type": "ppo"}, "mode": "chunk", "chunk_size": 4, "grad_reduce": "sum"}
CORRECTIONS: dict[str, dict[str, Any]] = {
    "token": {"low": 0.8, "high": 1.2},
    "veto": {"level": "sequence", "high": 1.5, "veto_low": 0.6},
    "normalised": {"level": "geometric", "high": 1.1, "batch_normalize": True},
    "renormalised": {
        "action": "mask",
        "low": 0.8,
        "high": 1.3,
        "reject": [{"estimator": "k2", "over": "max", "high": 0.5}],
        "renormalize_rejected": True,
    },
}
CONFIGS: dict[str, GRPOLossConfig] = {
    **{name: GRPOLossConfig(rollout_correction=fields, **PPO) for name, fields in CORRECTIONS.items()},
    "oreal": OrealLossConfig(positive_loss_factor=1.3, negative_loss_factor=0.4, **PPO),
    "vapo": GRPOLossConfig(positive_nll_coef=0.3, **PPO),
}


def step(cfg: GRPOLossConfig, batches: list[int], sp_mesh: DeviceMesh | None = None, rank: int = 0) -> dict[str, Any]:
    """Loss, gradient of the weight and reduced metrics of these micro-batches, or of this rank's parts of them."""
    case = problem(3)
    items, bounds = [case.items()[b] for b in batches], [case.cu_seq_lens[b] for b in batches]
    hidden = [case.hidden[b] for b in batches]
    if sp_mesh is not None:
        items = [item.sp_split(sp_mesh) for item in items]
        part = items[0].shifted_labels.shape[1]
        missing = part * WORLD - hidden[0].shape[1]
        hidden = [torch.nn.functional.pad(hidden[0], (0, 0, 0, missing))[:, rank * part : (rank + 1) * part]]
    weight = case.weight.clone().requires_grad_()
    ctx = cfg.loss_ctx_cls
    kwargs = ctx.build_batches_loss_kwargs(items, cfg, cu_seq_lens_list=bounds, sp_mesh=sp_mesh)
    outs = [ctx(cfg, k).forward(h, weight) for k, h in zip(kwargs, hidden, strict=True)]
    loss = torch.stack([x for x, _ in outs]).sum()
    loss.backward()
    metrics = {n: float(m) for n, m in finalize_metrics([info.metrics for _, info in outs]).items()}
    return {"loss": loss.detach(), "grad": weight.grad, "metrics": metrics}


def job(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (WORLD,))
    seen = {name: step(cfg, [rank]) for name, cfg in CONFIGS.items()}
    return seen | {f"{name}-split": step(cfg, [0], mesh, rank) for name, cfg in CONFIGS.items()}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    return spawn(WORLD, job, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("how", ["dealt", "split"])
def test_two_ranks_are_one_process(ranks: list[dict[str, Any]], name: str, how: str) -> None:
    """`split`: the first micro-batch, its sequences cut in the middle."""
    alone = step(CONFIGS[name], [0, 1] if how == "dealt" else [0])
    seen = [r[name if how == "dealt" else f"{name}-split"] for r in ranks]
    grads: list[Tensor] = [s["grad"] for s in seen]
    budgets.assert_relative("grad", grads[0] + grads[1], alone["grad"], budgets.F32_GRADIENT)
    budgets.assert_relative("loss", seen[0]["loss"] + seen[1]["loss"], alone["loss"], budgets.F32_LOSS)
    assert seen[0]["metrics"] == seen[1]["metrics"]
    assert seen[0]["metrics"] == pytest.approx(alone["metrics"], rel=budgets.F32_LOSS, abs=budgets.F32_LOSS)
