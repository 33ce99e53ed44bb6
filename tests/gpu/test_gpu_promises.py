"""What the modes promise beyond right numbers, on the device.

Contract: a step makes the host wait for nothing; the same inputs give the same bits; memory above the inputs stays
within what `explain()` said; a row whose offset passes 2^31 is computed like any other.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from tests import budgets
from tests.gpu.families import ALL_LOSSES
from tests.gpu.lane import (
    DEVICE,
    DTYPES,
    INTERPRETED,
    MODES,
    PeakBytes,
    Shape,
    each_dtype,
    each_mode,
    need_free_bytes,
    no_sync,
)
from tests.gpu.problems import LOSSES, Inputs, LossCase, context_of, leaves_of, make_inputs
from xloss import BaseLossContextInputItem, LogProbConfig, linear_logprobs
from xloss_kernels.head_backward import head_dlogits
from xloss_kernels.head_forward import head_forward

PLANS = {
    "one-pass": {"plan": "one_pass", "chunk_size": 16},
    "two-pass": {"plan": "two_pass", "chunk_size": 16},
    "two-pass-recompute": {"plan": "two_pass", "chunk_size": 16, "logits_budget": 1},
    "no-logits": {"plan": "auto", "chunk_size": 16, "logits_budget": 0},
}
LOSS_NAMES = list(ALL_LOSSES)
if INTERPRETED:  # the harder half, to be quick
    PLANS = {name: run for name, run in PLANS.items() if name != "two-pass"}
    LOSS_NAMES = ["vanilla-k3-entropy", "own-sequence-loss", "dpo"]
each_run = pytest.mark.parametrize(
    "mode,run",
    [
        pytest.param(mode, run, id=f"{mode}-{name}")
        for mode in MODES
        for name, run in PLANS.items()
        if mode == "fused" or name != "no-logits"  # no other mode has kernels that write none
    ],
)
each_loss = pytest.mark.parametrize("loss", LOSS_NAMES)


def fit(case: LossCase, run: dict[str, Any]) -> dict[str, Any]:
    """The run options for a loss that may couple tokens."""
    return run if case.local or run["plan"] != "one_pass" else {**run, "plan": "auto"}


def grads_of(context: Any, leaves: list[Tensor], upstream: Tensor) -> list[Tensor]:
    """Everything a step makes: loss, log-probs, gradients."""
    loss, info = context.forward(*leaves)
    assert info.logprobs is not None
    return [loss.detach(), info.logprobs.detach(), *torch.autograd.grad(loss, leaves, upstream)]


# ---------------------------------------------------------------- syncs and bits


@each_run
@each_loss
def test_a_step_waits_for_nothing(loss: str, run: dict[str, Any], mode: str) -> None:
    """Forward and backward of a batch that was built before; the first step compiles kernels, the second is watched."""
    case, given = ALL_LOSSES[loss], make_inputs(DTYPES[1], bias=True)
    context, leaves = context_of(case, given, mode=mode, **fit(case, run)), leaves_of(given)
    upstream = torch.tensor(1.7, device=DEVICE)
    grads_of(context, leaves, upstream)
    with no_sync():
        grads_of(context, leaves, upstream)


@each_mode
def test_logprobs_wait_for_nothing(mode: str) -> None:
    given = make_inputs(DTYPES[1])
    hidden, weight = leaves_of(given)
    labels = given.batch.labels.to(DEVICE)

    def step() -> None:
        with torch.no_grad():
            linear_logprobs(hidden, weight, labels, mode=mode, return_entropy=True)
        linear_logprobs(hidden, weight, labels, mode=mode).logprobs.sum().backward()

    step()
    with no_sync():
        step()


@each_dtype
@each_run
@each_loss
def test_the_same_bits_every_time(loss: str, run: dict[str, Any], mode: str, dtype: torch.dtype) -> None:
    case, given = ALL_LOSSES[loss], make_inputs(dtype)
    upstream = torch.tensor(1.7, device=DEVICE)
    runs = [
        grads_of(context_of(case, given, mode=mode, **fit(case, run)), leaves_of(given), upstream)
        for _ in range(2 if INTERPRETED else 4)
    ]
    for again in runs[1:]:
        assert all(torch.equal(a, b) for a, b in zip(runs[0], again, strict=True))


# ---------------------------------------------------------------- memory

WIDE = Shape(300, 16, 1000) if INTERPRETED else Shape(4099, 512, 32003)


@each_dtype
@pytest.mark.parametrize("mode", ["chunk"] if INTERPRETED else ["fused", "chunk"])
@pytest.mark.parametrize("trained", ["both", "hidden", "weight"])
@pytest.mark.parametrize("plan", ["one_pass", "two_pass"])
@pytest.mark.parametrize("chunks", [1, 4])
def test_memory_is_what_explain_says(chunks: int, plan: str, trained: str, mode: str, dtype: torch.dtype) -> None:
    case, given = LOSSES["vanilla-k3-entropy"], wide_inputs(dtype)
    rows = -(-WIDE.tokens // chunks)
    options: dict[str, Any] = {"plan": plan, "chunk_size": rows, "logits_budget": rows * WIDE.vocab * 4}
    context, leaves = context_of(case, given, mode=mode, **options), leaves_of(given)
    wanted = [x.requires_grad_(trained in ("both", name)) for x, name in zip(leaves, ("hidden", "weight"), strict=True)]
    inputs = [x for x in wanted if x.requires_grad]
    promised = context.explain(*leaves)
    for _ in range(2):  # the first step brings cuBLAS's workspace and compiled kernels
        with PeakBytes() as peak:
            loss, _ = context.forward(*leaves)
            grads = torch.autograd.grad(loss, inputs)
        del loss, grads
    allowed = promised.peak_bytes + budgets.PEAK_SLACK_BYTES[DEVICE.type]
    assert peak.bytes <= allowed, f"{peak.bytes:,} bytes, {allowed:,} allowed\n{promised}"
    assert peak.bytes >= promised.logits_bytes, "the logits of a chunk must have been seen"


@each_dtype
@pytest.mark.parametrize("mode", ["chunk"] if INTERPRETED else ["fused", "chunk"])
def test_forward_only_holds_one_chunk(mode: str, dtype: torch.dtype) -> None:
    given = wide_inputs(dtype)
    cfg = LogProbConfig(mode=mode, chunk_size=WIDE.tokens // 4, return_entropy=True)
    cls = cfg.loss_ctx_cls
    item = BaseLossContextInputItem(shifted_labels=given.batch.labels.to(DEVICE))
    context, leaves = cls(cfg, cls.build_batches_loss_kwargs([item], cfg)[0]), leaves_of(given)
    for _ in range(2):
        with torch.no_grad(), PeakBytes() as peak:
            promised = context.explain(*leaves)
            context.forward(*leaves)
    allowed = promised.peak_bytes + budgets.PEAK_SLACK_BYTES[DEVICE.type]
    assert promised.logits_bytes <= peak.bytes <= allowed, f"{peak.bytes:,} bytes, {allowed:,} allowed\n{promised}"


def wide_inputs(dtype: torch.dtype) -> Inputs:
    """Nothing ignored, so that sizes are as they look; the numbers do not matter."""
    g = torch.Generator().manual_seed(0)
    batch = make_inputs(torch.float32, shape=Shape(WIDE.tokens, 2, 3)).batch
    batch.labels = torch.randint(0, WIDE.vocab, (1, WIDE.tokens), generator=g)
    batch.advantages = batch.advantages + 10
    hidden = torch.randn(1, WIDE.tokens, WIDE.hidden, generator=g).to(dtype)
    weight = torch.randn(WIDE.vocab, WIDE.hidden, generator=g).to(dtype)
    return Inputs(hidden, weight, None, batch, make_inputs(torch.float32, shape=Shape(1, 1, 1)).head)


# ---------------------------------------------------------------- offsets past 2^31

LARGE = Shape(40, 16, 300) if INTERPRETED else Shape(16_901, 64, 131_101)  # 2.2e9 logits on CUDA
PROBES = 6  # rows looked at: the first, the last, some between


def large_problem(dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Hidden states, weight, labels and an upstream gradient, made on the device."""
    assert INTERPRETED or LARGE.tokens * LARGE.vocab > 2**31
    g = torch.Generator(DEVICE).manual_seed(0)
    options: dict[str, Any] = {"generator": g, "device": DEVICE}
    hidden = torch.randn(LARGE.tokens, LARGE.hidden, **options).to(dtype)
    weight = (torch.randn(LARGE.vocab, LARGE.hidden, **options) / LARGE.hidden**0.5).to(dtype)
    labels = torch.randint(0, LARGE.vocab, (LARGE.tokens,), **options)
    labels[1::3] = -100
    labels[-1] = LARGE.vocab - 1
    return hidden, weight, labels, torch.randn(LARGE.tokens, **options)


def probe_gold(hidden: Tensor, weight: Tensor, labels: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Rows looked at, their log-probs, and their gradient by the logits, in float64 by autograd."""
    live = (labels != -100).nonzero().flatten()
    rows = live[torch.linspace(0, live.numel() - 1, PROBES, device=DEVICE).round().long()]
    z = (hidden[rows].double() @ weight.double().t()).requires_grad_()
    lp = z.log_softmax(1).gather(1, labels[rows].unsqueeze(1)).squeeze(1)
    (d_z,) = torch.autograd.grad((lp * upstream[rows].double()).sum(), z)
    return rows, lp.detach(), d_z


@each_mode
@pytest.mark.parametrize("plan", ["all at once", "kernel chunks"])
def test_more_logits_than_int32_counts(plan: str, mode: str) -> None:
    """One buffer of all logits, so that offsets in it pass 2^31; and the default chunks, in which they do not."""
    need_free_bytes(4 * LARGE.tokens * LARGE.vocab * 3 // 2 + 2**31)
    dtype = DTYPES[1]
    hidden, weight, labels, upstream = large_problem(dtype)
    inputs = [hidden.requires_grad_(), weight.requires_grad_()]
    size = LARGE.tokens if plan == "all at once" else None
    stats = linear_logprobs(*inputs, labels, mode=mode, chunk_size=size)
    d_hidden, d_weight = torch.autograd.grad((stats.logprobs * upstream).sum(), inputs)
    rows, lp, d_z = probe_gold(hidden.detach(), weight.detach(), labels, upstream)
    assert float((stats.logprobs.detach()[rows].double() - lp).abs().max()) <= budgets.BF16_LOGPROB_NATS
    want = d_z @ weight.detach().double()
    assert budgets.error(d_hidden[rows], want) <= budgets.gradient_floor(dtype) * budgets.norm(want)
    assert bool((d_hidden[labels == -100] == 0).all()) and bool(d_weight.isfinite().all())
    # columns of dW: d_weight[v] = sum_t dz[t, v] h[t], with dz from the log-probs of those columns alone
    columns = torch.tensor([0, 7, LARGE.vocab - 1], device=DEVICE)
    z = hidden.detach().double() @ weight.detach()[columns].double().t()
    p = (z - stats.lse.detach().double().unsqueeze(1)).exp()
    live = (labels != -100).unsqueeze(1)
    d_columns = torch.where(live, upstream.double().unsqueeze(1) * ((labels.unsqueeze(1) == columns).double() - p), 0)
    want = d_columns.t() @ hidden.detach().double()
    assert budgets.error(d_weight[columns], want) <= 4 * budgets.gradient_floor(dtype) * budgets.norm(want)


def test_head_kernels_past_int32() -> None:
    """head_dlogits writes as many dlogits; head_forward reads operands and writes partials, and no logits."""
    need_free_bytes(2 * LARGE.tokens * LARGE.vocab * 3 // 2 + 2**31)
    dtype = DTYPES[1]
    hidden, weight, labels, upstream = large_problem(dtype)
    partials, label_logits = head_forward(hidden, weight, labels)
    merged = partials[:, 0].amax(0)
    lse = merged + (partials[:, 1] * (partials[:, 0] - merged).exp()).sum(0).log()
    rows, lp, d_z = probe_gold(hidden, weight, labels, upstream)
    assert float(((label_logits - lse)[rows].double() - lp).abs().max()) <= budgets.BF16_LOGPROB_NATS
    written = head_dlogits(hidden, weight, labels, lse, d_logprobs=upstream)
    assert budgets.error(written[rows].cpu(), d_z.cpu()) <= budgets.gradient_floor(dtype) * budgets.norm(d_z)
    assert labels[1] == -100 and bool((written[1] == 0).all())
