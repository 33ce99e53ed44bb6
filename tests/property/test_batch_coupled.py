"""Contract: Clip-Cov, KL-Cov, M2PO, decoupled PPO, OREAL and VAPO's likelihood term are those of
`tests/oracle/coupled.py`, loss and gradients, in every mode; their laws hold; the random choice of Clip-Cov is
reproducible.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from tests import budgets
from tests.oracle import coupled as oracle
from tests.oracle import grpo, head
from tests.property.correction_problem import Problem, problem
from tests.property.test_rollout_correction import assert_same, step
from xloss import CELossConfig, CELossContextInputItem, GRPOLossConfig, OrealLossConfig
from xloss.policy import coupled

CLIP = {"cliprange_low": 0.2, "cliprange_high": 0.28}
PPO = {"loss_type": "vanilla", **CLIP, "clip_ratio_c": None, "log_prob_diff_min": None, "log_prob_diff_max": None}
MODES = pytest.mark.parametrize("run", [{"mode": "eager"}, {"mode": "chunk", "chunk_size": 4}], ids=["eager", "chunk"])


def gold(case: Problem, formula: Any) -> tuple[list[Tensor], list[Tensor]]:
    """Token mean over the step of `formula(lp, fields)` on the valid tokens of each micro-batch."""
    leaves = head.leaves(*case.hidden, case.weight)
    total = sum(int((y != -100).sum()) for y in case.labels)
    losses = []
    for h, y, f in zip(leaves[:-1], case.labels, case.fields, strict=True):
        at = y.reshape(-1) != -100
        lp = head.token_stats(h, leaves[-1], y).logprobs.reshape(-1)[at]
        fields = {k: v.reshape(-1)[at].double() for k, v in f.items()}
        losses.append((formula(lp, fields) * fields["is_weights"]).sum() / total)
    return losses, head.grads(torch.stack(losses).sum(), leaves)


def check(case: Problem, cfg: GRPOLossConfig, formula: Any) -> None:
    losses, grads, _, _ = step(case, cfg)
    want_losses, want_grads = gold(case, formula)
    assert_same(losses, want_losses)
    assert_same(grads, want_grads)


@MODES
@pytest.mark.parametrize("cfg", [{"kl_cov_ratio": 0.3, "ppo_kl_coef": 0.7}, {"kl_cov_ratio": 0.0, "ppo_kl_coef": 1.0}])
def test_kl_cov(run: dict[str, Any], cfg: dict[str, Any]) -> None:
    policy = {"loss_type": "kl_cov", **cfg}
    check(problem(0), GRPOLossConfig(policy_loss_cfg=policy, **run),
          lambda lp, f: oracle.kl_cov(lp, f["old_logprobs"], f["advantages"], cfg))  # fmt: skip


@MODES
@pytest.mark.parametrize("trust_region_only", [True, False])
@pytest.mark.parametrize("threshold", [0.01, 0.08, 1e-9, 1e9])
def test_m2po(run: dict[str, Any], trust_region_only: bool, threshold: float) -> None:
    cfg = {"m2_threshold": threshold, "trust_region_only": trust_region_only}
    check(problem(1), GRPOLossConfig(policy_loss_cfg={"loss_type": "m2po", **cfg}, **run),
          lambda lp, f: oracle.m2po(lp, f["old_logprobs"], f["advantages"], cfg))  # fmt: skip


def test_m2po_of_the_old_policy_is_fixed_by_the_data() -> None:
    """AReaL: the moment of old - rollout, over all tokens, and the PPO clip on what is left."""
    cfg = {"m2_threshold": 0.05, "trust_region_only": False}

    def formula(lp: Tensor, f: dict[str, Tensor]) -> Tensor:
        ones = torch.ones_like(lp)
        kept = oracle.m2po(f["old_logprobs"], f["rollout_logprobs"], ones, cfg) != 0
        assert 0 < int(kept.sum()) < len(kept)
        return oracle.clip(lp, f["old_logprobs"], f["advantages"], 0.2, 0.28) * kept

    check(problem(2), GRPOLossConfig(policy_loss_cfg={"loss_type": "m2po", "moment_of": "old", **cfg, **CLIP}), formula)


COV = {**CLIP, "clip_cov_lb": -0.3, "clip_cov_ub": 0.5}


@MODES
def test_clip_cov_drops_only_candidates_and_as_many_as_asked(run: dict[str, Any]) -> None:
    case = problem(3)
    policy = {"loss_type": "clip_cov", "clip_cov_ratio": 0.25, **COV}
    _, _, _, infos = step(case, GRPOLossConfig(policy_loss_cfg=policy, **run))
    total = 0
    for info, now, y, f in zip(infos, case.current(), case.labels, case.fields, strict=True):
        at = (y != -100).reshape(-1)
        lp, old, adv, weight = (x.reshape(-1)[at] for x in (now, f["old_logprobs"], f["advantages"], f["is_weights"]))
        candidates = oracle.clip_cov_candidates(lp, old, adv, COV)
        ppo = oracle.clip(lp, old, adv, 0.2, 0.28) * weight / sum(int((z != -100).sum()) for z in case.labels)
        ours = info.token_loss.reshape(-1)[at]
        dropped = [i for i in range(len(lp)) if ours[i] == 0]
        assert set(dropped) <= set(candidates)
        assert len(dropped) == min(max(1, int(0.25 * len(lp))), len(candidates))
        total += len(dropped)
        rest = [i for i in range(len(lp)) if i not in dropped]
        assert_same([ours[rest]], [ppo[rest]])
    assert total > 0


def test_clip_cov_choice() -> None:
    """The same batch, the same choice; another seed or another batch, another one; no position is favoured."""
    like = torch.randn(400, generator=torch.Generator().manual_seed(0))
    order = coupled.random_order(like, 0)
    assert torch.equal(order, coupled.random_order(like, 0))
    assert torch.equal(order, coupled.random_order(like.double(), 0))
    assert order.unique().numel() == 400
    firsts = [set(coupled.random_order(like + i, seed).argsort()[:40].tolist()) for i in range(5) for seed in range(2)]
    overlaps = [len(a & b) for i, a in enumerate(firsts) for b in firsts[:i]]
    assert max(overlaps) < 20, "two random tenths of 400 share about 4"
    halves = torch.stack([coupled.random_order(like + i, 0).argsort()[:40] < 200 for i in range(50)]).float().mean()
    assert 0.4 < float(halves) < 0.6


@MODES
@pytest.mark.parametrize("cfg", [{"behave_high": 1.4}, {"behave_low": 0.7, "behave_high": 1.3},
                                 {"behave_action": "truncate", "behave_low": 0.7, "behave_high": 1.3}])  # fmt: skip
def test_decoupled_ppo(run: dict[str, Any], cfg: dict[str, Any]) -> None:
    policy = {"loss_type": "decoupled_ppo", **CLIP, **cfg}

    def formula(lp: Tensor, f: dict[str, Tensor]) -> Tensor:
        return oracle.decoupled(lp, f["old_logprobs"], f["rollout_logprobs"], f["advantages"], cfg)

    check(problem(4), GRPOLossConfig(policy_loss_cfg=policy, **run), formula)


def test_decoupled_ppo_is_ppo_with_a_correction() -> None:
    case = problem(5)
    got = step(case, GRPOLossConfig(policy_loss_cfg={"loss_type": "decoupled_ppo", **CLIP, "behave_high": 1.3}))
    correction = {"action": "mask", "high": 1.3}
    assert_same(got[1], step(case, GRPOLossConfig(policy_loss_cfg=PPO, rollout_correction=correction))[1])
    for f in case.fields:  # proximal and behaviour policy the same: plain PPO
        f["rollout_logprobs"] = f["old_logprobs"]
    same = step(case, GRPOLossConfig(policy_loss_cfg={"loss_type": "decoupled_ppo", **CLIP}))
    assert_same(same[1], step(case, GRPOLossConfig(policy_loss_cfg=PPO))[1])


@pytest.mark.parametrize(
    ("policy", "same_as"),
    [
        ({"loss_type": "kl_cov", "ppo_kl_coef": 0.0}, {"loss_type": "importance_sampling"}),
        ({"loss_type": "m2po", "m2_threshold": 1e9}, {"loss_type": "importance_sampling"}),
        ({"loss_type": "m2po", "m2_threshold": 1e9, **CLIP}, PPO),
        ({"loss_type": "clip_cov", **CLIP, "clip_cov_lb": 1e9, "clip_cov_ub": 2e9}, PPO),
    ],
    ids=["kl_cov", "m2po", "m2po clip", "clip_cov"],
)
def test_limits(policy: dict[str, Any], same_as: dict[str, Any]) -> None:
    case = problem(6)
    got, want = (step(case, GRPOLossConfig(policy_loss_cfg=p)) for p in (policy, same_as))
    assert_same(got[0] + got[1], want[0] + want[1])


FACTORS = {
    "positive_loss_factor": 1.3,
    "pos_sft_loss_weight": 0.6,
    "pos_policy_loss_weight": 0.8,
    "negative_loss_factor": 0.5,
}


@MODES
@pytest.mark.parametrize("by", ["advantages", "rewards"])
def test_oreal(run: dict[str, Any], by: str) -> None:
    case = problem(7)
    labels = torch.cat([y.reshape(-1) for y in case.labels]) != -100
    signal = torch.cat([f[by].reshape(-1) for f in case.fields])[labels]
    positives, negatives = int((signal > 0).sum()), int((signal <= 0).sum())
    total = positives + negatives

    def formula(lp: Tensor, f: dict[str, Tensor]) -> Tensor:
        ppo, positive, sft = oracle.clip(lp, f["old_logprobs"], f["advantages"], 0.2, 0.28), f[by] > 0, FACTORS
        gain = sft["positive_loss_factor"] / positives * total
        above = gain * (sft["pos_policy_loss_weight"] * ppo - sft["pos_sft_loss_weight"] * lp / f["is_weights"])
        return torch.where(positive, above, sft["negative_loss_factor"] / negatives * total * ppo)

    losses, grads, _, _ = step(
        case,
        OrealLossConfig(policy_loss_cfg=PPO, **FACTORS, **run),
        **({"rewards": None} if by == "advantages" else {}),
    )
    want_losses, want_grads = gold(case, formula)
    assert_same(losses, want_losses)
    assert_same(grads, want_grads)


@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_oreal_of_one_sign_only(sign: float) -> None:
    """No token of the other sign: its part is 0, not NaN; without a policy part, positives are cross-entropy."""
    case = problem(8)
    for f in case.fields:
        f["advantages"] = sign * f["advantages"].abs()
    cfg = OrealLossConfig(policy_loss_cfg=PPO, pos_policy_loss_weight=0.0, negative_loss_factor=0.0)
    losses, grads, _, _ = step(case, cfg, rewards=None, is_weights=None)
    if sign < 0:
        assert not any(bool(x.any()) for x in losses + grads)
        return
    ce = CELossConfig()
    items = [CELossContextInputItem(shifted_labels=y) for y in case.labels]
    built = ce.loss_ctx_cls.build_batches_loss_kwargs(items, ce)
    outs = [ce.loss_ctx_cls(ce, k).forward(h, case.weight)[0] for k, h in zip(built, case.hidden, strict=True)]
    assert_same(losses, outs)


def test_oreal_refuses_what_it_would_ignore() -> None:
    with pytest.raises(ValidationError, match="loss_reduction must be 'token'; got 'sample'"):
        OrealLossConfig(policy_loss_cfg=PPO, loss_reduction="sample")
    with pytest.raises(ValidationError, match="positive_nll_coef is pos_sft_loss_weight"):
        OrealLossConfig(policy_loss_cfg=PPO, positive_nll_coef=0.1)


@MODES
@pytest.mark.parametrize("by", ["advantages", "rewards"])
def test_positive_nll(run: dict[str, Any], by: str) -> None:
    case = problem(9)
    labels = torch.cat([y.reshape(-1) for y in case.labels]) != -100
    signal = torch.cat([f[by].reshape(-1) for f in case.fields])[labels]
    share = len(signal) / int((signal > 0).sum())

    def formula(lp: Tensor, f: dict[str, Tensor]) -> Tensor:
        ppo = grpo.vanilla(lp, f["old_logprobs"], f["advantages"], CLIP)
        return ppo - 0.3 * share * lp * (f[by] > 0) / f["is_weights"]

    cfg = GRPOLossConfig(policy_loss_cfg={"loss_type": "vanilla", **CLIP}, positive_nll_coef=0.3, **run)
    losses, grads, _, _ = step(case, cfg, **({"rewards": None} if by == "advantages" else {}))
    want_losses, want_grads = gold(case, formula)
    assert_same(losses, want_losses)
    assert_same(grads, want_grads)


@pytest.mark.parametrize("name", ["clip_cov", "kl_cov", "m2po", "decoupled_ppo"])
def test_gradcheck(name: str) -> None:
    g = torch.Generator().manual_seed(3)
    lp, old, adv, roll = (torch.randn(9, generator=g, dtype=torch.float64) * 0.5 for _ in range(4))
    valid = torch.arange(9) != 4
    lp.requires_grad_()
    formulas = {
        "clip_cov": lambda x: coupled.clip_cov(x, old, adv, valid, **COV, clip_cov_ratio=0.3, seed=0),
        "kl_cov": lambda x: coupled.kl_cov(x, old, adv, valid, kl_cov_ratio=0.3, ppo_kl_coef=0.5),
        "m2po": lambda x: coupled.m2po(x, old, adv, valid, m2_threshold=0.2, trust_region_only=False),
        "decoupled_ppo": lambda x: coupled.decoupled_ppo(
            x, old, roll, adv, **CLIP, clip_ratio_c=3.0, behave_low=0.5, behave_high=2.0, behave_mask=True
        ),
    }
    assert torch.autograd.gradcheck(formulas[name], (lp,), **budgets.GRADCHECK)


@pytest.mark.parametrize("policy", [{"loss_type": "clip_cov"}, {"loss_type": "kl_cov"}, {"loss_type": "m2po"}])
def test_nothing_to_learn_from(policy: dict[str, Any]) -> None:
    """No token, or none with a label: a differentiable 0."""
    case = problem(10)
    case.labels = [torch.full_like(y, -100) for y in case.labels]
    losses, grads, _, _ = step(case, GRPOLossConfig(policy_loss_cfg=policy))
    assert not any(bool(x.any()) for x in losses + grads)
