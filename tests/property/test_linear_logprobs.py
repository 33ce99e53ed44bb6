"""linear_logprobs against the oracle, in float64.

Contract: for every T >= 0, V >= 1, H >= 1, any layout and strides, any mix of ignored labels, one or K labels a
token, any bias, temperature, softcap and logit scale, any chunk size, and any upstream gradient per token and
statistic: the statistics and the gradients of hidden states, weight and bias are the oracle's to rounding. Statistics
of ignored tokens are exactly 0 and their gradients too. Inputs are not modified. Frozen tensors get no gradient,
`no_grad` builds no graph, a second backward is right, and a second derivative is refused.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import budgets
from tests.oracle import head as oracle
from tests.property.helpers import ALL_STATISTICS, assert_grads, assert_stats, call, gold_for, leaf, upstream_for, weigh
from tests.strategies import HeadCase, head_cases
from xloss import linear_logprobs

MODES = ("eager", "chunk")
both_modes = pytest.mark.parametrize("mode", MODES)


def _ignored(case: HeadCase) -> Tensor:
    """Rows all of whose labels are ignored."""
    dead = case.labels == case.head.ignore_index
    return dead if dead.shape == case.leading else dead.all(-1)


@both_modes
@given(case=head_cases(), asked=st.sets(st.sampled_from(sorted(ALL_STATISTICS))))
def test_values_and_gradients(mode: str, case: HeadCase, asked: set[str]) -> None:
    upstream = upstream_for(case)
    wanted = {"logprobs", "lse"} | {name.removeprefix("return_") for name in asked}
    upstream = {name: u for name, u in upstream.items() if name in wanted}
    gold = gold_for(case, upstream)
    inputs = [leaf(case.hidden), leaf(case.weight), leaf(case.bias)]
    before = [None if x is None else (x.detach().clone(), x._version) for x in (*inputs, case.labels)]

    stats = call(case, *inputs, mode=mode, **dict.fromkeys(asked, True))
    present = [x for x in inputs if x is not None]
    grads = iter(torch.autograd.grad(weigh(stats, upstream), present))
    got = [None if x is None else next(grads) for x in inputs]

    assert_stats(stats, gold)
    assert_grads(got, gold)
    assert {n for n in (*oracle.STATISTICS, "top1") if getattr(stats, n) is not None} == wanted
    dead = _ignored(case)
    assert not bool(got[0][dead].any()), "an ignored token got a gradient"
    for name in wanted:
        value = getattr(stats, name)
        assert value.shape == (case.labels.shape if name == "logprobs" else case.leading)
        assert bool((value[dead] == (-1 if name == "top1" else 0)).all())
    assert bool((stats.logprobs[case.labels == case.head.ignore_index] == 0).all())
    for x, kept in zip((*inputs, case.labels), before, strict=True):
        if x is not None:
            assert torch.equal(x, kept[0]), "an input was modified"
            assert x._version == kept[1], "an input was written to"


@both_modes
@given(case=head_cases())
def test_each_statistic_alone(mode: str, case: HeadCase) -> None:
    """One upstream at a time, asked for alone (other paths through the backward) and beside all others."""
    for name, upstream in upstream_for(case).items():
        gold = gold_for(case, {name: upstream})
        inputs = [leaf(case.hidden), leaf(case.weight), leaf(case.bias)]
        alone = {k: True for k in ALL_STATISTICS if k == f"return_{name}"}
        stats = call(case, *inputs, mode=mode, **(alone if case.seed % 2 else ALL_STATISTICS))
        got = torch.autograd.grad((getattr(stats, name) * upstream).sum(), [x for x in inputs if x is not None])
        assert_grads([*got, None][:3] if case.bias is None else list(got), gold)


@both_modes
@given(case=head_cases(magnitudes=(1.0,)))
def test_top1(mode: str, case: HeadCase) -> None:
    want = oracle.token_stats(case.hidden, case.weight, case.labels, case.bias, case.head)
    got = call(case, case.hidden, case.weight, case.bias, mode=mode, return_top1=True)
    assert got.top1.dtype == torch.int64
    assert torch.equal(got.top1, want.top1)


@both_modes
@given(case=head_cases(), frozen=st.sets(st.sampled_from((0, 1, 2)), min_size=1, max_size=2))
def test_frozen_inputs(mode: str, case: HeadCase, frozen: set[int]) -> None:
    upstream = upstream_for(case)
    gold = gold_for(case, upstream)
    inputs = [leaf(x, i not in frozen) for i, x in enumerate((case.hidden, case.weight, case.bias))]
    stats = call(case, *inputs, mode=mode, **ALL_STATISTICS)
    trained = [x for x in inputs if x is not None and x.requires_grad]
    if not trained:
        assert not stats.logprobs.requires_grad
        return
    weigh(stats, upstream).backward()
    assert_grads([None if x is None else x.grad for x in inputs], gold)
    assert all((x.grad is None) != x.requires_grad for x in inputs if x is not None)


@both_modes
@given(case=head_cases())
def test_no_grad_is_the_same_and_builds_nothing(mode: str, case: HeadCase) -> None:
    inputs = [leaf(case.hidden), leaf(case.weight), leaf(case.bias)]
    with torch.no_grad():
        stats = call(case, *inputs, mode=mode, **ALL_STATISTICS)
    assert not any(value.requires_grad for _, value in stats.differentiable())
    assert_stats(stats, gold_for(case, upstream_for(case)))


@both_modes
@given(case=head_cases())
def test_what_is_ignored_does_not_matter(mode: str, case: HeadCase) -> None:
    """NaN in the hidden states of ignored tokens, and in what flows back to them (a 0 / 0 of masked tokens, say)."""
    upstream = upstream_for(case)
    gold, dead = gold_for(case, upstream), _ignored(case)
    hidden = leaf(case.hidden.clone())
    with torch.no_grad():
        hidden[dead] = torch.nan
    inputs = [hidden, leaf(case.weight), leaf(case.bias)]
    stats = call(case, *inputs, mode=mode, **ALL_STATISTICS)
    assert_stats(stats, gold)
    bad = {n: u.masked_fill(dead if u.shape == dead.shape else dead[..., None], torch.nan) for n, u in upstream.items()}
    bad["logprobs"] = bad["logprobs"].masked_fill(case.labels == case.head.ignore_index, torch.nan)
    present = [x for x in inputs if x is not None]
    outputs = [getattr(stats, n) for n in bad]
    got = torch.autograd.grad(outputs, present, [bad[n] for n in bad])
    assert_grads([*got, None][:3] if case.bias is None else list(got), gold)


@pytest.mark.parametrize("budget", [1, 1 << 20], ids=["recompute", "keep"])
@pytest.mark.parametrize("what", ["labels", "temperature", "hidden", "weight"])
def test_inputs_changed_before_backward(what: str, budget: int) -> None:
    """A buffer reused for the next batch between forward and backward: the right gradient or an error, nothing else."""
    torch.manual_seed(5)
    tensors = {
        "hidden": torch.randn(6, 3, dtype=torch.float64).requires_grad_(),
        "weight": torch.randn(5, 3, dtype=torch.float64).requires_grad_(),
        "labels": torch.tensor([4, 0, 1, 2, 3, 0]),
        "temperature": torch.full((6,), 0.7, dtype=torch.float64),
    }
    leaves = oracle.leaves(tensors["hidden"], tensors["weight"])
    want = oracle.token_stats(*leaves, tensors["labels"].clone(), None, oracle.Head(tensors["temperature"].clone()))
    gold = oracle.grads(want.logprobs.square().sum(), leaves)
    h, w = tensors["hidden"], tensors["weight"]
    options = {"mode": "chunk", "chunk_size": 2, "logits_budget": budget}
    stats = linear_logprobs(h, w, tensors["labels"], temperature=tensors["temperature"], **options)
    with torch.no_grad():
        tensors[what].add_(1 if what != "labels" else -(tensors[what] > 0).long())
    try:
        got = torch.autograd.grad(stats.logprobs.square().sum(), (h, w))
    except RuntimeError as refused:
        assert "modified" in str(refused)  # noqa: PT017 - either outcome is right
        return
    for ours, theirs in zip(got, gold, strict=True):
        budgets.assert_rounding("gradient", ours, theirs, 10.0, 10.0)


@both_modes
def test_int32_labels(mode: str) -> None:
    hidden, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(4, 3, dtype=torch.float64)
    labels = torch.tensor([3, 0, -100, 1, 2])
    a, b = (linear_logprobs(hidden, weight, y, mode=mode, return_top1=True) for y in (labels, labels.int()))
    assert torch.equal(a.logprobs, b.logprobs)
    assert a.top1.dtype == b.top1.dtype == torch.int64


@given(case=head_cases(), keep_bytes=st.sampled_from((1, 400, 1 << 20)))
def test_second_backward_is_right(case: HeadCase, keep_bytes: int) -> None:
    """Whatever share of the logits was kept, and with other upstream numbers the second time."""
    first, second = upstream_for(case), {n: u.flip(0) + 1 for n, u in upstream_for(case).items()}
    inputs = [leaf(case.hidden), leaf(case.weight), leaf(case.bias)]
    present = [x for x in inputs if x is not None]
    stats = call(
        case, *inputs, mode="chunk", logits_budget=keep_bytes, chunk_size=case.chunk_size or 2, **ALL_STATISTICS
    )
    for upstream, retain in ((first, True), (second, True), (first, False)):
        got = torch.autograd.grad(weigh(stats, upstream), present, retain_graph=retain)
        assert_grads([*got, None][:3] if case.bias is None else list(got), gold_for(case, upstream))


@both_modes
def test_backward_of_parts_adds_up(mode: str) -> None:
    """Two losses from one call of the head, differentiated one after the other into .grad."""
    torch.manual_seed(1)
    hidden, weight = torch.randn(7, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)
    labels = torch.tensor([4, 0, 2, -100, 1, 4, 3])
    a, b = torch.randn(7, dtype=torch.float64), torch.randn(7, dtype=torch.float64)
    h, w = leaf(hidden), leaf(weight)
    stats = linear_logprobs(h, w, labels, return_entropy=True, mode=mode, chunk_size=3)
    (stats.logprobs * a).sum().backward(retain_graph=True)
    (stats.entropy * b).sum().backward()
    leaves = oracle.leaves(hidden, weight)
    want = oracle.token_stats(*leaves, labels)
    for got, gold in zip(
        (h.grad, w.grad), oracle.grads((want.logprobs * a + want.entropy * b).sum(), leaves), strict=True
    ):
        budgets.assert_rounding("sum of two backwards", got, gold, 10.0, 1.0)


@both_modes
@pytest.mark.parametrize("several", [False, True], ids=["one-label", "K-labels"])
@pytest.mark.parametrize("softcap", [None, 2.0], ids=["no-cap", "cap"])
def test_gradcheck(mode: str, several: bool, softcap: float | None) -> None:
    torch.manual_seed(2)
    hidden = torch.randn(5, 3, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    bias = torch.randn(4, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([3, 0, -100, 1, 2])
    if several:
        labels = torch.stack([labels, labels.flip(0)], dim=1)
    temperature = torch.tensor([1.0, 0.5, 2.0, 0.7, 1.3], dtype=torch.float64)

    def statistics(h: Tensor, w: Tensor, b: Tensor) -> tuple[Tensor, ...]:
        stats = linear_logprobs(
            h,
            w,
            labels,
            b,
            temperature=temperature,
            softcap=softcap,
            logit_scale=0.8,
            mode=mode,
            chunk_size=2,
            return_entropy=True,
            return_mean_logit=True,
            return_sum_p2=True,
        )
        return tuple(value for _, value in stats.differentiable())

    assert torch.autograd.gradcheck(statistics, (hidden, weight, bias), **budgets.GRADCHECK)


@pytest.mark.parametrize("linear", [True, False], ids=["constant-upstream", "upstream-with-graph"])
def test_second_derivative_is_refused(linear: bool) -> None:
    """A gradient penalty must fail, and not train on a gradient that was silently taken for a constant."""
    hidden = torch.randn(3, 2, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, 2, dtype=torch.float64, requires_grad=True)
    stats = linear_logprobs(hidden, weight, torch.tensor([0, 1, 3]), mode="chunk")
    loss = -stats.logprobs.sum() if linear else stats.logprobs.square().sum()
    with pytest.raises(RuntimeError, match="second derivative"):
        _penalised(loss, hidden).backward()


def _penalised(loss: Tensor, hidden: Tensor) -> Tensor:
    (grad,) = torch.autograd.grad(loss, hidden, create_graph=True)
    return loss + grad.square().sum()


def test_logits_of_one_sign_and_far_from_zero() -> None:
    """All logits near +-2000: log-sum-exp must shift by the maximum, and a zero-initialised maximum shows."""
    torch.manual_seed(3)
    hidden, weight = torch.randn(6, 4, dtype=torch.float64), torch.randn(11, 4, dtype=torch.float64)
    labels = torch.tensor([10, 0, 3, 5, 10, 0])
    for offset in (-2000.0, 2000.0):
        bias = torch.full((11,), offset, dtype=torch.float64)
        for mode in MODES:
            got = linear_logprobs(hidden, weight, labels, bias, mode=mode, return_entropy=True, chunk_size=4)
            want = oracle.token_stats(hidden, weight, labels, bias)
            for name in ("logprobs", "entropy", "lse"):
                budgets.assert_rounding(name, getattr(got, name), getattr(want, name), abs(offset), 1.0)


@both_modes
def test_banned_tokens(mode: str) -> None:
    """A bias of -inf removes a token: everything is as with a vocabulary without it."""
    torch.manual_seed(4)
    hidden, weight = torch.randn(5, 3, dtype=torch.float64), torch.randn(8, 3, dtype=torch.float64)
    keep = torch.tensor([0, 1, 3, 4, 6])
    bias = torch.full((8,), -torch.inf, dtype=torch.float64)
    bias[keep] = torch.randn(5, dtype=torch.float64)
    small = torch.tensor([4, 0, 2, 1, 3])
    leaves = oracle.leaves(hidden, weight[keep], bias[keep])
    want = oracle.token_stats(leaves[0], leaves[1], small, leaves[2])
    inputs = [leaf(hidden), leaf(weight), leaf(bias)]
    got = linear_logprobs(inputs[0], inputs[1], keep[small], inputs[2], mode=mode, return_entropy=True, chunk_size=2)
    upstream = torch.randn(2, 5, dtype=torch.float64)
    ours = torch.autograd.grad((upstream * torch.stack([got.logprobs, got.entropy])).sum(), inputs)
    theirs = oracle.grads((upstream * torch.stack([want.logprobs, want.entropy])).sum(), leaves)
    budgets.assert_rounding("logprobs", got.logprobs, want.logprobs, 10.0, 1.0)
    budgets.assert_rounding("entropy", got.entropy, want.entropy, 10.0, 1.0)
    for index, (mine, gold) in enumerate(zip(ours, theirs, strict=True)):
        budgets.assert_rounding("gradient", mine if index == 0 else mine[keep], gold, 10.0, 1.0)
        assert index == 0 or not bool(mine[[2, 5, 7]].any()), "a banned token got a gradient"
