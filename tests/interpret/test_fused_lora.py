"""Adapters on the head with the kernels' row work, against the dense head in float64. Contract: tests/property."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests import budgets
from tests.oracle import ce
from tests.property.test_lora import adapted, context, dense, problem
from xloss import CELossConfig
from xloss.errors import UnsupportedError


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("fields", [{}, {"return_entropy": True, "softcap": 3.0}], ids=["twin", "no twin"])
def test_a_loss(plan: str, fields: dict[str, Any]) -> None:
    hidden, weight, parts, labels = problem(torch.float32)
    wide = [x.detach().double().requires_grad_() for x in (hidden, *parts)]
    head = ce.Head(softcap=fields.get("softcap"))
    gold = ce.loss(wide[0], dense(weight.double(), wide[1:]), labels, ce.step_weights([labels])[0], head=head)
    want = torch.autograd.grad(gold, wide)
    cfg = CELossConfig(mode="fused", chunk_size=7, plan=plan, **fields)
    loss, _ = context(cfg, labels).forward(hidden, adapted(weight, parts))
    got = torch.autograd.grad(loss, (hidden, *parts))
    relative = budgets.FUSED_RELATIVE[torch.float32]
    for name, mine, theirs in zip(("loss", "hidden", *"abcd"), (loss, *got), (gold, *want), strict=True):
        budgets.assert_relative(name, mine, theirs, relative)


def test_no_logits_knows_no_adapters() -> None:
    hidden, weight, parts, labels = problem(torch.float32)
    for fields in ({"kernels": "no_logits"}, {"logits_budget": 0}):
        ctx = context(CELossConfig(mode="fused", **fields), labels)
        with pytest.raises(UnsupportedError, match="those know no adapters, and head_weight has one"):
            ctx.forward(hidden, adapted(weight, parts))
    plan = context(CELossConfig(mode="fused"), labels).explain(hidden, adapted(weight, parts))
    assert plan.kernels == "chunked_logits"
