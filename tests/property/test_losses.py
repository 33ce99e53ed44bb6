"""The built-in losses against the oracle, in float64.

Contract: for any micro-batches, packs, masks, head options and chunk sizes, in every mode and plan, the loss of every
micro-batch and the gradients of their sum with respect to hidden states, weight and bias are the oracle's to
rounding, whatever the upstream factor. What stands at a masked token, NaN included, changes nothing.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import budgets
from tests.oracle import grpo, head
from tests.property.helpers import leaf
from tests.property.steps import (
    assert_step,
    calibrated,
    ce_items,
    contexts,
    gold_step,
    head_fields,
    max_logit,
    rl_items,
    run_step,
)
from tests.strategies import KL_TYPES, StepCase, policies, step_cases
from xloss import (
    BaseLossContextInputItem,
    CELossConfig,
    GRPOLossConfig,
    LogProbConfig,
    RLLossContextInputItem,
    finalize_metrics,
)

RUNS = {
    "eager": {"mode": "eager"},
    "one_pass": {"mode": "chunk", "plan": "one_pass"},
    "two_pass": {"mode": "chunk", "plan": "two_pass"},
    "two_pass-recompute": {"mode": "chunk", "plan": "two_pass", "logits_budget": 1},
    "auto": {},
}
every_run = pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
upstreams = st.sampled_from((1.0, 1.0, -3.5, 65536.0))


def _recomputes(run: dict[str, Any], case: StepCase) -> dict[str, Any]:
    """A budget of one byte needs a chunk size; the others take the drawn one."""
    fields = head_fields(case) | run
    if "logits_budget" in run:
        fields["chunk_size"] = case.chunk_size or 2
    return fields


@every_run
@given(
    case=step_cases(),
    reduction=st.sampled_from(("token", "sample", "square")),
    z_loss_coef=st.sampled_from((0.0, 0.3)),
    label_smoothing=st.sampled_from((0.0, 0.1)),
    upstream=upstreams,
)
def test_ce(
    run: dict[str, Any],
    case: StepCase,
    reduction: str,
    z_loss_coef: float,
    label_smoothing: float,
    upstream: float,
) -> None:
    if case.cu_seq_lens is None and any(b.labels.dim() == 1 or b.labels.shape[0] == 1 for b in case.batches):
        reduction = "token"  # one row without bounds: what a sample is, nobody knows (an error, see test_errors)
    options = {"z_loss_coef": z_loss_coef, "label_smoothing": label_smoothing}
    cfg = CELossConfig(loss_reduction=reduction, **options, **_recomputes(run, case))
    got = run_step(cfg, ce_items(case), case, upstream)
    assert_step(got, gold_step(case, got, reduction=reduction, **options), case, upstream)


@every_run
@given(
    case=step_cases(),
    policy=policies(),
    kl_type=st.sampled_from((None, *KL_TYPES)),
    entropy_coef=st.sampled_from((0.0, 0.01)),
    upstream=upstreams,
)
def test_policy_losses(
    run: dict[str, Any],
    case: StepCase,
    policy: dict[str, Any],
    kl_type: str | None,
    entropy_coef: float,
    upstream: float,
) -> None:
    cfg = GRPOLossConfig(
        policy_loss_cfg=policy,
        use_kl_loss=kl_type is not None,
        kl_loss_coef=0.2,
        kl_loss_type=kl_type,
        entropy_coef=entropy_coef,
        **_recomputes(run, case),
    )
    objective = grpo.Objective(policy, 0.2 if kl_type else 0.0, kl_type, entropy_coef, case.head)
    got = run_step(cfg, rl_items(case), case, upstream)
    assert_step(got, gold_step(case, got, objective), case, upstream)


@every_run
@given(case=step_cases(), policy=policies())
def test_on_policy(run: dict[str, Any], case: StepCase, policy: dict[str, Any]) -> None:
    """old_logprobs=None: the ratio is 1 and has a gradient."""
    for batch in case.batches:
        batch.old = None
    cfg = GRPOLossConfig(policy_loss_cfg=policy, **_recomputes(run, case))
    got = run_step(cfg, rl_items(case), case)
    assert_step(got, gold_step(case, got, grpo.Objective(policy, head=case.head)), case)


@every_run
@given(case=step_cases(), policy=policies(), skip=st.booleans())
def test_what_is_masked_does_not_matter(
    run: dict[str, Any], case: StepCase, policy: dict[str, Any], skip: bool
) -> None:
    """NaN and infinities in the hidden states, advantages, log-probs and weights of ignored tokens."""
    cfg = GRPOLossConfig(
        policy_loss_cfg=policy,
        use_kl_loss=True,
        kl_loss_type="k3",
        entropy_coef=0.1,
        skip_zero_grad_rows=skip,
        **_recomputes(run, case),
    )
    clean = run_step(cfg, rl_items(case), case)
    bad = replace(case, hidden=[_poisoned(h, b.labels) for h, b in zip(case.hidden, case.batches, strict=True)])
    bad.batches = [
        replace(
            b,
            **{n: _poisoned(x, b.labels) for n, x in vars(b).items() if n != "labels" and x is not None},
        )
        for b in case.batches
    ]
    dirty = run_step(cfg, rl_items(bad), bad)
    assert torch.equal(torch.stack(dirty.losses), torch.stack(clean.losses))
    for ours, theirs in zip([*dirty.hidden, dirty.weight], [*clean.hidden, clean.weight], strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(dirty.infos, clean.infos, strict=True):
        for name, metric in ours.metrics.items():
            assert torch.equal(metric.result(), theirs.metrics[name].result()), name


def _poisoned(x: Tensor, labels: Tensor) -> Tensor:
    """A copy that is NaN, inf or -inf in turn at ignored tokens."""
    bad = x.clone()
    dead = (labels == -100).nonzero()
    for i, place in enumerate(dead):
        bad[tuple(place)] = (torch.nan, torch.inf, -torch.inf)[i % 3]
    return bad


@every_run
@given(case=step_cases(), spread=st.booleans())
def test_metrics(run: dict[str, Any], case: StepCase, spread: bool) -> None:
    """Merged over micro-batches they are the oracle's over all tokens, zero-advantage tokens included."""
    policy = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.28}
    cfg = GRPOLossConfig(policy_loss_cfg=policy, return_entropy=spread, **_recomputes(run, case))
    got = run_step(cfg, rl_items(case), case)
    gold = gold_step(case, got, grpo.Objective(policy, head=case.head))
    assert gold.stats is not None
    want = grpo.metrics([s.logprobs for s in gold.stats], case.batches, 0.2, 0.28)
    results = finalize_metrics([info.metrics for info in got.infos])
    for name, value in want.items():
        budgets.assert_rounding(
            name, results[name].double(), torch.tensor(value, dtype=torch.float64), gold.max_logit + 20, 1.0
        )
    if spread:
        mean = sum(float(s.entropy.detach().sum()) for s in gold.stats) / max(want["num_tokens"], 1)
        budgets.assert_rounding(
            "entropy", results["entropy"].double(), torch.tensor(mean, dtype=torch.float64), gold.max_logit, 1.0
        )


@every_run
@given(case=step_cases())
def test_info(run: dict[str, Any], case: StepCase) -> None:
    """Per-token statistics in the layout of the labels, token losses that add up to the loss, logits in eager mode."""
    policy = {"loss_type": "reinforce"}
    cfg = GRPOLossConfig(policy_loss_cfg=policy, return_entropy=True, **_recomputes(run, case))
    got = run_step(cfg, rl_items(case), case)
    gold = gold_step(case, got, grpo.Objective(policy, head=case.head))
    assert gold.stats is not None
    for info, stats, loss, batch in zip(got.infos, gold.stats, got.losses, case.batches, strict=True):
        counted = batch.labels != -100
        if batch.is_weights is not None:
            counted = counted & (batch.is_weights != 0)
        for name in ("logprobs", "entropy", "lse"):
            ours, theirs = getattr(info, name), getattr(stats, name)
            assert ours.shape == batch.labels.shape
            budgets.assert_rounding(name, ours * counted, theirs * counted, gold.max_logit, ours.numel() ** 0.5)
        budgets.assert_rounding("token_loss", info.token_loss.sum(), loss, gold.max_logit, gold.loss_scale)
        assert (info.logits is None) == (cfg.mode != "eager")
        logits, extra = info
        assert logits is info.logits
        assert torch.equal(extra["local_base_loss"], loss.detach())


@every_run
@given(case=step_cases())
def test_logprob_context(run: dict[str, Any], case: StepCase) -> None:
    if run.get("plan") == "one_pass":
        run = {"mode": "chunk"}
    cfg = LogProbConfig(return_entropy=True, **_recomputes(run, case))
    items = [BaseLossContextInputItem(shifted_labels=b.labels) for b in case.batches]
    for ctx, hidden, batch in zip(contexts(cfg, items), case.hidden, case.batches, strict=True):
        want = head.token_stats(hidden, case.weight, batch.labels, case.bias, case.head)
        with torch.no_grad():
            logprobs, info = ctx.forward(hidden, case.weight, case.bias)
        for ours, theirs in ((logprobs, want.logprobs), (info.entropy, want.entropy), (info.lse, want.lse)):
            budgets.assert_rounding("statistic", ours, theirs, max_logit(case), theirs.numel() ** 0.5)


@given(case=step_cases(max_batches=1), policy=policies())
def test_per_token_temperature(case: StepCase, policy: dict[str, Any]) -> None:
    """A temperature per token through the item, against the same one in the oracle's head."""
    g = torch.Generator().manual_seed(case.seed)
    batch = case.batches[0]
    case.head.temperature = 0.5 + torch.rand(batch.labels.shape, generator=g, dtype=torch.float64)
    leaves = [leaf(case.hidden[0]), leaf(case.weight), leaf(case.bias)]
    item = RLLossContextInputItem(
        shifted_labels=batch.labels,
        advantages=batch.advantages,
        old_logprobs=batch.old,
        is_weights=batch.is_weights,
        temperature=case.head.temperature,
    )
    cfg = GRPOLossConfig(
        policy_loss_cfg=policy,
        softcap=case.head.softcap,
        logit_scale=case.head.logit_scale,
        chunk_size=case.chunk_size,
        mode="chunk",
    )
    (ctx,) = contexts(cfg, [item])
    loss, _ = ctx.forward(*leaves)
    objective = grpo.Objective(policy, head=case.head)
    (weights,) = grpo.step_weights([batch], objective)
    taken = calibrated("policy", ctx.loss_kwargs.policy_loss_weight, weights.policy)
    want = grpo.loss(leaves[0], leaves[1], batch, replace(weights, policy=taken), objective, leaves[2])
    present = [x for x in leaves if x is not None]
    gold = torch.autograd.grad(want, present, allow_unused=True)
    scale = float(want.detach().abs()) + 1.0
    budgets.assert_rounding("loss", loss, want, 100.0, scale)
    for ours, theirs in zip(torch.autograd.grad(loss, present), gold, strict=True):
        want_grad = torch.zeros_like(ours) if theirs is None else theirs
        budgets.assert_rounding("gradient", ours, want_grad, 100.0, scale)
