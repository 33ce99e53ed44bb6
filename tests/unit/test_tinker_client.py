"""Contract of the client's losses by name: Tinker's documented formulas, on a model of causal attention, in float64.

Values and gradients are those of plain autograd on dense logits, one sequence after another. The mistakes that other
servers of this API made are tests: a clip of 0.2 in the place of 0.8 and 1.2, a stray KL term, a mean for the sum, a
ppo without numbers that does not clip, a mask applied twice, a forward that reports 0.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.unit.tinker_data import (
    TINKER,
    alone,
    check,
    client_of,
    formula,
    grads,
    ints,
    rollouts,
    same,
    supervised,
    want,
)
from xloss.errors import UnsupportedError
from xloss.tinker import Datum, TrainingClient


@pytest.mark.parametrize("pack", [None, 8, 1])
def test_cross_entropy(pack: int | None) -> None:
    """Weighted sum; packs of any size; tokens of weight 0 have their log-probs all the same."""
    client, data = client_of(max_pack_tokens=pack), supervised()
    data[0].loss_fn_inputs["weights"][:3] = 0
    expected = want(client.model, data, lambda lp, d: -lp * d.loss_fn_inputs["weights"])
    check(client, data, client.forward_backward(data, "cross_entropy").result(), expected)


@pytest.mark.parametrize("pack", [None, 8])
@pytest.mark.parametrize("name", TINKER)
def test_policy_losses_without_numbers(name: str, pack: int | None) -> None:
    client, data = client_of(max_pack_tokens=pack), rollouts()
    check(client, data, client.forward_backward(data, name).result(), want(client.model, data, formula(name)))


@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("ppo", {"clip_low_threshold": 0.5, "clip_high_threshold": 1.1}),
        ("ppo", {"clip_high_threshold": 2.0}),
        ("cispo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
        ("dro", {"beta": 0.3}),
    ],
)
def test_policy_losses_with_numbers(name: str, config: dict[str, float]) -> None:
    client, data = client_of(), rollouts()
    numbers = {key.removeprefix("clip_").removesuffix("_threshold"): value for key, value in config.items()}
    out = client.forward_backward(data, name, config).result()
    check(client, data, out, want(client.model, data, formula(name, **numbers)))


def test_several_targets() -> None:
    """``[N, K]`` targets and weights of any sign, beside a sequence of ``[N]``, K not the same."""
    client = client_of()
    shapes = [(4, 3), (2, 1), (5,), (3, 2)]
    data = [Datum(ints(s[0]), {"target_tokens": ints(*s), "weights": torch.randn(s).double()}) for s in shapes]
    expected = want(client.model, data, lambda lp, d: -lp * d.loss_fn_inputs["weights"])
    check(client, data, client.forward_backward(data, "cross_entropy").result(), expected)


def test_gspo_counts_the_tokens_of_its_mask() -> None:
    client, data = client_of(), rollouts((6, 4))
    for datum in data:
        mask = torch.ones(len(datum.model_input))
        mask[:2] = 0
        datum.loss_fn_inputs["advantages"][:] = datum.loss_fn_inputs["advantages"][-1].abs() + 0.5
        datum.loss_fn_inputs["advantages"][:2] = 0
        datum.loss_fn_inputs["sequence_ratio_mask"] = mask

    def gspo(lp: Tensor, datum: Datum) -> Tensor:
        on, adv = datum.loss_fn_inputs["sequence_ratio_mask"].bool(), datum.loss_fn_inputs["advantages"]
        mean = (lp - datum.loss_fn_inputs["logprobs"])[on].mean().detach()
        ratio = (lp - lp.detach() + mean).exp()
        return -torch.minimum(ratio * adv, ratio.clamp(0.8, 1.2) * adv)

    check(client, data, client.forward_backward(data, "gspo").result(), want(client.model, data, gspo))
    data[0].loss_fn_inputs["advantages"][0] = 1
    with pytest.raises(UnsupportedError, match="sequence_ratio_mask"):
        client.forward(data, "gspo")


# -- what other servers got wrong --------------------------------------------------------------------------------------


def one_token(ratio: float, advantage: float) -> tuple[TrainingClient, list[Datum]]:
    client = client_of()
    datum = Datum([3], {"target_tokens": [5]})
    logprob = float(alone(client.model, datum)[0, 5].detach())
    inputs = {"logprobs": np.array([logprob - np.log(ratio)]), "advantages": np.array([advantage])}
    return client, [Datum([3], datum.loss_fn_inputs | inputs)]


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss"), [(3.0, 1.0, -1.2), (0.3, -1.0, 0.8), (0.3, 1.0, -0.3), (1.1, 1.0, -1.1)]
)
def test_ppo_without_numbers_clips_at_08_and_12(ratio: float, advantage: float, loss: float) -> None:
    """Not at 0.2 (a bound of 0.2 would let 0.3 pass), not at [1, 1], and it does clip: no gradient beyond."""
    client, data = one_token(ratio, advantage)
    out = client.forward_backward(data, "ppo").result()
    assert out.metrics["loss:sum"] == pytest.approx(loss, rel=budgets.FIGURE_F32)
    clipped = loss in (-1.2, 0.8)
    assert (max(float(g.abs().max()) for g in grads(client.model)) == 0) == clipped


def test_thresholds_are_absolute() -> None:
    client, data = one_token(3.0, 1.0)
    out = client.forward(data, "ppo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.28}).result()
    assert out.metrics["loss:sum"] == pytest.approx(-1.28, rel=budgets.FIGURE_F32)


@pytest.mark.parametrize("name", TINKER[:3])
def test_no_kl_term(name: str) -> None:
    """With advantages of 0 there is nothing left: neither loss nor gradient."""
    client, data = client_of(), rollouts()
    for datum in data:
        datum.loss_fn_inputs["advantages"].zero_()
    assert client.forward_backward(data, name).result().metrics["loss:sum"] == 0
    assert all(bool((g == 0).all()) for g in grads(client.model))


@pytest.mark.parametrize("name", ["cross_entropy", "dft", *TINKER, "gspo", "sapo", "kimi", "rloo"])
def test_sum_not_mean(name: str) -> None:
    """Twice the data is twice the loss and twice the gradient, of losses that Tinker does not have too."""
    data = supervised() if name in ("cross_entropy", "dft") else rollouts()
    once = client_of()
    twice = client_of(copy.deepcopy(once.model))
    a, b = once.forward_backward(data, name).result(), twice.forward_backward(data + data, name).result()
    assert b.metrics["loss:sum"] == pytest.approx(2 * a.metrics["loss:sum"], rel=budgets.FIGURE_F64)
    same(grads(twice.model), [2 * g for g in grads(once.model)])


def test_mask_is_applied_once() -> None:
    """A weight of 0.5 counts half, not a quarter, with a mask of 1 beside it too."""
    client, data = client_of(), supervised()
    for datum in data:
        n = len(datum.model_input)
        datum.loss_fn_inputs["weights"] = torch.full((n,), 0.5).double()
        datum.loss_fn_inputs["mask"] = (torch.arange(n) > 0).double()
    expected = want(client.model, data, lambda lp, d: -0.5 * lp * d.loss_fn_inputs["mask"])
    check(client, data, client.forward_backward(data, "cross_entropy").result(), expected)


def test_a_mask_keeps_the_quadratic_term_of_dro_out() -> None:
    """Without one every token has it, those of advantage 0 too, as documented."""
    client, data = client_of(), rollouts()
    for datum in data:
        mask = (torch.arange(len(datum.model_input)) % 2).double()
        datum.loss_fn_inputs["advantages"] *= mask
        datum.loss_fn_inputs["mask"] = mask
    expected = want(client.model, data, lambda lp, d: formula("dro")(lp, d) * d.loss_fn_inputs["mask"])
    check(client, data, client.forward_backward(data, "dro").result(), expected)


@pytest.mark.parametrize("name", ["cross_entropy", *TINKER, "gspo"])
def test_forward_reports_the_loss(name: str) -> None:
    client, data = client_of(), supervised() if name == "cross_entropy" else rollouts()
    seen = client.forward(data, name).result()
    assert all(p.grad is None for p in client.model.parameters())
    done = client.forward_backward(data, name).result()
    assert seen.metrics["loss:sum"] != 0
    assert seen.metrics["loss:sum"] == pytest.approx(done.metrics["loss:sum"], rel=budgets.FIGURE_SAME)
    same(seen.loss_fn_outputs, done.loss_fn_outputs)
