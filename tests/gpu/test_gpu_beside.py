"""Policy losses with something beside the policy on the device: the exact KL to a reference, a critic's values.

Contract: loss and gradients are as close to the float64 oracle as the eager mode in the same dtype is; the reference
gets no gradient; the critic's values get theirs; a step makes the host wait for nothing.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import budgets
from tests.gpu.lane import MODES, each_dtype, no_sync, on_device
from tests.gpu.problems import LOSSES, VANILLA, make_inputs, rl_item
from tests.gpu.test_gpu_distillation import moved
from tests.oracle import head, value
from tests.property.test_full_kl import Problem
from xloss import GRPOLossConfig, GRPOLossContext, ValueLossConfig

NAMES = ("loss", "d hidden", "d weight", "d bias")


@each_dtype
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("per_token", [False, True])
def test_the_exact_kl(per_token: bool, plan: str, dtype: torch.dtype) -> None:
    gold = Problem(dtype, per_token).gold()[0]
    problem = moved(Problem(dtype, per_token))
    found = []
    for run in ({"mode": "chunk", "plan": plan, "chunk_size": 4}, {"mode": "eager"}):
        context = problem.context(**run)
        leaves = [x.detach().requires_grad_() for x in (problem.hidden, problem.weight, problem.bias)]
        reference = problem.ref_weight.detach().requires_grad_()
        given = {"ref_head_weight": reference, "ref_head_bias": problem.ref_bias}
        loss, info = context.forward(*leaves, **given)
        found.append([loss.detach(), *torch.autograd.grad(loss, leaves)])
        assert info.plan.mode == run["mode"] and reference.grad is None
        if run["mode"] == "chunk":
            with no_sync():
                context.forward(*leaves, **given)[0].backward()
    for name, mine, eager, want in zip(NAMES, *found, gold, strict=True):
        budgets.assert_three_way(name, mine.cpu(), eager.cpu(), want, dtype)


@each_dtype
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("value_clip", [None, 0.2])
def test_values_of_a_critic(value_clip: float | None, mode: str, dtype: torch.dtype) -> None:
    case, given = LOSSES["vanilla"], make_inputs(dtype)
    g = torch.Generator().manual_seed(5)
    labels = given.batch.labels
    values, returns, old = (torch.randn(labels.shape, generator=g) for _ in range(3))
    valid = labels != -100
    fields: dict[str, Any] = {"value_loss": ValueLossConfig(value_clip=value_clip), "value_loss_coef": 0.3}
    cfg = GRPOLossConfig(policy_loss_cfg=VANILLA, mode=mode, **fields)
    item = rl_item(given)
    item.returns, item.old_values = on_device(returns), None if value_clip is None else on_device(old)
    (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
    context = GRPOLossContext(cfg, kwargs)
    leaves = [on_device(x).requires_grad_() for x in (given.hidden, given.weight, values)]
    context.forward(*leaves[:2], values=leaves[2])
    with no_sync():
        loss, _ = context.forward(*leaves[:2], values=leaves[2])
        d_values = torch.autograd.grad(loss, leaves)[2]
    leaf = values.double().requires_grad_()
    weights = valid.double() * 0.3 / given.count
    of_values = value.step([leaf], [returns], [old], [valid], [weights], clip=value_clip)
    stats = head.token_stats(given.hidden, given.weight, labels, None, given.head)
    terms = case.terms(stats, given)
    each = budgets.FLOAT32_FLOOR if dtype == torch.float32 else budgets.LOSS_NATS_FACTOR * budgets.BF16_LOGPROB_NATS
    budget = each * float(terms.abs().sum()) + budgets.FLOAT32_FLOOR * float(of_values.detach())
    assert abs(float(loss.detach()) - float(terms.sum()) - float(of_values.detach())) <= budget
    (want,) = torch.autograd.grad(of_values, leaf)
    budgets.assert_relative("d values", d_values.cpu(), want, budgets.FLOAT32_FLOOR)
