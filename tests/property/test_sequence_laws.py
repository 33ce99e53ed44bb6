"""Laws of losses that couple tokens: pure formulas in float64, no head.

Contract: gradients pass gradcheck; GSPO and GSPO-token are one loss where the advantage is constant in a sequence; with
one token a sequence every level is the token's; GMPO and GSPO agree on-policy; a mask that nothing reaches is no mask;
neither the order of a pack nor a sequence without a token changes anything.
"""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import budgets
from tests.oracle import head, sequence
from tests.property.sequence_steps import NAMES, sequence_policies
from xloss.losses.policies import find_policy_loss
from xloss.packing import Segments
from xloss.policy.batch import PolicyBatch
from xloss.policy.masks import off_policy_sequence_mask, top_entropy_mask
from xloss.policy.sequence import optimal_value

WIDE = {"cliprange_low": 0.99, "cliprange_high": 1e6}
POLICIES: dict[str, dict[str, Any]] = {
    "gspo": {"loss_type": "gspo", "cliprange_low": 0.1, "cliprange_high": 0.1},
    "gspo-dual": {"loss_type": "gspo", "cliprange_low": 0.1, "cliprange_high": 0.1, "dual_clip_c": 1.2},
    "gspo_token": {"loss_type": "gspo_token", "cliprange_low": 0.1, "cliprange_high": 0.1},
    "segment_ratio": {"loss_type": "segment_ratio", "cliprange_low": 0.1, "cliprange_high": 0.1},
    "rloo": {"loss_type": "rloo"},
    "luspo": {"loss_type": "luspo", "cliprange_low": 0.1, "cliprange_high": 0.1},
    "gmpo": {"loss_type": "gmpo", "cliprange_low": 0.2, "cliprange_high": 0.2},
    "vespo": {"loss_type": "vespo"},
    "real": {"loss_type": "real"},
    "a_star_po": {"loss_type": "a_star_po", "beta": 0.3},
    "fipo": {"loss_type": "fipo", "decay_rate": 2.0, "participation_threshold": 1.2},
}
DETACHED = {"gspo_token", "vespo", "fipo"}  # surrogates: their value is no function whose derivative is the gradient


def batch(
    lengths: list[int], seed: int, *, drift: float = 0.4, constant: bool = True, masked: bool = True
) -> PolicyBatch:
    """A pack of sequences of these lengths, some tokens left out."""
    g = torch.Generator().manual_seed(seed)
    count = sum(lengths)

    def randn() -> Tensor:
        return torch.randn(count, generator=g, dtype=torch.float64)

    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    valid = torch.rand(count, generator=g) < (0.7 if masked else 1.1)
    advantages = torch.randn(len(lengths), generator=g, dtype=torch.float64)[ids] if constant else randn()
    advantages = advantages * (torch.rand(count, generator=g) < (1.1 if constant else 0.7))
    now = -randn().abs()
    return PolicyBatch(
        logprobs=now.requires_grad_(),
        old_logprobs=now.detach() - drift * randn(),
        advantages=advantages,
        ref_logprobs=now.detach() - drift * randn(),
        rollout_logprobs=now.detach() - drift * randn(),
        sequences=Segments(ids, len(lengths), valid),
        groups=ids // 2,
    )


def losses(policy: dict[str, Any], x: PolicyBatch) -> Tensor:
    cfg = find_policy_loss(policy["loss_type"]).model_validate(policy)
    return cfg.per_token(x.at(cfg.level())).masked_fill(~x.sequences.valid, 0)


def sample_mean(per_token: Tensor, x: PolicyBatch) -> Tensor:
    return x.sequences.mean(per_token).mean()


def value_and_grad(policy: dict[str, Any], x: PolicyBatch) -> tuple[Tensor, Tensor]:
    loss = sample_mean(losses(policy, x), x)
    (grad,) = torch.autograd.grad(loss, x.logprobs, allow_unused=True)
    return loss.detach(), torch.zeros_like(x.logprobs) if grad is None else grad


def same(ours: Tensor, theirs: Tensor) -> None:
    budgets.assert_rounding("value", ours.detach(), theirs.detach(), 10.0, 1.0)


packs = st.lists(st.integers(0, 5), min_size=1, max_size=5)
seeds = st.integers(0, 2**31)


@pytest.mark.parametrize("name", NAMES)
@given(
    data=st.data(),
    lengths=st.lists(st.integers(0, 7), min_size=6, max_size=9),
    seed=seeds,
    drift=st.sampled_from((2.0, 0.4)),
    weighted=st.booleans(),
)
def test_oracle(name: str, data: st.DataObject, lengths: list[int], seed: int, drift: float, weighted: bool) -> None:
    """Values and gradients under random adjoints: every option of every loss, in packs that reach its bounds."""
    x, policy = batch(lengths, seed, drift=drift, constant=False), data.draw(sequence_policies(name))
    cfg = find_policy_loss(name).model_validate(policy)
    g = torch.Generator().manual_seed(seed)
    adjoint, weights = (torch.rand(sum(lengths), generator=g, dtype=torch.float64) + 0.1 for _ in range(2))
    folded = weights if weighted and cfg.folds_is_weights else None
    bounds = list(pairwise([0, *torch.tensor(lengths).cumsum(0).tolist()]))
    gold = sequence.Tokens(x.logprobs, x.old_logprobs, x.advantages, x.sequences.valid, bounds, x.ref_logprobs, folded,
                           x.groups)  # fmt: skip
    found = []
    for loss in (losses(policy, replace(x, is_weights=folded)), sequence.per_token(gold, cfg.model_dump())):
        (grad,) = head.grads((loss * adjoint).sum(), [x.logprobs])
        found.append((loss.detach(), grad))
    for ours, theirs in zip(*found, strict=True):
        budgets.assert_rounding(name, ours, theirs, 30.0, 1.0)  # log-ratios of that size


@pytest.mark.parametrize("name", [n for n in POLICIES if n not in DETACHED])
def test_gradcheck(name: str) -> None:
    x = batch([3, 0, 4, 1, 2], 3, constant=name == "gmpo")

    def loss(logprobs: Tensor) -> Tensor:
        return losses(POLICIES[name], replace(x, logprobs=logprobs))

    assert torch.autograd.gradcheck(loss, x.logprobs, **budgets.GRADCHECK)


@given(lengths=packs, seed=seeds, drift=st.sampled_from((1e-4, 0.4)))
def test_gspo_is_gspo_token_at_constant_advantage(lengths: list[int], seed: int, drift: float) -> None:
    clip = {"cliprange_low": 0.1, "cliprange_high": 0.2}
    x = batch(lengths, seed, drift=drift)
    (a, da), (b, db) = (value_and_grad({"loss_type": n} | clip, x) for n in ("gspo", "gspo_token"))
    same(a, b)
    same(da, db)


@given(seed=seeds, level=st.sampled_from(("sequence", "sequence_token", "segment", "sequence_sum")))
def test_one_token_a_sequence(seed: int, level: str) -> None:
    """Every level is the token's, and RLOO, GSPO and LUSPO are PPO."""
    x, clip = batch([1] * 7, seed, masked=False), {"cliprange_low": 0.2, "cliprange_high": 0.28}
    want = value_and_grad({"loss_type": "ppo"} | clip, x)
    names = ("gspo", "gspo_token", "segment_ratio", "rloo", "luspo")
    for policy in ({"loss_type": "ppo", "ratio_level": level} | clip, *({"loss_type": n} | clip for n in names)):
        for ours, theirs in zip(value_and_grad(policy, x), want, strict=True):
            same(ours, theirs)


@given(lengths=packs, seed=seeds, level=st.sampled_from(("token", "sequence", "segment", "sequence_sum")))
def test_clipped_ratios_are_one_formula(lengths: list[int], seed: int, level: str) -> None:
    """The named losses are PPO at their level."""
    name = {"sequence": "gspo", "segment": "segment_ratio", "sequence_sum": "rloo"}.get(level, "ppo")
    x, clip = batch(lengths, seed, constant=False), {"cliprange_low": 0.1, "cliprange_high": 0.2}
    for ours, theirs in zip(
        value_and_grad({"loss_type": name} | clip, x),
        value_and_grad({"loss_type": "ppo", "ratio_level": level} | clip, x),
        strict=True,
    ):
        same(ours, theirs)


@given(lengths=packs, seed=seeds)
def test_gmpo_and_gspo_on_policy(lengths: list[int], seed: int) -> None:
    """Both are -A at ratio 1 with gradient -A / T_i."""
    x = batch(lengths, seed, drift=0.0)
    (a, da), (b, db) = (value_and_grad(p, x) for p in ({"loss_type": "gmpo"}, {"loss_type": "gspo"}))
    same(a, b)
    same(da, db)


@given(lengths=packs, seed=seeds)
def test_gmpo_without_clip_is_gspo(lengths: list[int], seed: int) -> None:
    x = batch(lengths, seed)
    wide = {"loss_type": "gmpo", "cliprange_low": 1e6, "cliprange_high": 1e6}
    (a, da), (b, db) = value_and_grad(wide, x), value_and_grad({"loss_type": "gspo"} | WIDE, x)
    low = x.sequences.mean((x.logprobs - x.old_logprobs).detach()) < math.log(0.01)
    assert not low.any()  # of the clip
    same(a, b)
    same(da, db)


@given(lengths=packs, seed=seeds)
def test_luspo_is_gspo_summed(lengths: list[int], seed: int) -> None:
    x, clip = batch(lengths, seed), {"cliprange_low": 0.1, "cliprange_high": 0.2}
    luspo, gspo = (losses({"loss_type": n} | clip, x) for n in ("luspo", "gspo"))
    same(sample_mean(luspo, x), x.sequences.sum(gspo).mean())


@given(lengths=packs, seed=seeds)
def test_on_policy_weights_are_1(lengths: list[int], seed: int) -> None:
    """VESPO is REINFORCE and FIPO is PPO where the policy did not move."""
    x = batch(lengths, seed, drift=0.0, constant=False)
    for name, plain in (("vespo", "reinforce"), ("fipo", "ppo")):
        for ours, theirs in zip(
            value_and_grad({"loss_type": name}, x), value_and_grad({"loss_type": plain}, x), strict=True
        ):
            same(ours, theirs)


@given(lengths=packs, seed=seeds)
def test_fipo_without_future_weighs_a_token_by_its_own_ratio(lengths: list[int], seed: int) -> None:
    """A vanishing half-life leaves exp(d_t)."""
    x = batch(lengths, seed, constant=False)
    free = {"weight_cliprange": None, "safety_threshold": None, "decay_rate": 1e-3}
    ours = losses({"loss_type": "fipo"} | free, x)
    same(ours, losses({"loss_type": "ppo"}, x) * x.log_ratio.detach().exp())


@pytest.mark.parametrize("name", POLICIES)
@given(lengths=packs, seed=seeds, data=st.data())
def test_order_of_a_pack(name: str, lengths: list[int], seed: int, data: st.DataObject) -> None:
    x = batch(lengths, seed, constant=False)
    order = data.draw(st.permutations(range(len(lengths))))
    starts = torch.tensor([0, *lengths]).cumsum(0)
    index = torch.cat([torch.arange(int(starts[i]), int(starts[i]) + lengths[i]) for i in order])
    ids = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor([lengths[i] for i in order]))
    fields = ("old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs", "groups")
    y = PolicyBatch(
        logprobs=x.logprobs[index],
        sequences=Segments(ids, len(lengths), x.sequences.valid[index]),
        **{f: getattr(x, f)[index] for f in fields},
    )
    same(losses(POLICIES[name], x)[index], losses(POLICIES[name], y))


@pytest.mark.parametrize("name", POLICIES)
@given(lengths=packs, seed=seeds)
def test_a_sequence_without_a_token(name: str, lengths: list[int], seed: int) -> None:
    """Its rows may hold anything, and leave the losses of the others as they are."""
    x = batch(lengths, seed)
    more = 3
    ids = torch.cat([x.sequences.ids, torch.full((more,), len(lengths))])
    off = torch.zeros(more, dtype=torch.float64)
    fields = ("logprobs", "old_logprobs", "advantages", "ref_logprobs", "rollout_logprobs")
    y = PolicyBatch(
        sequences=Segments(ids, len(lengths) + 1, torch.cat([x.sequences.valid, torch.zeros(more, dtype=torch.bool)])),
        groups=torch.cat([x.groups, torch.zeros(more, dtype=torch.int64)]),
        **{f: torch.cat([getattr(x, f), off]) for f in fields},
    )
    assert torch.equal(losses(POLICIES[name], y)[: sum(lengths)], losses(POLICIES[name], x))


@given(lengths=packs, seed=seeds)
def test_masks_that_nothing_reaches(lengths: list[int], seed: int) -> None:
    """OPSM at infinity, or with advantages that are not negative, keeps all; the whole quantile keeps all."""
    x = batch(lengths, seed)
    sampled = (x.logprobs, x.rollout_logprobs)
    assert off_policy_sequence_mask(*sampled, x.advantages, x.sequences, delta=math.inf).all()
    assert off_policy_sequence_mask(*sampled, x.advantages.abs(), x.sequences, delta=-math.inf).all()
    losing = off_policy_sequence_mask(*sampled, -1 - x.advantages.abs(), x.sequences, delta=-math.inf)
    assert not losing.any()
    same_policy = (x.logprobs, x.logprobs)
    assert off_policy_sequence_mask(*same_policy, -x.advantages.abs(), x.sequences, delta=0.0).all()
    assert torch.equal(top_entropy_mask(x.advantages, x.sequences.valid, quantile=1.0), x.sequences.valid)


def test_real_pushes_the_classes_apart() -> None:
    """Gradients are positive for bad answers and negative for good ones, 0 where a prompt has one kind only."""
    x = batch([2, 2, 2, 2], 0, masked=False)
    advantages = torch.tensor([1.0, 1, -1, -1, 1, 1, 1, 1], dtype=torch.float64)
    x = PolicyBatch(x.logprobs, x.old_logprobs, advantages, sequences=x.sequences, groups=torch.arange(8) // 4)
    _, grad = value_and_grad({"loss_type": "real"}, x)
    assert bool((grad[:2] < 0).all()) and bool((grad[2:4] > 0).all()) and not grad[4:].any()


def test_optimal_value() -> None:
    """Between mean and maximum: the mean of equal rewards, the maximum at temperature 0."""
    rewards = torch.tensor([[0.0, 1.0, 1.0, 0.0], [0.5, 0.5, 0.5, 0.5]], dtype=torch.float64)
    soft = optimal_value(rewards, 0.5)
    assert soft[0] > 0.5 and soft[0] < 1.0
    assert soft[0].item() == pytest.approx(0.5 * math.log((2 + 2 * math.exp(2.0)) / 4))
    assert soft[1].item() == pytest.approx(0.5)
    assert optimal_value(rewards, 1e-3)[0].item() == pytest.approx(1.0, abs=budgets.FIGURE_LIMIT)


def test_turns() -> None:
    """Runs of counted tokens, cut by gaps and by sequences."""
    valid = torch.tensor([1, 1, 0, 1, 1, 1, 0, 0, 1], dtype=torch.bool)
    x = Segments.of(torch.tensor([0, 5, 9]), valid)
    assert x.runs().ids[valid].tolist() == [0, 0, 1, 1, 2, 3]
