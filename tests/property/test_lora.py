"""Adapters on the head against the dense ``W + sum_i s_i B_i A_i``, by the float64 oracle.

Contract: statistics and the gradients of hidden states, weight, bias and of every A and B are those of the dense head,
to rounding, in every mode, for any labels, bias, temperature, softcap, chunk size, ranks, and any part of the tensors
frozen; what stands at ignored tokens does not matter, be it NaN; dropout falls on the adapter's input alone; a loss is
the dense head's in one pass, two passes and eager, and a frozen weight has no gradient.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from tests import budgets
from tests.oracle import ce
from tests.oracle import head as oracle
from tests.property.helpers import ALL_STATISTICS, call, upstream_for, weigh
from tests.strategies import HeadCase, head_cases
from xloss import CELossConfig, CELossContextInputItem, Lora, LoraWeight, MTPLossConfig, linear_logprobs
from xloss.errors import DeviceError, DtypeError, OptionError, ShapeError, UnsupportedError

MODES = ("eager", "chunk")
SCALES = (2.0, -0.5)


def tensors(case: HeadCase, ranks: list[int]) -> list[Tensor]:
    """``A_i, B_i, ...`` as leaves."""
    g = case.generator()
    vocab, hidden = case.weight.shape
    sizes = [size for r in ranks for size in ((r, hidden), (vocab, r))]
    return [torch.randn(*size, generator=g, dtype=case.weight.dtype).mul_(0.3).requires_grad_() for size in sizes]


def adapted(weight: Tensor, parts: list[Tensor]) -> LoraWeight:
    pairs = zip(parts[::2], parts[1::2], SCALES[: len(parts) // 2], strict=True)
    return LoraWeight(weight, tuple(Lora(a, b, scale) for a, b, scale in pairs))


def dense(weight: Tensor, parts: list[Tensor]) -> Tensor:
    pairs = zip(parts[::2], parts[1::2], SCALES[: len(parts) // 2], strict=True)
    return weight + sum(scale * b @ a for a, b, scale in pairs)


def assert_all(case: HeadCase, names: list[str], got: list[Any], want: list[Any], upstream: Tensor) -> None:
    """Norm-wise, against the size a gradient could have."""
    flat = case.hidden.reshape(-1, case.hidden.shape[-1])
    most = float((flat @ case.weight.t()).abs().amax()) * case.head.logit_scale
    scale = (1 + float(upstream)) * (1 + budgets.norm(case.hidden)) * (1 + budgets.norm(case.weight)) * (1 + most)
    for name, mine, gold in zip(names, got, want, strict=True):
        budgets.assert_rounding(name, mine, gold, most, scale)


@pytest.mark.parametrize("mode", MODES)
@given(
    case=head_cases(magnitudes=(1.0,)),
    ranks=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    frozen=st.booleans(),
)
def test_statistics_and_gradients(mode: str, case: HeadCase, ranks: list[int], frozen: bool) -> None:
    hidden, weight = case.hidden.detach().requires_grad_(), case.weight.detach().requires_grad_(not frozen)
    bias = None if case.bias is None else case.bias.detach().requires_grad_()
    parts, upstream = tensors(case, ranks), upstream_for(case)
    named = {"hidden": hidden, "weight": weight, "bias": bias} | {f"part {i}": x for i, x in enumerate(parts)}
    trained = {name: x for name, x in named.items() if x is not None and x.requires_grad}
    gold = oracle.token_stats(hidden, dense(weight, parts), case.labels, bias, case.head)
    want = oracle.grads(weigh(gold, upstream), list(trained.values()))

    stats = call(case, hidden, adapted(weight, parts), bias, mode=mode, **ALL_STATISTICS)
    got = torch.autograd.grad(weigh(stats, upstream), list(trained.values()))

    if case.labels.numel():
        size = torch.stack([u.abs().sum() for u in upstream.values()]).sum()
        assert_all(case, list(trained), list(got), want, size)
        values = [getattr(stats, name) for name in oracle.STATISTICS]
        assert_all(case, list(oracle.STATISTICS), values, [getattr(gold, n) for n in oracle.STATISTICS], size)
        assert torch.equal(stats.top1, gold.top1)
    else:
        assert not any(bool(g.any()) for g in got)


def problem(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, list[Tensor], Tensor]:
    """Hidden states, frozen weight, adapters of rank 3 and 2, labels; some tokens are ignored and NaN."""
    g = torch.Generator().manual_seed(4)
    hidden = torch.randn(1, 23, 8, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 41, (1, 23), generator=g)
    labels[0, 5:9] = -100
    weight = torch.randn(41, 8, generator=g, dtype=torch.float64)
    sizes = ((3, 8), (41, 3), (2, 8), (41, 2))
    parts = [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype).requires_grad_() for s in sizes]
    return hidden.to(dtype).requires_grad_(), weight.to(dtype), parts, labels


def context(cfg: Any, labels: Tensor) -> Any:
    items, bounds = [CELossContextInputItem(shifted_labels=labels)], [torch.tensor([0, labels.shape[1]])]
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs(items, cfg, bounds)
    return cfg.loss_ctx_cls(cfg, kwargs)


PLANS: dict[str, dict[str, Any]] = {
    "one pass": {"mode": "chunk", "chunk_size": 7},
    "two passes": {"mode": "chunk", "chunk_size": 7, "plan": "two_pass", "logits_budget": 7 * 41 * 8},
    "two passes, kept": {"mode": "chunk", "plan": "two_pass"},
    "retained": {"mode": "chunk", "allow_retain_graph": True},
    "eager": {"mode": "eager"},
}


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("plan", PLANS)
def test_a_loss(plan: str, dtype: torch.dtype) -> None:
    hidden, weight, parts, labels = problem(dtype)
    wide = [x.detach().double().requires_grad_() for x in (hidden, *parts)]
    (weights,) = ce.step_weights([labels])
    gold = ce.loss(wide[0], dense(weight.double(), wide[1:]), labels, weights)
    want = torch.autograd.grad(3 * gold, wide)
    with torch.no_grad():
        hidden[0, 5:9] = torch.nan
    loss, _ = context(CELossConfig(**PLANS[plan]), labels).forward(hidden, adapted(weight, parts))
    got = torch.autograd.grad(3 * loss, (hidden, *parts))
    budgets.assert_relative("loss", loss, gold, budgets.F32_LOSS)  # calibrated weights are float32, also in float64
    for i, (mine, theirs) in enumerate(zip(got, want, strict=True)):
        budgets.assert_relative(f"gradient {i}", mine, theirs, budgets.F32_GRADIENT)


@pytest.mark.parametrize("plan", PLANS)
def test_float32_adapters_on_a_low_precision_head(plan: str) -> None:
    """Judged three ways: the adapters' products keep float32, as peft's do."""
    hidden, weight, parts, labels = problem(torch.float32)
    low, weight = hidden.detach().bfloat16().requires_grad_(), weight.bfloat16()
    wide = [x.detach().double().requires_grad_() for x in (low, *parts)]
    gold = ce.loss(wide[0], dense(weight.double(), wide[1:]), labels, ce.step_weights([labels])[0])
    want = torch.autograd.grad(gold, wide)
    loss, info = context(CELossConfig(**PLANS[plan]), labels).forward(low, adapted(weight, parts))
    got = torch.autograd.grad(loss, (low, *parts))
    stats = oracle.token_stats(wide[0], dense(weight.double(), wide[1:]), labels)
    assert float((info.logprobs.double() - stats.logprobs).detach().abs().max()) <= budgets.BF16_LOGPROB_NATS
    for name, mine, theirs in zip(("hidden", *"abcd"), got, want, strict=True):
        assert mine.dtype == (torch.bfloat16 if name == "hidden" else torch.float32)
        budgets.assert_relative(name, mine, theirs, budgets.gradient_floor(torch.bfloat16))


def test_dropout_is_the_adapters_alone() -> None:
    hidden, weight, parts, labels = problem()
    mask = torch.rand(1, 23, 8, dtype=torch.float64).gt(0.5)
    head = LoraWeight(weight, (Lora(parts[0], parts[1], 2.0, lambda x: x * mask[0][labels[0] != -100] / 0.5),))
    stats = linear_logprobs(hidden, head, labels, mode="chunk", chunk_size=5)
    z = hidden @ weight.t() + 2.0 * (hidden * mask / 0.5) @ parts[0].t() @ parts[1].t()
    want = torch.log_softmax(z, -1).gather(-1, labels.clamp(min=0).unsqueeze(-1)).squeeze(-1) * (labels != -100)
    inputs = [hidden, *parts[:2]]
    got = torch.autograd.grad(stats.logprobs.square().sum(), inputs)
    budgets.assert_relative("logprobs", stats.logprobs, want, 64 * budgets.eps(torch.float64))
    for mine, gold in zip(got, torch.autograd.grad(want.square().sum(), inputs), strict=True):
        budgets.assert_relative("gradient", mine, gold, 64 * budgets.eps(torch.float64))


def test_detached_for_multi_token_prediction() -> None:
    hidden, weight, parts, labels = problem()
    ctx = context(MTPLossConfig(mtp_depth=1, detach_mtp_lm_head_weight=True), labels)
    loss, _ = ctx.forward(hidden, adapted(weight, parts))
    got = torch.autograd.grad(loss, [hidden, *parts], allow_unused=True)
    assert got[0] is not None and got[1:] == (None,) * 4


def test_no_gradient_wanted() -> None:
    hidden, weight, parts, labels = problem()
    with torch.no_grad():
        stats = linear_logprobs(hidden, adapted(weight, parts), labels, mode="chunk")
    want = oracle.token_stats(hidden, dense(weight, parts), labels)
    budgets.assert_relative("logprobs", stats.logprobs, want.logprobs, 64 * budgets.eps(torch.float64))
    assert not stats.logprobs.requires_grad


def test_a_plan_counts_adapters() -> None:
    hidden, weight, parts, labels = problem()
    ctx = context(CELossConfig(), labels)
    plain, plan = ctx.explain(hidden, weight), ctx.explain(hidden, adapted(weight, parts))
    assert plan.flops == plain.flops + 3 * 2 * 41 * 5 * 19
    assert plan.peak_bytes > plain.peak_bytes
    assert "adapters of rank 5" in str(plan)


def test_refused() -> None:
    _, weight, parts, labels = problem()
    a, b = (x.detach() for x in parts[:2])
    hidden = torch.randn(1, 23, 8, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"b of an adapter of rank 3 must be \(41, 3\); got \(3, 41\)"):
        LoraWeight(weight, (Lora(a, b.t()),))
    with pytest.raises(ShapeError, match=r"a of an adapter of rank 3 must be \(3, 8\); got \(3, 7\)"):
        LoraWeight(weight, (Lora(a[:, :7], b),))
    with pytest.raises(DtypeError, match="must be floating point"):
        LoraWeight(weight, (Lora(a.int(), b),))
    with pytest.raises(DeviceError, match="is on meta"):
        LoraWeight(weight, (Lora(a.to("meta"), b),))
    with pytest.raises(OptionError, match="needs an adapter"):
        LoraWeight(weight, ())
    with pytest.raises(OptionError, match=r"weight \[V, H\]"):
        LoraWeight(weight[0], (Lora(a, b),))
    with pytest.raises(UnsupportedError, match="mode='chunk' has none"):
        linear_logprobs(hidden, LoraWeight(weight, (Lora(a, b),)), labels, mode="chunk", kernels="no_logits")

    class Own(CELossConfig().loss_ctx_cls):  # type: ignore[misc]
        def loss_fn(self, *args: Any) -> Any:
            raise AssertionError("not reached")

    ctx = Own(CELossConfig(), context(CELossConfig(), labels).loss_kwargs)
    with pytest.raises(UnsupportedError, match="or has adapters: define token_loss"):
        ctx.forward(hidden, LoraWeight(weight, (Lora(a, b),)))
