"""linear_logprobs in the precisions that people train in.

Contract: float32 gradients are within 1e-6 of float64, norm-wise; log-probs of bfloat16 inputs within 2e-3 nat; in
every dtype values and gradients are at most 1.5 times as far from float64 as plain autograd in that dtype; the number
of chunks does not matter, because sums are kept in float32; statistics come out in float32 (float64 for float64);
gradients come back in the dtype of their tensor. Vocabularies and chunks larger than any internal block give the
same.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from torch import Tensor
from torch.nn import functional as F

from tests import budgets
from tests.oracle import head as oracle
from tests.property.helpers import ALL_STATISTICS, call, gold_for, leaf, upstream_for, weigh
from tests.strategies import HeadCase, head_cases
from xloss import linear_logprobs

LOW = (torch.bfloat16, torch.float16)
DTYPES = (torch.float32, *LOW)
each_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))


def _problem(tokens: int, hidden_size: int, vocab: int, dtype: torch.dtype, seed: int = 0) -> tuple[Tensor, ...]:
    """Logits of unit scale; one label in eight ignored, 0 and V - 1 among the others."""
    g = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, hidden_size, generator=g).to(dtype)
    weight = (torch.randn(vocab, hidden_size, generator=g) / hidden_size**0.5).to(dtype)
    labels = torch.randint(0, vocab, (tokens,), generator=g)
    labels[::8] = -100
    labels[1], labels[-1] = 0, vocab - 1
    return hidden, weight, labels, torch.randn(2, tokens, generator=g)


def _gradients(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor, **options: object) -> list[Tensor]:
    inputs = [leaf(hidden), leaf(weight)]
    stats = linear_logprobs(*inputs, labels, return_entropy=True, **options)
    return list(torch.autograd.grad((upstream * torch.stack([stats.logprobs, stats.entropy])).sum(), inputs))


def _gold(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> list[Tensor]:
    leaves = oracle.leaves(hidden, weight)
    stats = oracle.token_stats(*leaves, labels)
    return oracle.grads((upstream.double() * torch.stack([stats.logprobs, stats.entropy])).sum(), leaves)


def _eager_in(dtype: torch.dtype, hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> list[Tensor]:
    """What a trainer without xloss does: logits in the working dtype, log-softmax of them in float32."""
    inputs = [leaf(hidden), leaf(weight)]
    logp = torch.log_softmax(F.linear(*inputs).to(dtype).float(), dim=1)
    live = labels != -100
    logprobs = logp.gather(1, labels.clamp(min=0).unsqueeze(1)).squeeze(1) * live
    entropy = -(logp.exp() * logp).sum(1) * live
    return list(torch.autograd.grad((upstream * torch.stack([logprobs, entropy])).sum(), inputs))


@pytest.mark.parametrize("mode", ["eager", "chunk"])
@pytest.mark.parametrize("chunk_size", [None, 7])
@pytest.mark.parametrize("vocab", [131, 2039])
def test_float32_gradients(mode: str, chunk_size: int | None, vocab: int) -> None:
    problem = _problem(67, 48, vocab, torch.float32)
    got = _gradients(*problem, mode=mode, chunk_size=chunk_size)
    for name, ours, gold in zip(("d hidden", "d weight"), got, _gold(*problem), strict=True):
        budgets.assert_relative(name, ours, gold, budgets.F32_GRADIENT)


@pytest.mark.parametrize("dtype", LOW, ids=["bf16", "fp16"])
@pytest.mark.parametrize("chunk_size", [None, 5])
def test_logprobs_in_nats(dtype: torch.dtype, chunk_size: int | None) -> None:
    """Logits up to some 20: rounded to bf16 they would be off by 0.06."""
    hidden, weight, labels, _ = _problem(61, 64, 523, dtype)
    hidden = hidden * 5
    got = linear_logprobs(hidden, weight, labels, chunk_size=chunk_size, mode="chunk", return_entropy=True)
    gold = oracle.token_stats(hidden, weight, labels)
    assert got.logprobs.dtype == got.entropy.dtype == torch.float32
    assert float((got.logprobs - gold.logprobs).abs().max()) < budgets.BF16_LOGPROB_NATS
    assert float((got.entropy - gold.entropy).abs().max()) < budgets.BF16_LOGPROB_NATS


@each_dtype
@pytest.mark.parametrize("chunk_size", [None, 9])
def test_as_close_as_eager(dtype: torch.dtype, chunk_size: int | None) -> None:
    problem = _problem(67, 48, 523, dtype)
    ours = _gradients(*problem, mode="chunk", chunk_size=chunk_size)
    base, gold = _eager_in(dtype, *problem), _gold(*problem)
    for name, mine, eager, exact in zip(("d hidden", "d weight"), ours, base, gold, strict=True):
        assert mine.dtype == dtype
        budgets.assert_three_way(name, mine, eager, exact)


@each_dtype
def test_error_does_not_grow_with_chunks(dtype: torch.dtype) -> None:
    """257 chunks of one token against one chunk: dW is summed in float32 whatever the dtype of the weight."""
    problem = _problem(257, 16, 61, dtype)
    problem = (*problem[:3], problem[3].abs())  # one sign: the sum grows, and rounding it each time would show
    gold = _gold(*problem)[1]
    errors = [budgets.error(_gradients(*problem, mode="chunk", chunk_size=size)[1], gold) for size in (257, 1)]
    floor = budgets.eps(torch.float32) * 257**0.5 * budgets.norm(gold)
    assert errors[1] <= budgets.CHUNK_GROWTH * errors[0] + floor


@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES], ids=["f64", "f32", "bf16", "fp16"])
@pytest.mark.parametrize("cap", [None, 4.0], ids=["no-cap", "cap"])
def test_wider_than_any_block(dtype: torch.dtype, cap: float | None) -> None:
    """V = 16411 and 150 tokens: several blocks of rows in float32 and float64, several blocks of a bf16 weight."""
    hidden, weight, labels, _ = _problem(150, 3, 16411, dtype)
    case = HeadCase(hidden, weight, None, labels, oracle.Head(softcap=cap, temperature=1.3), None, 0)
    adjoints = {n: u for n, u in upstream_for(case).items() if n in ("logprobs", "entropy", "sum_p2", "mean_logit")}
    gold = gold_for(case, adjoints)
    for only in (adjoints, {"logprobs": adjoints["logprobs"]}):  # the second takes the path through probabilities
        gold = gold if only is adjoints else gold_for(case, only)
        inputs = [leaf(hidden), leaf(weight)]
        stats = call(case, *inputs, None, mode="chunk", **(ALL_STATISTICS if only is adjoints else {}))
        got = torch.autograd.grad(weigh(stats, only), inputs)
        for ours, exact in zip(got, gold.grads, strict=False):
            budgets.assert_relative("gradient", ours, exact, budgets.wide_sum(dtype, 16411))


@given(case=head_cases(dtype=torch.float32, magnitudes=(1.0, 30.0)))
def test_float32_like_float64(case: HeadCase) -> None:
    """The drawn heads of test_linear_logprobs once more, in float32: accumulators follow the input."""
    upstream = upstream_for(case)
    gold = gold_for(case, upstream)
    inputs = [leaf(case.hidden), leaf(case.weight), leaf(case.bias)]
    stats = call(case, *inputs, mode="chunk", **ALL_STATISTICS)
    assert stats.logprobs.dtype == torch.float32
    present = [x for x in inputs if x is not None]
    for ours, exact, scale in zip(
        torch.autograd.grad(weigh(stats, upstream), present), gold.grads, gold.scales, strict=False
    ):
        budgets.assert_rounding("gradient", ours, exact, gold.max_logit, scale)


@pytest.mark.parametrize("dtype", LOW, ids=["bf16", "fp16"])
def test_autocast_is_the_cast(dtype: torch.dtype) -> None:
    """Under autocast float32 inputs give the numbers that rounded inputs give, and float32 gradients."""
    hidden, weight, labels, upstream = _problem(19, 8, 31, torch.float32)
    with torch.autocast("cpu", dtype=dtype):
        ours = _gradients(hidden, weight, labels, upstream, mode="chunk", chunk_size=4)
        stats = linear_logprobs(hidden, weight, labels, mode="chunk")
        eager = linear_logprobs(hidden, weight, labels, mode="eager")
    rounded = (hidden.to(dtype), weight.to(dtype), labels, upstream)
    want = oracle.token_stats(*rounded[:3])
    budgets.assert_rounding("logprobs", stats.logprobs, want.logprobs, 10.0, 1.0)
    budgets.assert_rounding("eager logprobs", eager.logprobs, want.logprobs, 10.0, 1.0)
    for mine, exact in zip(ours, _gold(*rounded), strict=True):
        assert mine.dtype == torch.float32
        budgets.assert_relative("gradient", mine, exact, budgets.eps(dtype))


def test_autocast_mixes_dtypes() -> None:
    """A float32 head on bf16 hidden states is an error outside autocast and fine inside."""
    hidden, weight, labels, _ = _problem(9, 4, 7, torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = linear_logprobs(hidden.bfloat16(), weight, labels, mode="chunk").logprobs
    want = linear_logprobs(hidden.bfloat16(), weight.bfloat16(), labels, mode="chunk").logprobs
    assert torch.equal(mixed, want)


def test_frozen_and_trained_dtypes_may_differ_in_bias() -> None:
    """The bias gradient comes back in the dtype of the bias."""
    hidden, weight, labels, _ = _problem(9, 4, 7, torch.bfloat16)
    bias = torch.randn(7).bfloat16().requires_grad_()
    linear_logprobs(hidden, weight, labels, bias, mode="chunk").logprobs.sum().backward()
    case = HeadCase(hidden, weight, bias.detach(), labels, oracle.Head(), None, 0)
    ones = {"logprobs": torch.ones(9, dtype=torch.float64)}
    assert bias.grad.dtype == torch.bfloat16
    budgets.assert_relative(
        "d bias", bias.grad, gold_for(replace(case), ones).grads[2], 2 * budgets.eps(torch.bfloat16)
    )
