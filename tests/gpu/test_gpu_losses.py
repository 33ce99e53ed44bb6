"""Every loss in every mode and plan on the device, against float64.

Contract: for all losses, built in and a user's own, for shapes that are no multiple of anything, the loss, log-probs
and gradients are as close to the float64 oracle on the same inputs as the eager mode in the same dtype is, up to a
factor and to the roundings of the dtype (tests/budgets.py); log-probs of low precision within 2e-3 nat.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch

from tests import budgets
from tests.gpu.families import ALL_LOSSES
from tests.gpu.lane import INTERPRETED, MODES, SMALL, Shape, each_dtype, each_mode, on_device
from tests.gpu.problems import (
    LOSSES,
    Inputs,
    LossCase,
    Outcome,
    context_of,
    gold_case,
    leaves_of,
    make_inputs,
    run_case,
)
from tests.oracle import head
from xloss import BaseLossContextInputItem, LogProbConfig, linear_logprobs

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "head": {"options": head.Head(temperature=0.7, softcap=5.0, logit_scale=0.8), "bias": True},
}
RUNS: dict[str, dict[str, Any]] = {
    "one-pass": {"plan": "one_pass"},
    "one-pass-chunks": {"plan": "one_pass", "chunk_size": SMALL.tokens // 3},
    "two-pass": {"plan": "two_pass"},
    "two-pass-recompute": {"plan": "two_pass", "chunk_size": SMALL.tokens // 3, "logits_budget": 1},
    "no-logits": {"logits_budget": 0, "chunk_size": SMALL.tokens // 2},
}
if INTERPRETED:  # the harder half, to be quick
    HEADS = {"head": HEADS["head"]}
    RUNS = {name: run for name, run in RUNS.items() if "chunk_size" in run}
MODE_RUNS = [
    pytest.param(mode, run, id=f"{mode}-{name}")
    for mode in MODES
    for name, run in RUNS.items()
    if mode == "fused" or name != "no-logits"  # no other mode has kernels that write none
]


@cache
def references(loss: str, head_name: str, dtype: torch.dtype) -> tuple[Inputs, Outcome, Outcome]:
    """Inputs, the oracle's result and eager's on the device; the same for every mode and plan."""
    given = make_inputs(dtype, **HEADS[head_name])
    return given, gold_case(ALL_LOSSES[loss], given), run_case(ALL_LOSSES[loss], given, mode="eager")


def assert_outcome(ours: Outcome, base: Outcome, gold: Outcome, dtype: torch.dtype) -> None:
    assert gold.terms is not None
    budgets.assert_loss(ours.loss, base.loss, gold.loss, gold.terms, dtype)
    budgets.assert_statistic("logprobs", ours.logprobs, base.logprobs, gold.logprobs, dtype)
    for name, mine, eager, exact in zip(("hidden", "weight", "bias"), ours.grads, base.grads, gold.grads, strict=False):
        assert mine.dtype == dtype
        budgets.assert_gradient(f"d {name}", mine, eager, exact)


@each_dtype
@pytest.mark.parametrize("mode,run", MODE_RUNS)
@pytest.mark.parametrize("head_name", HEADS)
@pytest.mark.parametrize("loss", ALL_LOSSES)
def test_losses(loss: str, head_name: str, run: dict[str, Any], mode: str, dtype: torch.dtype) -> None:
    case = ALL_LOSSES[loss]
    if not case.local and run.get("plan") == "one_pass":
        run = {**run, "plan": "auto"}  # couples tokens: takes two passes by itself
    given, gold, base = references(loss, head_name, dtype)
    ours = run_case(case, given, mode=mode, **run)
    assert ours.info is not None and ours.info.plan.mode == mode
    wanted = "one-pass" if case.local and run.get("plan") != "two_pass" else "two-pass"
    assert ours.info.plan.kind == wanted, ours.info.plan
    assert ours.info.plan.kernels == ("no_logits" if run.get("logits_budget") == 0 else "chunked_logits")
    assert_outcome(ours, base, gold, dtype)


@each_dtype
@each_mode
@pytest.mark.parametrize("chunk_size", [None, SMALL.tokens // 4])
def test_forward_only(chunk_size: int | None, mode: str, dtype: torch.dtype) -> None:
    given = make_inputs(dtype, **HEADS["head"])
    found = []
    for run in ({"mode": mode, "chunk_size": chunk_size}, {"mode": "eager"}):
        cfg = LogProbConfig(temperature=0.7, softcap=5.0, logit_scale=0.8, return_entropy=True, **run)
        cls, item = cfg.loss_ctx_cls, BaseLossContextInputItem(shifted_labels=on_device(given.batch.labels))
        with torch.no_grad():
            ctx = cls(cfg, cls.build_batches_loss_kwargs([item], cfg)[0])
            _, info = ctx.forward(*leaves_of(given))
        assert info.plan.kind == ("forward-only" if run["mode"] == mode else "eager")
        found.append({"logprobs": info.logprobs.cpu(), "entropy": info.entropy.cpu()})
    gold = head.token_stats(given.hidden, given.weight, given.batch.labels, given.bias, given.head)
    for name, ours in found[0].items():
        budgets.assert_statistic(name, ours, found[1][name], getattr(gold, name), dtype)


@each_dtype
@each_mode
def test_every_statistic(mode: str, dtype: torch.dtype) -> None:
    """Several labels a token, a temperature for each, an upstream gradient of its own for every statistic."""
    given = make_inputs(dtype)
    g = torch.Generator().manual_seed(1)
    labels = torch.randint(0, SMALL.vocab, (1, SMALL.tokens, 3), generator=g)
    labels[0, 3], labels[0, 5, 1] = -100, -100
    temperature = 0.5 + torch.rand(1, SMALL.tokens, generator=g)
    leaves = head.leaves(given.hidden, given.weight)
    gold = head.token_stats(*leaves, labels, head=head.Head(temperature))
    upstream = {n: torch.randn(getattr(gold, n).shape, generator=g) for n in head.STATISTICS}
    exact = head.grads(sum((u * getattr(gold, n)).sum() for n, u in upstream.items()), leaves)
    found = []
    for each in (mode, "eager"):
        inputs = [on_device(x).requires_grad_() for x in (given.hidden, given.weight)]
        stats = linear_logprobs(
            *inputs, on_device(labels), mode=each, temperature=on_device(temperature),
            chunk_size=None if each == "eager" else SMALL.tokens // 2, return_entropy=True, return_mean_logit=True,
            return_sum_p2=True, return_top1=True)  # fmt: skip
        total = sum((on_device(u) * getattr(stats, n)).sum() for n, u in upstream.items())
        found.append((stats, torch.autograd.grad(total, inputs)))
    (ours, grads), (base, eager) = found
    for name in head.STATISTICS:
        mine, theirs = (getattr(x, name).detach().cpu() for x in (ours, base))
        budgets.assert_statistic(name, mine, theirs, getattr(gold, name).detach(), dtype)
    if dtype == torch.float32:
        assert torch.equal(ours.top1.cpu(), gold.top1)
    for name, mine, theirs, want in zip(("hidden", "weight"), grads, eager, exact, strict=True):
        budgets.assert_gradient(f"d {name}", mine.cpu(), theirs.cpu(), want)


@each_dtype
@each_mode
@pytest.mark.parametrize(
    "shape",
    [Shape(1, 1, 1), Shape(1, 7, 2), Shape(3, 33, 65), Shape(17, 8, 129)],
    ids=lambda s: f"{s.tokens}x{s.vocab}",
)
def test_shapes_smaller_than_any_block(shape: Shape, mode: str, dtype: torch.dtype) -> None:
    case, given = LOSSES["vanilla-k3-entropy"], make_inputs(dtype, shape=shape)
    for plan in ("one_pass", "two_pass"):
        ours = run_case(case, given, mode=mode, plan=plan)
        assert_outcome(ours, run_case(case, given, mode="eager"), gold_case(case, given), dtype)


@each_mode
def test_nothing_live(mode: str) -> None:
    """All labels ignored, NaN in the hidden states: a loss of 0 and gradients of 0."""
    given = make_inputs(torch.float32)
    given.batch.labels.fill_(-100)
    given.hidden.fill_(torch.nan)
    for name in ("ce", "vanilla-k3-entropy", "cispo"):
        out = run_case(LOSSES[name], given, mode=mode)
        assert out.loss == 0 and all(bool((g == 0).all()) for g in out.grads), name


@each_mode
def test_a_frozen_half_changes_nothing(mode: str) -> None:
    """Gradients of hidden states alone, or of the weight alone, are those of both."""
    case: LossCase = LOSSES["vanilla"]
    given = make_inputs(torch.float32)
    both = run_case(case, given, mode=mode).grads
    for index in (0, 1):
        inputs = [on_device(x) for x in (given.hidden, given.weight)]
        leaf = inputs[index].requires_grad_()
        loss, _ = context_of(case, given, mode=mode).forward(*inputs)
        assert torch.equal(torch.autograd.grad(loss * 1.7, leaf)[0].cpu(), both[index])
