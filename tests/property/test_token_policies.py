"""Losses of each token's own ratio, and the options of the KL penalty.

Contract: every loss with every value of its fields, and every kind, gradient and clamp of the penalty, is the oracle's
in loss and gradients, eager and chunked; a ratio is taken against the log-probs that `anchor` names; extreme ratios
stay finite. The laws between the formulas are in test_token_laws.py.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.oracle import grpo, head
from tests.property.steps import assert_step, contexts, gold_step, head_fields, rl_items, run_step
from tests.strategies import KL_TYPES, TOKEN_RATIO, StepCase, step_cases
from xloss import GRPOLossConfig, RLLossContextInputItem
from xloss.errors import MissingFieldError

RUNS: dict[str, dict[str, Any]] = {
    "eager": {"mode": "eager"},
    "one_pass": {"mode": "chunk", "plan": "one_pass"},
    "two_pass": {"mode": "chunk", "plan": "two_pass"},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
few = settings(max_examples=12)
GRADS = ("plain", "straight_through", "unbiased", "score_function")
LIMITS: dict[str, Any] = {
    "kl_clamp_in": st.sampled_from(("auto", None, 0.7)),
    "kl_clamp_out": st.sampled_from(("auto", None, 0.3)),
}


@every_run
@pytest.mark.parametrize("name", [*TOKEN_RATIO, "kimi"])
@few
@given(case=step_cases(max_batches=2), data=st.data())
def test_every_loss(run: dict[str, Any], name: str, case: StepCase, data: st.DataObject) -> None:
    drawn = TOKEN_RATIO.get(name, {"tau": (0.1, 1.0)})
    policy = {"loss_type": name} | {f: data.draw(st.sampled_from(values), f) for f, values in drawn.items()}
    cfg = GRPOLossConfig(policy_loss_cfg=policy, **head_fields(case), **run)
    got = run_step(cfg, rl_items(case), case)
    assert_step(got, gold_step(case, got, grpo.Objective(policy, head=case.head)), case)


@pytest.mark.parametrize("name", sorted(TOKEN_RATIO))
@few
@given(case=step_cases(max_batches=1))
def test_default_fields(name: str, case: StepCase) -> None:
    policy: dict[str, Any] = {"loss_type": name}
    cfg = GRPOLossConfig(policy_loss_cfg=policy | ({"anchor": "old"} if name == "rollout_is" else {}))
    case.head = head.Head()
    got = run_step(cfg, rl_items(case), case)
    assert_step(got, gold_step(case, got, grpo.Objective(policy, head=case.head)), case)


@every_run
@pytest.mark.parametrize("grad", GRADS)
@few
@given(case=step_cases(max_batches=2), kind=st.sampled_from(KL_TYPES), limits=st.fixed_dictionaries(LIMITS),
       through=st.booleans(), weighted=st.booleans())  # fmt: skip
def test_kl(
    run: dict[str, Any], grad: str, case: StepCase, kind: str, limits: dict[str, Any], through: bool, weighted: bool
) -> None:
    options = limits | {"kl_loss_grad": grad, "kl_clamp_straight_through": through and grad != "straight_through"}
    if weighted and grad in ("unbiased", "score_function"):
        options |= {"kl_clamp_weighted": True, "kl_clamp_straight_through": False}
    for batch in case.batches:  # k3 unclamped at 40 nats swamps everything else
        batch.ref, batch.old = batch.ref.clamp(-6, 2), batch.old.clamp(-6, 2)
    policy = {"loss_type": "reinforce"}
    fields = {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": kind}
    cfg = GRPOLossConfig(policy_loss_cfg=policy, **fields, **options, **head_fields(case), **run)
    got = run_step(cfg, rl_items(case), case)
    assert_step(got, gold_step(case, got, grpo.Objective(policy, 0.3, kind, 0.0, case.head, options)), case)


# -- anchors and inputs ------------------------------------------------------------------------------------------------


def with_rollout(case: StepCase, **fields: Any) -> list[RLLossContextInputItem]:
    """Items whose `rollout_logprobs` are the case's `old`."""
    items = rl_items(case)
    for item, batch in zip(items, case.batches, strict=True):
        item.rollout_logprobs, item.old_logprobs = batch.old, fields.get("old")
    return items


@every_run
@given(case=step_cases(max_batches=1), name=st.sampled_from(("ppo", "cispo", "rollout_is", "dppo_tv")))
def test_anchor(run: dict[str, Any], case: StepCase, name: str) -> None:
    """A ratio to the sampler is that ratio, whatever the trainer's log-probs say; metrics follow it."""
    wrong = torch.full_like(case.batches[0].advantages, -3.0)
    items = with_rollout(case, old=wrong)
    ours = GRPOLossConfig(policy_loss_cfg={"loss_type": name, "anchor": "rollout"}, **head_fields(case), **run)
    against_old = GRPOLossConfig(policy_loss_cfg={"loss_type": name, "anchor": "old"}, **head_fields(case), **run)
    a, b = run_step(ours, items, case), run_step(against_old, rl_items(case), case)
    assert torch.equal(a.total, b.total) and torch.equal(a.weight, b.weight)
    for key, metric in b.infos[0].metrics.items():
        assert torch.equal(metric.result(), a.infos[0].metrics[key].result()), key


@every_run
@given(case=step_cases(max_batches=1))
def test_kl_ratio_to_the_sampler(run: dict[str, Any], case: StepCase) -> None:
    batch = case.batches[0]
    batch.ref, batch.old = batch.ref.clamp(-6, 2), batch.old.clamp(-6, 2)
    fields = {"use_kl_loss": True, "kl_loss_coef": 0.3, "kl_loss_type": "k3", "kl_loss_grad": "unbiased"}
    policy = {"loss_type": "reinforce"}
    cfg = GRPOLossConfig(policy_loss_cfg=policy, kl_ratio_anchor="rollout", **fields, **head_fields(case), **run)
    got = run_step(cfg, with_rollout(case, old=torch.zeros_like(batch.advantages)), case)
    options = {"kl_loss_grad": "unbiased"}
    assert_step(got, gold_step(case, got, grpo.Objective(policy, 0.3, "k3", 0.0, case.head, options)), case)


@every_run
@given(case=step_cases(max_batches=1, weighted=False))
def test_ref_kl(run: dict[str, Any], case: StepCase) -> None:
    """The advantage is ref - lp and needs none; the oracle takes ref in the place of the advantage."""
    batch = case.batches[0]
    items = with_rollout(case)
    items[0].advantages = torch.zeros_like(batch.advantages)
    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "ref_kl", "anchor": "rollout"}, **head_fields(case), **run)
    got = run_step(cfg, items, case)
    case.batches = [replace(batch, advantages=batch.ref)]
    gold = gold_step(case, got, grpo.Objective({"loss_type": "ref_kl"}, head=case.head))
    assert_step(got, gold, case)


@pytest.mark.parametrize(
    ("fields", "missing"),
    [
        ({"policy_loss_cfg": {"loss_type": "rollout_is"}}, "rollout_logprobs"),
        ({"policy_loss_cfg": {"loss_type": "ref_kl"}}, "ref_logprobs"),
        (
            {
                "policy_loss_cfg": {"loss_type": "reinforce"},
                "use_kl_loss": True,
                "kl_loss_type": "k3",
                "kl_loss_grad": "unbiased",
                "kl_ratio_anchor": "rollout",
            },
            "rollout_logprobs",
        ),
    ],
)
def test_what_a_loss_needs_is_asked_for(fields: dict[str, Any], missing: str) -> None:
    labels, zeros = torch.zeros(1, 3, dtype=torch.int64), torch.zeros(1, 3)
    ref = None if missing == "ref_logprobs" else zeros
    item = RLLossContextInputItem(shifted_labels=labels, advantages=zeros, old_logprobs=zeros, ref_logprobs=ref)
    (ctx,) = contexts(GRPOLossConfig(**fields), [item])
    with pytest.raises(MissingFieldError, match=missing):
        ctx.forward(torch.zeros(1, 3, 2), torch.zeros(4, 2))


def test_extreme_ratios_stay_finite() -> None:
    """Log-ratios of +-200 in float32, where an unclamped ratio is infinite."""
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, 6, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    labels = torch.tensor([[0, 8, 3, -100, 2, 1]])
    far = torch.tensor([[200.0, -200.0, 200.0, torch.nan, -200.0, -3.0]])
    item = RLLossContextInputItem(
        shifted_labels=labels,
        advantages=torch.tensor([[1.0, 1.0, -1.0, torch.inf, -1.0, 0.5]]),
        old_logprobs=far,
        rollout_logprobs=far,
        ref_logprobs=far,
    )
    for name in (*TOKEN_RATIO, "kimi", "ref_kl"):
        clamp = {"log_ratio_clamp": 20.0} if name in ("importance_sampling", "ref_kl") else {}
        (ctx,) = contexts(GRPOLossConfig(policy_loss_cfg={"loss_type": name, **clamp}, mode="chunk"), [item])
        loss, _ = ctx.forward(hidden, weight)
        for grad in torch.autograd.grad(loss, (hidden, weight)):
            assert bool(torch.isfinite(grad).all()), name
        assert bool(torch.isfinite(loss)), name
