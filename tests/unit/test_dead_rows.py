"""What does not matter is not computed, counted in multiply-adds and in allocations, not in seconds.

Contract: with H V multiply-adds a row, a step costs live + 2 grad rows: ignored and zero-weight tokens reach no
product, tokens whose gradient is known to be 0 reach only the forward one, unless a KL, entropy or pull term gives
them one. A frozen head or frozen hidden states save their product and its buffer. `no_grad` is one product a chunk.
In chunk mode nothing as large as [T, V] ever exists. Leaving rows out changes no number: see test_losses for that.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.oracle import grpo, head
from tests.unit.dispatch import Recorder
from xloss import (
    BaseLossContextInputItem,
    CELossConfig,
    CELossContextInputItem,
    GRPOLossConfig,
    LogProbConfig,
    RLLossContextInputItem,
    linear_logprobs,
)

T, H, V = 48, 11, 37
ROW = H * V  # multiply-adds of one row in one product
VANILLA = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28}
RUNS = {
    "one_pass": {"mode": "chunk", "plan": "one_pass", "chunk_size": 7},
    "two_pass": {"mode": "chunk", "plan": "two_pass", "chunk_size": 7},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)


def tensors(requires: tuple[bool, bool] = (True, True)) -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    hidden, weight = torch.randn(1, T, H, dtype=torch.float64), torch.randn(V, H, dtype=torch.float64)
    return hidden.requires_grad_(requires[0]), weight.requires_grad_(requires[1])


def labels(dead: int) -> Tensor:
    """T labels, `dead` of them ignored, scattered."""
    torch.manual_seed(1)
    y = torch.randint(0, V, (1, T))
    y[0, torch.randperm(T)[:dead]] = -100
    return y


def item(dead: int = 0, zero: int = 0, **fields: Any) -> RLLossContextInputItem:
    """A GRPO item; `zero` of the live tokens have advantage 0."""
    y = labels(dead)
    advantages = torch.randn(1, T)
    live = (y[0] != -100).nonzero().flatten()
    advantages[0, live[torch.randperm(live.numel())[:zero]]] = 0
    return RLLossContextInputItem(shifted_labels=y, advantages=advantages, **fields)


def context(cfg: Any, one: Any) -> Any:
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([one], cfg)
    return cfg.loss_ctx_cls(cfg, kwargs)


def cost(ctx: Any, requires: tuple[bool, bool] = (True, True)) -> int:
    """Multiply-adds of forward and backward, in rows."""
    hidden, weight = tensors(requires)
    with Recorder() as ran:
        loss, _ = ctx.forward(hidden, weight)
        if loss.requires_grad:
            loss.backward()
    assert ran.multiplied % ROW == 0, "a product of another shape than the head's"
    return ran.multiplied // ROW


def grpo_cfg(policy: dict[str, Any] = VANILLA, **fields: Any) -> GRPOLossConfig:
    return GRPOLossConfig(policy_loss_cfg=policy, **fields)


@every_run
@pytest.mark.parametrize("dead", [0, 13, T - 1, T])
def test_ignored_rows_reach_no_product(run: dict[str, Any], dead: int) -> None:
    live = T - dead
    assert cost(context(CELossConfig(**run), CELossContextInputItem(shifted_labels=labels(dead)))) == 3 * live
    assert cost(context(grpo_cfg(**run), item(dead))) == 3 * live


@every_run
def test_zero_weights_reach_no_product(run: dict[str, Any]) -> None:
    """Tokens of weight 0 in cross-entropy: out altogether."""
    weights = torch.ones(1, T)
    weights[0, :20] = 0
    one = CELossContextInputItem(shifted_labels=labels(0), token_weight=weights)
    assert cost(context(CELossConfig(**run), one)) == 3 * (T - 20)


@every_run
def test_zero_advantages_reach_the_forward_product_only(run: dict[str, Any]) -> None:
    """30 of 40 live tokens have advantage 0: all have log-probs and metrics, 10 a backward."""
    one = item(dead=8, zero=30)
    for policy in (VANILLA, {"loss_type": "cispo"}, {"loss_type": "importance_sampling"}, {"loss_type": "reinforce"}):
        assert cost(context(grpo_cfg(policy, **run), one)) == 40 + 2 * 10
    assert cost(context(grpo_cfg(skip_zero_grad_rows=True, **run), one)) == 3 * 10


@every_run
def test_zero_advantages_with_another_gradient_stay(run: dict[str, Any]) -> None:
    """A KL or entropy term, or the pull of dro, gives such tokens a gradient."""
    ref = torch.zeros(1, T)
    old = torch.full((1, T), -9.0)
    assert cost(context(grpo_cfg({"loss_type": "dro"}, **run), item(8, 30, old_logprobs=old))) == 3 * 40
    assert cost(context(grpo_cfg(entropy_coef=0.1, **run), item(8, 30))) == 3 * 40
    kl = grpo_cfg(use_kl_loss=True, kl_loss_type="k2", **run)  # k3 clamps, and clamped rows leave two-pass
    assert cost(context(kl, item(8, 30, ref_logprobs=ref))) == 3 * 40


@every_run
def test_zero_importance_weights(run: dict[str, Any]) -> None:
    """A policy weight of 0 (rejected samples) is out altogether, unless a KL term holds the token."""
    weights = torch.ones(1, T)
    weights[0, :16] = 0
    assert cost(context(grpo_cfg(**run), item(is_weights=weights))) == 3 * (T - 16)
    kl = grpo_cfg(use_kl_loss=True, kl_loss_type="k1", **run)
    assert cost(context(kl, item(is_weights=weights, ref_logprobs=torch.zeros(1, T)))) == 3 * T


def test_metrics_are_of_all_live_tokens() -> None:
    """With and without leaving rows out of backward; skip_zero_grad_rows says that it drops them."""
    hidden, weight = tensors()
    one = item(dead=8, zero=30, old_logprobs=torch.randn(1, T, dtype=torch.float64) - 3)
    stats = head.token_stats(hidden, weight, one.shifted_labels)
    batch = grpo.Batch(one.shifted_labels, one.advantages, one.old_logprobs)
    want = grpo.metrics([stats.logprobs], [batch], 0.2, 0.28)
    for run in (*RUNS.values(), {"mode": "eager"}):
        got = context(grpo_cfg(**run), one).forward(hidden, weight)[1].metrics
        for name, value in want.items():
            exact = torch.tensor(value, dtype=torch.float64)
            budgets.assert_rounding(name, got[name].result().double(), exact, 20.0, 1.0)
    skipping = context(grpo_cfg(skip_zero_grad_rows=True, mode="chunk"), one).forward(hidden, weight)[1].metrics
    assert int(skipping["num_tokens"].result()) == 10


def test_clipped_rows_leave_the_second_pass() -> None:
    """Two-pass sees the adjoints before the backward: tokens on the flat side of the clip are left out."""
    hidden, weight = tensors()
    one = item(dead=8)
    now = head.token_stats(hidden, weight, one.shifted_labels).logprobs.detach()
    one.old_logprobs = (
        now - torch.sign(one.advantages) * 0.7
    )  # ratio e^0.7 where A > 0, e^-0.7 where A < 0: all clipped
    one.old_logprobs[0, :20] = now[0, :20]
    alive = int((one.shifted_labels[0, :20] != -100).sum())
    assert cost(context(grpo_cfg(**RUNS["two_pass"]), one)) == 40 + 2 * alive
    recomputing = {"mode": "chunk", "plan": "two_pass", "chunk_size": 7, "logits_budget": 1}
    assert cost(context(grpo_cfg(**recomputing), one)) == 40 + 3 * alive


@every_run
@pytest.mark.parametrize(("requires", "rows"), [((True, False), 2), ((False, True), 2), ((True, True), 3)])
def test_frozen_sides_save_their_product(run: dict[str, Any], requires: tuple[bool, bool], rows: int) -> None:
    assert cost(context(grpo_cfg(**run), item(dead=8)), requires) == rows * 40


@every_run
def test_frozen_head_has_no_buffer_of_its_size(run: dict[str, Any]) -> None:
    """Nor a frozen trunk one of its own: no [V, H], no [T, H] beyond views of what came in."""
    for requires, forbidden in (((True, False), (V, H)), ((False, True), (T, H))):
        hidden, weight = tensors(requires)
        with Recorder() as ran:
            context(grpo_cfg(**run), item()).forward(hidden, weight)[0].backward()
        made = ran.shapes(known=(hidden, weight))
        assert forbidden not in made
        assert forbidden[::-1] not in made


@every_run
def test_nothing_as_large_as_the_logits(run: dict[str, Any]) -> None:
    """Chunks of 7 of 48 tokens: kept for backward or not, no single tensor reaches [T, V]."""
    hidden, weight = tensors()
    for cfg in (grpo_cfg(entropy_coef=0.1, return_entropy=True, **run), CELossConfig(label_smoothing=0.1, **run)):
        one = item() if isinstance(cfg, GRPOLossConfig) else CELossContextInputItem(shifted_labels=labels(0))
        with Recorder() as ran:
            context(cfg, one).forward(hidden, weight)[0].backward()
        assert 0 < ran.largest(known=(hidden, weight)) <= max(7 * V, T * H, V * H) < T * V


def test_a_byte_budget_is_kept() -> None:
    """logits_budget in bytes bounds the chunk: 10 rows of float64 logits and no more."""
    hidden, weight = tensors()
    with Recorder() as ran, torch.no_grad():
        linear_logprobs(hidden, weight, labels(0), mode="chunk", logits_budget=10 * V * 8)
    assert max(m for m, _, _ in ran.products) <= 10


@pytest.mark.parametrize("chunk_size", [None, 7, T, 1])
def test_no_grad_is_one_product_a_chunk(chunk_size: int | None) -> None:
    """Forward-only: old and reference log-probs, evaluation; ignored rows are left out here too."""
    hidden, weight = tensors()
    logprobs = context(LogProbConfig(mode="chunk", chunk_size=chunk_size),
                       BaseLossContextInputItem(shifted_labels=labels(8)))  # fmt: skip
    policy = context(grpo_cfg(mode="chunk", chunk_size=chunk_size), item(dead=8))
    for ctx in (logprobs, policy):
        with Recorder() as ran, torch.no_grad():
            info = ctx.forward(hidden, weight)[1]
        assert ran.multiplied == 40 * ROW
        assert len(ran.products) == info.plan.num_chunks == -(-40 // (chunk_size or 40))
    with Recorder() as ran:  # grad enabled, nothing to train
        policy.forward(hidden.detach(), weight.detach())
    assert ran.multiplied == 40 * ROW


@pytest.mark.parametrize("budget", [1, 1 << 30], ids=["recompute", "keep"])
def test_linear_logprobs_cost(budget: int) -> None:
    """3 products a live row while the logits fit the budget, 4 beyond."""
    hidden, weight = tensors()
    with Recorder() as ran:
        stats = linear_logprobs(hidden, weight, labels(8), mode="chunk", chunk_size=7, logits_budget=budget)
        stats.logprobs.sum().backward()
    assert ran.multiplied == (4 if budget == 1 else 3) * 40 * ROW


@every_run
def test_explain_counts_what_runs(run: dict[str, Any]) -> None:
    """The plan's flops and rows are those of the step."""
    hidden, weight = tensors()
    ctx = context(grpo_cfg(**run), item(dead=8, zero=30))
    with Recorder() as ran:
        plan = ctx.explain(hidden, weight)
    assert ran.products == []
    assert (plan.num_rows, plan.num_live, plan.num_grad) == (T, 40, 10)
    assert plan.flops == 2 * ROW * cost(ctx)


def test_rows_follow_the_tensors() -> None:
    """Rows counted once must not outlive the tensors they were counted for."""
    ctx = context(grpo_cfg(**RUNS["one_pass"]), item(dead=8, zero=30))
    assert cost(ctx) == 40 + 2 * 10
    ctx.loss_kwargs.advantages.fill_(1.0)
    assert cost(ctx) == 3 * 40
    ctx.loss_kwargs.advantages = torch.zeros(1, T)
    assert cost(ctx) == 40
    ctx.loss_kwargs.policy_loss_weight = None
    for _ in range(50):  # a new tensor may well get the address of an old one
        ctx.loss_kwargs.policy_loss_weight = torch.zeros(1, T)
        assert cost(ctx) == 0
        ctx.loss_kwargs.policy_loss_weight = None
        ctx.loss_kwargs.policy_loss_weight = torch.full((1, T), 0.1)
        ctx.loss_kwargs.advantages = torch.ones(1, T)
        assert cost(ctx) == 3 * 40


def test_rows_belong_to_a_config_too() -> None:
    """The same kwargs under another policy loss: dro gives zero-advantage tokens a gradient, reinforce does not."""
    cfg, other = grpo_cfg({"loss_type": "reinforce"}, mode="chunk"), grpo_cfg({"loss_type": "dro"}, mode="chunk")
    one = item(dead=8, zero=30, old_logprobs=torch.full((1, T), -9.0))
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([one], cfg)
    assert cost(cfg.loss_ctx_cls(cfg, kwargs)) == 40 + 2 * 10
    assert cost(cfg.loss_ctx_cls(other, kwargs)) == 3 * 40
    skipping = cfg.model_copy(update={"skip_zero_grad_rows": True})
    assert cost(cfg.loss_ctx_cls(skipping, kwargs)) == 3 * 10
