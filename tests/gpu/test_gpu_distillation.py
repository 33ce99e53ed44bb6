"""Losses with a second distribution on the device.

Contract: loss and gradients are as close to the float64 oracle as the eager mode in the same dtype is, in one pass and
two, for a teacher given as head, logits or function. `auto` is `chunk` and says why. A step, of a top-k teacher too,
never makes the host wait, and both models' logits stay within the budget.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.gpu.lane import DEVICE, SMALL, PeakBytes, each_dtype, no_sync, on_device
from tests.property.distilled import Problem
from xloss import DistillLossConfig, DistillLossContextInputItem

PLANS = {
    "one_pass": {"mode": "chunk", "chunk_size": 3},
    "two_pass": {"mode": "chunk", "plan": "two_pass", "chunk_size": 3},
    "two_pass-again": {"mode": "chunk", "plan": "two_pass", "chunk_size": 3, "logits_budget": 1},
    "auto": {},
}


def moved(problem: Problem) -> Problem:
    """The problem with every tensor on the lane's device."""
    for name, value in vars(problem).items():
        if isinstance(value, Tensor):
            setattr(problem, name, on_device(value))
    return problem


@each_dtype
@pytest.mark.parametrize("run", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("source", ["head", "logits", "function"])
@pytest.mark.parametrize("kind", ["forward_kl", "reverse_kl", "jsd", "tvd"])
def test_as_close_as_eager(kind: str, source: str, run: dict[str, Any], dtype: torch.dtype) -> None:
    gold = Problem(dtype, tau=1.3).gold(kind)[0]
    problem = moved(Problem(dtype, tau=1.3))
    base, _ = problem.run(source, divergence=kind, mode="eager")
    ours, info = problem.run(source, divergence=kind, **run)
    assert info.plan.mode == "chunk"
    if not run:
        assert "no Triton kernel knows a second distribution" in str(info.plan)
    for name, mine, eager, want in zip(("loss", "dh", "dw", "db"), ours, base, gold, strict=True):
        budgets.assert_three_way(name, mine.cpu(), eager.cpu(), want, dtype)


class Step:
    """A micro-batch of the lane's small shape with a teacher on the device."""

    def __init__(self, **config: Any) -> None:
        g = torch.Generator().manual_seed(0)
        tokens, hidden, vocab = SMALL.tokens, SMALL.hidden, SMALL.vocab

        def randn(*size: int) -> Tensor:
            return on_device(torch.randn(size, generator=g))

        labels = torch.randint(0, vocab, (1, tokens), generator=g)
        labels[0, ::5] = -100
        self.hidden, self.weight = randn(1, tokens, hidden).requires_grad_(), randn(vocab, hidden).requires_grad_()
        self.teacher_weight = randn(vocab, hidden)
        fields: dict[str, Tensor] = {"teacher_hidden_states": randn(1, tokens, hidden)}
        self.given = {"teacher_head_weight": self.teacher_weight}
        if "topk_mode" in config:
            logprobs, ids = randn(1, tokens, vocab).log_softmax(-1).topk(7)
            fields, self.given = {"teacher_topk_ids": ids, "teacher_topk_logprobs": logprobs}, {}
        cfg = DistillLossConfig(mode="chunk", **config)
        item = DistillLossContextInputItem(shifted_labels=on_device(labels), **fields)
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
        self.ctx = cfg.loss_ctx_cls(cfg, kwargs)

    def run(self) -> Tensor:
        loss, _ = self.ctx.forward(self.hidden, self.weight, **self.given)
        loss.backward()
        return loss


@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize(
    "config",
    [
        {"divergence": "jsd", "temperature": 2.0, "t2_factor": True, "hard_weight": 0.5},
        {"divergence": "lk_hybrid"},
        {"divergence": "reverse_kl", "topk_mode": "full"},
        {"divergence": "jsd", "topk_mode": "tail"},
    ],
    ids=["jsd-hard", "lk", "topk-full", "topk-tail"],
)
def test_no_step_waits(config: dict[str, Any], plan: str) -> None:
    step = Step(plan=plan, chunk_size=SMALL.tokens // 3, **config)
    step.run()  # what a first call sets up may wait
    with no_sync():
        loss = step.run()
    assert bool(torch.isfinite(loss)) and loss.device.type == DEVICE.type


def test_both_logits_stay_within_the_budget() -> None:
    """Nothing the size of all logits: the peak stays below those of one model, with gradients and temporaries."""
    step = Step(divergence="reverse_kl", chunk_size=max(1, SMALL.tokens // 16))
    plan = step.ctx.explain(step.hidden, step.weight, **step.given)
    with PeakBytes() as peak:
        step.run()
    assert plan.logits_bytes * 4 < SMALL.tokens * SMALL.vocab * 4
    assert peak.bytes <= plan.peak_bytes + budgets.PEAK_SLACK_BYTES[DEVICE.type]
