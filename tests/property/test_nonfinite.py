"""Contract: NaN and inf at ignored tokens change nothing, bit for bit, in any policy loss; at tokens of the loss they
are refused by name, or their tokens are left out, counted, and stay in the denominators.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.property.correction_problem import POISON, problem
from tests.property.test_rollout_correction import RUNS, assert_same, step
from xloss import GRPOLossConfig, GRPOLossContext, OrealLossConfig, RLLossContextInputItem
from xloss.errors import NonFiniteError
from xloss.losses.policies import policy_losses

FIELDS = ("advantages", "old_logprobs", "rollout_logprobs", "ref_logprobs", "is_weights", "rewards")
ALL_TERMS = {"use_kl_loss": True, "kl_loss_type": "k3", "entropy_coef": 0.01, "positive_nll_coef": 0.1}
SEQUENCES = {"level": "sequence", "high": 1.5, "veto_low": 0.2}


def smallest(name: str) -> dict[str, Any]:
    """A registered loss with its required numbers."""
    required = {n: 0.2 for n, info in policy_losses()[name].model_fields.items() if info.is_required()}
    return {"loss_type": name, **required}


@pytest.mark.parametrize("name", policy_losses())
@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_ignored_tokens_change_nothing(name: str, mode: str) -> None:
    policy = policy_losses()[name](**smallest(name))
    correction: dict[str, Any] | None = SEQUENCES
    if policy.folds_is_weights:
        correction = None
    elif "rollout_logprobs" in policy.needs or policy.ratio_anchor() == "rollout":  # weighs by the sampler itself
        correction = {"level": None, "veto_low": 0.2}
    cfg = GRPOLossConfig(policy_loss_cfg=policy, rollout_correction=correction, mode=mode, chunk_size=4, **ALL_TERMS)
    clean, dirty = problem(0, poison=False), problem(0)
    groups = {"group_ids": None}
    if "groups" in policy_losses()[name].needs:
        groups = {}
        for case in (clean, dirty):
            for b, (f, bounds) in enumerate(zip(case.fields, case.cu_seq_lens, strict=True)):
                f["group_ids"] = torch.full_like(case.labels[b], b)
                f["group_ids"][0, int(bounds[-2]) :] += 2
    for h, y in zip(dirty.hidden, dirty.labels, strict=True):
        h[y == -100] = torch.nan
    want, got = step(clean, cfg, **groups), step(dirty, cfg, **groups)
    for b, y in enumerate(dirty.labels):
        assert bool(torch.isfinite(got[1][b]).all())
        assert not got[1][b][y == -100].any(), "an ignored token has no gradient"
    for ours, theirs in zip(got[0] + got[1], want[0] + want[1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("old", ["given", "current"])
@pytest.mark.parametrize("config", [GRPOLossConfig, OrealLossConfig])
def test_ignored_tokens_change_nothing_in_other_objectives(config: Any, old: str) -> None:
    terms = dict(ALL_TERMS, positive_nll_coef=0.0)
    cfg = config(policy_loss_cfg=smallest("vanilla"), rollout_correction=SEQUENCES, nonfinite="drop", **terms)
    changed = {} if old == "given" else {"old_logprobs": None}
    want, got = step(problem(1, poison=False), cfg, **changed), step(problem(1), cfg, **changed)
    for ours, theirs in zip(got[0] + got[1], want[0] + want[1], strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("value", POISON)
def test_raise_names_the_field_and_the_count(field: str, value: float) -> None:
    case = problem(2)
    live = (case.labels[1] != -100).nonzero()[:2, 1]
    case.fields[1][field][0, live] = value
    kind = "2 NaN, 0 inf" if value != value else "0 NaN, 2 inf"
    with pytest.raises(NonFiniteError, match=rf"^\[non-finite\] {field} of micro-batch 1 .* at 2 of its .*{kind}"):
        step(case, GRPOLossConfig(policy_loss_cfg=smallest("vanilla")))


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("run", RUNS.values(), ids=RUNS)
@pytest.mark.parametrize("correction", [None, {"high": 1.5}, SEQUENCES], ids=["none", "token", "sequence"])
def test_drop_leaves_tokens_out_and_keeps_the_denominator(field: str, run: Any, correction: Any) -> None:
    """The same as ignoring those tokens, but for the denominator."""
    terms = dict(ALL_TERMS, positive_nll_coef=0.0)
    cfg = GRPOLossConfig(
        policy_loss_cfg=smallest("vanilla"), rollout_correction=correction, nonfinite="drop", **terms, **run
    )
    case, without = problem(3), problem(3)
    dropped = 0
    for b, y in enumerate(case.labels):
        live = (y != -100).nonzero()[b::4, 1]
        case.fields[b][field][0, live] = POISON[b]
        without.labels[b][0, live] = -100
        dropped += live.numel()
    total = sum(int((y != -100).sum()) for y in case.labels)
    got, want = step(case, cfg), step(without, cfg)
    factor = (total - dropped) / total
    assert_same(got[0], [x * factor for x in want[0]])
    assert_same(got[1], [x * factor for x in want[1]])
    figures = [info.metrics for info in got[3]]
    assert sum(float(m["num_nonfinite"].result()) for m in figures) == dropped
    share = figures[0]["nonfinite_frac"].merge(figures[1]["nonfinite_frac"])
    assert float(share.result()) == pytest.approx(dropped / total)


@pytest.mark.parametrize("mode", ["eager", "chunk"])
def test_drop_in_the_pass_leaves_a_token_out_of_its_sequence(mode: str) -> None:
    cfg = GRPOLossConfig(
        policy_loss_cfg=smallest("vanilla"), rollout_correction=SEQUENCES, nonfinite="drop", mode=mode, chunk_size=4
    )
    case, without = problem(4), problem(4)
    live = (case.labels[0] != -100).nonzero()[1, 1]
    case.fields[0]["rollout_logprobs"][0, live] = -torch.inf
    without.labels[0][0, live] = -100
    total = sum(int((y != -100).sum()) for y in case.labels)
    got, want = step(case, cfg, old_logprobs=None), step(without, cfg, old_logprobs=None)
    assert_same(got[1], [x * (total - 1) / total for x in want[1]])


def test_calibrating_again_changes_nothing() -> None:
    cfg = GRPOLossConfig(
        policy_loss_cfg=smallest("vanilla"),
        rollout_correction={"action": "mask", "low": 0.7, "high": 1.5, "renormalize_rejected": True},
        nonfinite="drop",
    )
    case = problem(5)
    case.fields[0]["advantages"][0, 0] = torch.nan
    ctx = cfg.loss_ctx_cls
    kwargs = ctx.build_batches_loss_kwargs(case.items(), cfg, cu_seq_lens_list=case.cu_seq_lens)
    first = [k.policy_loss_weight.clone() for k in kwargs]
    ctx.build_batches([ctx(cfg, k) for k in kwargs], case.cu_seq_lens)
    for k, weight in zip(kwargs, first, strict=True):
        assert torch.equal(k.policy_loss_weight, weight)


@pytest.mark.parametrize("mode", ["eager", "chunk"])
@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dppo_tv"])
def test_overflowing_ratio_of_a_rejected_token(name: str, mode: str) -> None:
    """Weight 0 on the policy term, KL kept: loss and gradients are those with any other ratio there."""
    g = torch.Generator().manual_seed(3)
    hidden, weight = torch.randn(1, 4, 8, generator=g), torch.randn(20, 8, generator=g)
    cfg = GRPOLossConfig(
        policy_loss_cfg={"loss_type": name, "log_ratio_clamp": None}, use_kl_loss=True, kl_loss_type="k3", mode=mode
    )

    def at(far: float) -> tuple[torch.Tensor, ...]:
        item = RLLossContextInputItem(
            shifted_labels=torch.tensor([[1, 5, 19, 0]]),
            advantages=torch.ones(1, 4),
            old_logprobs=torch.tensor([[-3.0, far, -3.0, -3.0]]),
            ref_logprobs=torch.full((1, 4), -3.0),
            is_weights=torch.tensor([[1.0, 0.0, 1.0, 1.0]]),
        )
        (kwargs,) = GRPOLossContext.build_batches_loss_kwargs([item], cfg)
        leaves = [hidden.clone().requires_grad_(), weight.clone().requires_grad_()]
        loss, _ = GRPOLossContext(cfg, kwargs).forward(*leaves)
        return (loss.detach(), *torch.autograd.grad(loss, leaves))

    for got, want in zip(at(-200.0), at(-3.0), strict=True):
        assert torch.equal(got, want) and bool(want.isfinite().all())
