"""Rows that nobody counted, as on CUDA where counting would wait for the device.

Contract: when ignored tokens go through the head because their number is not known on the host, log-probs, losses,
gradients and metrics are those of a run that left them out, whatever finite hidden states and whatever NaN advantages
or log-probs stand there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings

from tests import budgets
from tests.oracle import grpo
from tests.property.helpers import ALL_STATISTICS, assert_grads, assert_stats, call, gold_for, leaf, upstream_for, weigh
from tests.property.steps import assert_step, ce_items, gold_step, head_fields, rl_items, run_step
from tests.strategies import HeadCase, StepCase, head_cases, policies, step_cases
from xloss import BaseLossContext, CELossConfig, GRPOLossConfig, finalize_metrics
from xloss.head import engine, linear_logprobs
from xloss.head.options import LiveRows

PLANS = {"one_pass": {"plan": "one_pass"}, "two_pass": {"plan": "two_pass"}}
every_plan = pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
once_patched = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])  # the same patch for all examples


@pytest.fixture
def uncounted(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the engine does on CUDA: all rows live, none left out of a backward by its adjoints."""

    def everything(self: BaseLossContext[Any]) -> LiveRows:
        return LiveRows.all(self.loss_kwargs.shifted_labels.numel(), counted=False)

    monkeypatch.setattr(BaseLossContext, "live_rows", everything)
    monkeypatch.setattr(linear_logprobs, "live_rows", lambda labels, _: LiveRows.all(labels.shape[0], counted=False))
    monkeypatch.setattr(engine, "_nonzero_rows", lambda *_: None)


@pytest.mark.usefixtures("uncounted")
@once_patched
@given(case=head_cases())
def test_linear_logprobs(case: HeadCase) -> None:
    upstream = upstream_for(case)
    gold = gold_for(case, upstream)
    inputs = [leaf(case.hidden), leaf(case.weight), leaf(case.bias)]
    stats = call(case, *inputs, mode="chunk", **ALL_STATISTICS)
    got = torch.autograd.grad(weigh(stats, upstream), [x for x in inputs if x is not None])
    assert_stats(stats, gold)
    assert_grads([*got, None][:3] if case.bias is None else list(got), gold)
    assert bool((stats.logprobs[case.labels == case.head.ignore_index] == 0).all())


def _masked_with_nan(case: StepCase) -> StepCase:
    """NaN advantages, log-probs and weights at ignored tokens."""
    batches = [
        replace(
            b,
            **{
                n: x.masked_fill(b.labels == -100, torch.nan)
                for n, x in vars(b).items()
                if n != "labels" and x is not None
            },
        )
        for b in case.batches
    ]
    return replace(case, batches=batches)


@pytest.mark.usefixtures("uncounted")
@every_plan
@once_patched
@given(case=step_cases(), policy=policies())
def test_policy_losses(plan: dict[str, Any], case: StepCase, policy: dict[str, Any]) -> None:
    cfg = GRPOLossConfig(
        policy_loss_cfg=policy, use_kl_loss=True, kl_loss_coef=0.1, kl_loss_type="k3", entropy_coef=0.1, mode="chunk",
        **plan, **head_fields(case),
    )  # fmt: skip
    got = run_step(cfg, rl_items(_masked_with_nan(case)), case)
    assert_step(got, gold_step(case, got, grpo.Objective(policy, 0.1, "k3", 0.1, case.head)), case)


@pytest.mark.usefixtures("uncounted")
@every_plan
@once_patched
@given(case=step_cases())
def test_ce(plan: dict[str, Any], case: StepCase) -> None:
    cfg = CELossConfig(z_loss_coef=0.1, label_smoothing=0.1, mode="chunk", **plan, **head_fields(case))
    got = run_step(cfg, ce_items(case), case)
    assert_step(got, gold_step(case, got, z_loss_coef=0.1, label_smoothing=0.1), case)


@pytest.mark.usefixtures("uncounted")
@every_plan
@once_patched
@given(case=step_cases())
def test_metrics(plan: dict[str, Any], case: StepCase) -> None:
    for batch in case.batches:
        batch.is_weights = None  # a token of weight 0 may be counted here
    policy = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28}
    cfg = GRPOLossConfig(policy_loss_cfg=policy, mode="chunk", **plan, **head_fields(case))
    got = run_step(cfg, rl_items(_masked_with_nan(case)), case)
    gold = gold_step(case, got, grpo.Objective(policy, head=case.head))
    assert gold.stats is not None
    want = grpo.metrics([s.logprobs for s in gold.stats], case.batches, 0.2, 0.28)
    results = finalize_metrics([info.metrics for info in got.infos])
    for name, value in want.items():
        exact = torch.tensor(value, dtype=torch.float64)
        budgets.assert_rounding(name, results[name].double(), exact, gold.max_logit + 20, 1.0)
