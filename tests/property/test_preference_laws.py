"""Laws of the preference formulas, without an oracle.

Contract: gradients of the pure formulas are right (central differences); margins of +-1e4 give no NaN, and no inf where
a loss is bounded or linear; one loss is the limit of another where the papers say so.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.oracle.preference import Objective
from tests.property.preferences import ALL, PAIRED, assert_same, case, run_step
from xloss.losses.preferences import PreferenceBatch, PreferenceTerm, Side, preference_losses
from xloss.policy import preference as formulas

SHARED = {"beta": None, "label_smoothing": None, "average_log_prob": None}


def resolved(name: str, **fields: object) -> PreferenceTerm:
    return preference_losses()[name].model_validate(fields).resolved(SHARED)


def batch(chosen: Tensor, rejected: Tensor, ref: Tensor | None = None) -> PreferenceBatch:
    ref = torch.zeros_like(chosen) if ref is None else ref
    sides = [Side(s, ref, s - ref) for s in (chosen, rejected)]
    return PreferenceBatch(*sides, kl=torch.tensor(0.2, dtype=chosen.dtype), reward_shift=chosen.new_tensor(-0.1))


def losses(name: str, chosen: Tensor, rejected: Tensor, **fields: object) -> Tensor:
    return resolved(name, **fields).losses(batch(chosen, rejected))


def logprobs(seed: int, size: int = 12) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return tuple(-0.2 - 3 * torch.rand(size, generator=g, dtype=torch.float64) for _ in range(2))  # type: ignore[return-value]


@pytest.mark.parametrize("name", ALL)
def test_gradcheck(name: str) -> None:
    chosen, rejected = (x.requires_grad_(True) for x in logprobs(0))
    assert torch.autograd.gradcheck(lambda a, b: losses(name, a, b, beta=1.3), (chosen, rejected), **budgets.GRADCHECK)


SCORES: list[Callable[[Tensor], Tensor]] = [
    lambda x: formulas.divergence_score(x, "forward_kl"),
    lambda x: formulas.divergence_score(x, "js"),
    lambda x: formulas.divergence_score(x, "alpha", 0.3),
    lambda x: formulas.divergence_score(x, "alpha", 1.7),
    lambda x: formulas.alpha_reward(x, 0.4),
    lambda x: formulas.log_odds(-x.abs() - 0.01),
    lambda x: formulas.log_odds(-1e-6 * (1 + x.abs())),
]


@pytest.mark.parametrize("score", SCORES)
def test_gradcheck_of_scores(score: Callable[[Tensor], Tensor]) -> None:
    x = torch.linspace(-2, 2, 9, dtype=torch.float64).requires_grad_(True)
    options = budgets.GRADCHECK | ({"eps": 1e-4} if score is SCORES[-1] else {})
    assert torch.autograd.gradcheck(score, (x,), **options)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ALL)
def test_far_margins(name: str, dtype: torch.dtype) -> None:
    """Log-probs 0 and -1e4, also where beta times them is that far."""
    chosen = torch.tensor([0.0, -1e4, -1e4, 0.0, -1e-30], dtype=dtype, requires_grad=True)
    rejected = torch.tensor([-1e4, 0.0, -1e4, 0.0, -1.0], dtype=dtype, requires_grad=True)
    for beta in (0.1, 1.0):
        found = losses(name, chosen, rejected, beta=beta)
        if name == "sft":  # likelihood alone, which is not of pairs
            assert not bool(found.any()) and not found.requires_grad
            continue
        grads = torch.autograd.grad(found.sum(), (chosen, rejected))
        for x in (found, *grads):
            assert bool(x.isfinite().all()), (name, beta, x)


@pytest.mark.parametrize("divergence", ["forward_kl", "js", "alpha"])
def test_far_log_ratios_of_divergences(divergence: formulas.Divergence) -> None:
    u = torch.tensor([-1e4, -90.0, 0.0, 90.0, 1e4], requires_grad=True)
    for alpha in (0.5, 1.5):
        score = formulas.divergence_score(u, divergence, alpha)
        loss = formulas.logistic(0.1 * (score - score.flip(0)))
        (grad,) = torch.autograd.grad(loss.sum(), u)
        assert bool(score.isfinite().all()) and bool(loss.isfinite().all()) and bool(grad.isfinite().all())


def test_swapping_chosen_and_rejected_flips_the_margin() -> None:
    chosen, rejected = logprobs(1)
    for name in ("sigmoid", "cpo", "sigmoid_norm"):
        swapped = losses(name, rejected, chosen)
        margin = 0.1 * (chosen - rejected)
        torch.testing.assert_close(swapped - losses(name, chosen, rejected), margin)  # -log s(-x) + log s(x) = x


@pytest.mark.parametrize("name", ["sigmoid", "cpo", "sigmoid_norm", "aot", "aot_unpaired"])
def test_half_smoothed_labels_know_no_side(name: str) -> None:
    chosen, rejected = logprobs(2)
    a = losses(name, chosen, rejected, label_smoothing=0.5)
    b = losses(name, rejected, chosen, label_smoothing=0.5)
    torch.testing.assert_close(a.sum(), b.sum())


def test_ipo_is_least_at_its_target() -> None:
    chosen, rejected = logprobs(3)
    rejected = (chosen - 1 / (2 * 0.25)).requires_grad_(True)
    found = losses("ipo", chosen, rejected, beta=0.25)
    (grad,) = torch.autograd.grad(found.sum(), rejected)
    assert float(found.detach().abs().max()) < 1e-24 and float(grad.abs().max()) < 1e-12


def test_hinge_is_0_beyond_its_margin() -> None:
    delta = torch.tensor([9.99, 10.01, 50.0], dtype=torch.float64)
    found = losses("hinge", delta, torch.zeros(3, dtype=torch.float64))
    assert found[0] > 0 and not bool(found[1:].any())


def test_limits() -> None:
    chosen, rejected = logprobs(4)
    same = torch.testing.assert_close
    of = losses
    same(of("simpo", chosen, rejected, gamma=0.0, beta=0.7), of("cpo", chosen, rejected, beta=0.7))
    same(of("alphapo", chosen, rejected, alpha=0.0, gamma=0.4), of("simpo", chosen, rejected, gamma=0.4))
    same(of("alphapo", chosen, rejected, alpha=1e-9, gamma=0.4), of("simpo", chosen, rejected, gamma=0.4))
    same(of("robust", chosen, rejected, label_smoothing=0.0), of("sigmoid", chosen, rejected))
    same(
        of("discopop", chosen, rejected, tau=1e9),
        0.5 * (of("sigmoid", chosen, rejected) + torch.exp(-0.1 * (chosen - rejected))),
    )
    zero = torch.zeros(1, dtype=torch.float64)
    for name in ("sigmoid", "sigmoid_norm", "robust", "cpo"):
        same(of(name, zero, zero), torch.log(torch.full_like(zero, 2.0)))


def test_kto_with_no_kl_is_apo_zero() -> None:
    chosen, rejected = logprobs(5)
    given = batch(chosen, rejected)
    none = PreferenceBatch(given.chosen, given.rejected, kl=torch.zeros((), dtype=torch.float64))
    kto, apo = resolved("kto").losses(none), resolved("apo_zero_unpaired").losses(none)
    torch.testing.assert_close(kto, apo)
    torch.testing.assert_close(apo[:12] + apo[12:], resolved("apo_zero").losses(none))
    moved = PreferenceBatch(given.chosen, given.rejected, kl=torch.tensor(0.7, dtype=torch.float64))
    shifted = batch(chosen - 0.7, rejected - 0.7)
    torch.testing.assert_close(resolved("kto").losses(moved), resolved("apo_zero_unpaired").losses(shifted))


def test_exo_is_0_at_its_target() -> None:
    margin = torch.log(torch.tensor([0.99 / 0.01], dtype=torch.float64)) / 0.1
    found = losses("exo_pair", margin, torch.zeros_like(margin), label_smoothing=0.01)
    assert abs(float(found)) < 1e-14


def test_aot_of_one_pair_is_dpo_and_order_does_not_matter() -> None:
    chosen, rejected = logprobs(6)
    one = losses("aot", chosen[:1], rejected[:1])
    torch.testing.assert_close(one, losses("sigmoid", chosen[:1], rejected[:1]))
    shuffled = torch.randperm(12)
    a, b = losses("aot_unpaired", chosen, rejected), losses("aot_unpaired", chosen[shuffled], rejected)
    torch.testing.assert_close(a, b)


def test_orpo_odds_near_certainty() -> None:
    """log(p / (1 - p)) for p up to 1 - 1e-12 against the expansion -log(-x)."""
    x = -torch.logspace(-12, -7, 6, dtype=torch.float64)
    torch.testing.assert_close(formulas.log_odds(x), -torch.log(-x), rtol=budgets.FIGURE_F32, atol=0)
    deep = torch.tensor([-50.0, -800.0], dtype=torch.float64)
    torch.testing.assert_close(formulas.log_odds(deep), deep)


def test_weights_of_wpo_are_bounded_constants() -> None:
    aligned = torch.tensor([-1.0, 0.5, 1e4], dtype=torch.float64, requires_grad=True)
    free, held = formulas.wpo_weight(aligned), formulas.wpo_weight(aligned, 1.2)
    torch.testing.assert_close(free[:2], torch.exp(aligned.detach()[:2]))
    torch.testing.assert_close(held, torch.tensor([free[0], 1.2, 1.2], dtype=torch.float64))
    assert not free.requires_grad and bool(free.isfinite().all())


@pytest.mark.parametrize("name", ALL)
def test_a_list_of_one_is_the_loss(name: str) -> None:
    """MPO with one term; two halves; a name, a dict and a list."""
    problem = case(21)
    one = Objective([{"loss_type": name}], kl=0.2)
    halves = Objective([{"loss_type": name, "weight": 0.5}] * 2, kl=0.2)
    a, b = run_step(problem, one), run_step(problem, halves)
    assert_same(a, b, problem)


def test_reference_cancels_where_it_is_the_policy() -> None:
    """With the reference's log-probs those of the policy, rewards and margins are 0."""
    problem = case(22)
    infos = run_step(problem, Objective([{"loss_type": "sigmoid"}])).infos
    for b, info in zip(problem.batches, infos, strict=True):
        assert info.logprobs is not None
        b.ref = info.logprobs.detach()
    for name in PAIRED:
        if name in ("sft", "cpo", "simpo", "alphapo", "orpo"):
            continue
        for info in run_step(problem, Objective([{"loss_type": name}])).infos:
            assert abs(float(info.metrics["reward_margin"].result())) < 1e-12
