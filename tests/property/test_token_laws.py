"""The formulas of token-ratio losses and of the KL penalty by themselves.

Contract: they pass gradcheck where they are smooth, and the laws that tie them to each other hold.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

from tests import budgets
from tests.property.steps import rl_items, run_step
from tests.strategies import StepCase, step_cases
from xloss import GRPOLossConfig
from xloss.policy import surrogate, trust_region
from xloss.policy.kl import kl_penalty

LP = torch.tensor([-0.3, -1.2, -2.5, -0.7, -4.0, -0.05, -1.9, -0.9], dtype=torch.float64)
D = torch.tensor([0.05, -0.4, 0.6, -0.02, 1.4, -1.1, 0.13, 3.0], dtype=torch.float64)  # log-ratios, off every bound
A = torch.tensor([1.0, -0.5, 0.7, -1.3, -2.0, 0.4, -0.1, -0.8], dtype=torch.float64)
DIFFERENTIABLE: dict[str, Callable[[Tensor], Tensor]] = {
    "ppo": lambda lp: surrogate.ppo_clip(
        lp, LP - D, A, cliprange_low=0.2, cliprange_high=0.28, clip_ratio_c=3.0, delta=1.7
    ),
    "importance_sampling": lambda lp: surrogate.importance_sampling(lp, LP - D, A, log_ratio_clamp=2.0),
    "sapo": lambda lp: surrogate.sapo(lp, LP - D, A, tau_pos=1.0, tau_neg=1.05, log_ratio_clamp=20.0),
    "dro": lambda lp: surrogate.dro(lp, LP - D, A, beta=0.3),
    "dppo": lambda lp: trust_region.masked_policy_gradient(lp, LP - D, A, A > 0, kl_tau=0.1),
    **{
        f"{kind}-unbiased": (
            lambda lp, kind=kind: kl_penalty(lp, LP - D, kind, grad="unbiased", log_ratio=lp - LP, clamp_in=2.0)
        )
        for kind in ("k1", "abs", "k2", "k3")
    },
    "k3-plain": lambda lp: kl_penalty(lp, LP - D, "k3", clamp_out=1.0),
}


@pytest.mark.parametrize("formula", DIFFERENTIABLE.values(), ids=DIFFERENTIABLE)
def test_gradcheck(formula: Callable[[Tensor], Tensor]) -> None:
    assert torch.autograd.gradcheck(formula, (LP.clone().requires_grad_(),), **budgets.GRADCHECK)


def slope(formula: Callable[[Tensor], Tensor]) -> Tensor:
    """d loss / d lp of each token."""
    lp = LP.clone().requires_grad_()
    return torch.autograd.grad(formula(lp).sum(), lp)[0]


def same(ours: Tensor, theirs: Tensor) -> None:
    budgets.assert_rounding("law", ours, theirs, 4.0, 1.0)


# -- laws --------------------------------------------------------------------------------------------------------------


def ppo(lp: Tensor, low: float, high: float, **fields: Any) -> Tensor:
    return surrogate.ppo_clip(lp, LP - D, A, cliprange_low=low, cliprange_high=high, **fields)


def test_distant_dual_clip_and_delta_are_ppo() -> None:
    for fields in ({"clip_ratio_c": 1e30}, {"delta": 1e30}):
        assert torch.equal(ppo(LP, 0.2, 0.28, **fields), ppo(LP, 0.2, 0.28))


def test_delta_bounds_the_loss_of_a_losing_token() -> None:
    """r = e^3 and A = -0.8: without delta the loss is 16, with it 1.7 * 0.8, and no gradient."""
    assert float(ppo(LP, 0.2, 0.28)[-1]) > 15
    assert float(ppo(LP, 0.2, 0.28, delta=1.7)[-1]) == pytest.approx(1.7 * 0.8)
    assert float(slope(lambda lp: ppo(lp, 0.2, 0.28, delta=1.7))[-1]) == 0


@given(case=step_cases(max_batches=1))
def test_grpo_with_equal_bounds_is_dapo_with_them(case: StepCase) -> None:
    """One epsilon, two epsilons and thresholds, under three names."""
    forms: list[dict[str, Any]] = [
        {"loss_type": "ppo", "cliprange_low": 0.25, "cliprange_high": 0.25},
        {"loss_type": "ppo", "clip_low_threshold": 0.75, "clip_high_threshold": 1.25},
        {"loss_type": "vanilla", "cliprange_low": 0.25, "cliprange_high": 0.25, "clip_ratio_c": None},
    ]
    steps = [run_step(GRPOLossConfig(policy_loss_cfg=form), rl_items(case), case) for form in forms]
    for other in steps[1:]:
        for ours, theirs in zip([*other.losses, other.weight], [*steps[0].losses, steps[0].weight], strict=True):
            assert torch.equal(ours, theirs)


def test_cispo_on_policy_is_reinforce() -> None:
    ours = slope(lambda lp: surrogate.cispo(lp, lp.detach(), A, clip_low_threshold=0.0, clip_high_threshold=5.0))
    same(ours, slope(lambda lp: surrogate.reinforce(lp, A)))


def test_unified_mask_has_the_gradient_of_ppo() -> None:
    """What PPO clips is dropped; the rest is in bounds or moves back, with its clipped weight."""
    fields = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28}
    ours = slope(lambda lp: surrogate.cispo(lp, LP - D, A, unified_mask=True, **fields))
    theirs = slope(lambda lp: ppo(lp, 0.2, 0.28))
    inside = (D.exp() >= 0.8) & (D.exp() <= 1.28)
    same(ours[inside], theirs[inside])
    assert torch.equal(ours == 0, theirs == 0)


def test_tis_is_topr_on_losing_tokens() -> None:
    ours = surrogate.topr(LP, LP - D, A, positive_weight=1.0, negative_weight=1.0, advantage_threshold=0.0)
    tis = surrogate.cispo(LP, LP - D, A, clip_low_threshold=0.0, clip_high_threshold=1.0)
    same(ours, torch.where(A > 0, surrogate.reinforce(LP, A), tis))


def test_sapo_of_a_small_tau_is_importance_sampling() -> None:
    """The gate flattens: 4 s (1 - s) goes to 1."""
    ours = slope(lambda lp: surrogate.sapo(lp, LP - D, A, tau_pos=1e-9, tau_neg=1e-9))
    same(ours, slope(lambda lp: surrogate.importance_sampling(lp, LP - D, A)))


def test_sapo_of_a_large_tau_is_silent_away_from_1() -> None:
    assert float(slope(lambda lp: surrogate.sapo(lp, LP - D, A, tau_pos=1e6, tau_neg=1e6)).abs().max()) == 0


def test_cap_changes_no_gradient_below_it() -> None:
    keep = torch.ones_like(A, dtype=torch.bool)
    ours, capped = (
        slope(lambda lp, cap=cap: trust_region.masked_policy_gradient(lp, LP - D, A, keep, ratio_cap=cap))
        for cap in (None, 2.0)
    )
    same(ours[D.exp() < 2], capped[D.exp() < 2])
    same(capped[-1], -2 * A[-1])


def test_binary_kl_is_the_divergence_of_two_outcomes() -> None:
    p, q = torch.stack([LP.exp(), 1 - LP.exp()]), torch.stack([(LP - 0.5).exp(), 1 - (LP - 0.5).exp()])
    exact = (q * (q / p).log()).sum(0)
    assert float((trust_region.binary_kl(LP, LP - 0.5) - exact).abs().max()) < 1e-6  # a floor of 1e-8 is added
    assert bool((trust_region.binary_kl(LP, LP) == 0).all())


@pytest.mark.parametrize("kind", ["k1", "abs", "k3"])
def test_straight_through_has_the_gradient_of_k2(kind: Any) -> None:
    ours = slope(lambda lp: kl_penalty(lp, LP - D, kind, grad="straight_through", clamp_in=0.1))
    same(ours, slope(lambda lp: kl_penalty(lp, LP - D, "k2")))
    assert torch.equal(kl_penalty(LP, LP - D, kind, grad="straight_through"), kl_penalty(LP, LP - D, kind))


def test_unbiased_k3_has_the_gradient_r_x() -> None:
    old = LP - 0.7 * D.flip(0)
    ours = slope(lambda lp: kl_penalty(lp, LP - D, "k3", grad="unbiased", log_ratio=lp - old, clamp_out=None))
    same(ours, (LP - old).exp() * D)


def test_score_function_is_unbiased_on_policy() -> None:
    ours = slope(lambda lp: kl_penalty(lp, LP - D, "k3", grad="score_function", clamp_out=None))
    same(ours, slope(lambda lp: kl_penalty(lp, LP - D, "k3", grad="unbiased", log_ratio=lp - LP, clamp_out=None)))
    same(ours, D)


def test_unbiased_gradient_is_the_gradient_of_the_reverse_kl() -> None:
    """Summed over the vocabulary with the old policy's probabilities: what k3's own gradient is not."""
    g = torch.Generator().manual_seed(5)
    z, ref, old = (torch.randn(11, generator=g, dtype=torch.float64) for _ in range(3))
    logits, ref, old = z.requires_grad_(), torch.log_softmax(ref, 0), torch.log_softmax(old, 0)
    lp = torch.log_softmax(logits, 0)
    exact = torch.autograd.grad((lp.exp() * (lp - ref)).sum(), logits, retain_graph=True)[0]
    sampled = (old.exp() * kl_penalty(lp, ref, "k3", grad="unbiased", log_ratio=lp - old, clamp_out=None)).sum()
    same(torch.autograd.grad(sampled, logits, retain_graph=True)[0], exact)
    plain = (lp.detach().exp() * kl_penalty(lp, ref, "k3", clamp_out=None)).sum()
    assert float((torch.autograd.grad(plain, logits)[0] - exact).abs().max()) > 1e-3


def test_a_clamped_token_pulls_back_only_straight_through() -> None:
    lp, ref = torch.tensor([-30.0], dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    for through, want in ((False, 0.0), (True, 1 - torch.tensor(20.0, dtype=torch.float64).exp().item())):
        leaf = lp.clone().requires_grad_()
        value = kl_penalty(leaf, ref, "k3", clamp_straight_through=through)
        assert float(value.detach()) == 10.0
        assert float(torch.autograd.grad(value.sum(), leaf)[0]) == pytest.approx(want)


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"kl_type": "k5"}, "kl_type must be one of"),
        ({"grad": "none"}, "grad must be one of"),
        ({"grad": "unbiased"}, "needs log_ratio"),
    ],
)
def test_kl_penalty_refuses(arguments: dict[str, Any], names: str) -> None:
    with pytest.raises(ValueError, match=names):
        kl_penalty(LP, LP, **({"kl_type": "k3"} | arguments))
