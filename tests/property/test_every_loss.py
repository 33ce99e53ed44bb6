"""What holds for every loss there is, and for every option of each: cases come from the registries (`registry`).

Contract: in float64, loss, gradients of hidden states, weight and bias, and metrics are the same in eager mode and in
chunks of any size, in one pass and in two; packed, padded, in any order of sequences, and however the step is cut into
micro-batches, whatever the reduction. NaN, inf or -inf at ignored tokens of any field change not one bit. What is left
of a micro-batch without a token of the loss is a differentiable 0. bfloat16 and float16 give float32's gradients,
rounded.
"""

from __future__ import annotations

import copy
import pickle
from itertools import product
from typing import Any

import pytest
import torch

from tests import budgets
from tests.property import registry
from tests.property.registry import PLAIN
from tests.property.same import assert_equal, assert_same, each
from tests.property.world import LAYOUTS, LENGTHS, WORLD, Case, Layout, ask
from xloss.errors import UnsupportedError

FAMILIES = registry.every_case()
CASES = [case for family in FAMILIES.values() for case in family.values()]
every_loss = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
every_family = pytest.mark.parametrize("cases", FAMILIES.values(), ids=FAMILIES)
RUNS: list[dict[str, Any]] = [{"mode": "eager"}, {"mode": "chunk"}, {"mode": "chunk", "plan": "two_pass"}]


# -- the same loss -----------------------------------------------------------------------------------------------------


@every_loss
@pytest.mark.parametrize("plan", ["auto", "two_pass"])
def test_chunks_and_plans(case: Case, plan: str) -> None:
    want = ask(case, mode="eager")
    for chunk_size in (1, 3, 7, None):
        assert_same(ask(case, chunk_size=chunk_size, plan=plan), want)


@every_family
def test_options_in_chunks(cases: dict[str, Case]) -> None:
    each(cases, same_in_chunks)


def same_in_chunks(case: Case) -> None:
    want = ask(case, mode="eager")
    assert_same(ask(case, chunk_size=7), want)
    skipped = ask(case, skip_zero_grad_rows=True)  # rows that promise a gradient of 0 keep it; metrics lose them
    skipped.metrics = want.metrics
    assert_same(skipped, want)


@every_family
def test_layouts(cases: dict[str, Case]) -> None:
    each(cases, same_in_layouts)


def same_in_layouts(case: Case) -> None:
    """To float32, the precision of calibrated weights."""
    want = ask(case)
    for name, layout in LAYOUTS.items():
        if not (case.by_place or (case.by_rank and name.startswith("cut"))):
            assert_same(ask(case, layout), want, relative=budgets.F32_GRADIENT)


@every_family
def test_poison(cases: dict[str, Case]) -> None:
    each(cases, deaf_to_poison)


def deaf_to_poison(case: Case) -> None:
    want = ask(case)
    assert_equal(ask(case, poison=torch.nan), want)
    assert_equal(ask(case, poison=torch.inf), want)
    assert_same(ask(case, poison=-torch.inf, mode="eager"), want)


@every_loss
def test_one_pass_is_for_losses_of_each_token(case: Case) -> None:
    """The plan says so before and after; what is refused is refused with a reason."""
    (ctx,) = WORLD.build(case, mode="chunk")
    (args,), (more,), _ = WORLD.inputs(case)
    planned = ctx.explain(*args, **{n: x for n, x in more.items() if n != "values"})
    _, info = ctx.forward(*args, **more)
    assert str(planned) == str(info.plan) == str(ctx.explain())
    if ctx.is_token_local():
        assert planned.kind == "one-pass"
        return
    assert planned.kind == "two-pass"
    assert ctx.why_coupled() in str(planned)
    with pytest.raises(UnsupportedError, match="plan='one_pass' needs a loss of each token alone"):
        ask(case, plan="one_pass")


@every_loss
def test_without_gradient(case: Case) -> None:
    want = ask(case)
    for quiet in (torch.no_grad, torch.inference_mode):
        (ctx,) = WORLD.build(case, mode="chunk")
        (args,), (more,), _ = WORLD.inputs(case)
        with quiet():
            loss, info = ctx.forward(*args, **more)
        assert info.plan.kind == "forward-only" and not loss.requires_grad
        if loss.ndim == 0:
            budgets.assert_rounding("loss", loss, want.loss, 10.0, 1.0)


@every_loss
def test_backward_twice(case: Case) -> None:
    (ctx,) = WORLD.build(case, mode="chunk", allow_retain_graph=True)
    (args,), (more,), leaves = WORLD.inputs(case)
    loss = ctx.forward(*args, **more)[0].sum()
    inputs = [x for xs in leaves.values() for x in xs]
    once = torch.autograd.grad(loss, inputs, retain_graph=True, materialize_grads=True, allow_unused=True)
    twice = torch.autograd.grad(2 * loss, inputs, materialize_grads=True, allow_unused=True)
    for a, b in zip(once, twice, strict=True):
        assert torch.equal(2 * a, b)


# -- building batches --------------------------------------------------------------------------------------------------


@every_loss
def test_contexts_built_one_by_one(case: Case) -> None:
    """`build_batches` fills in what `build_batches_loss_kwargs` does, and again when called again."""
    layout, cfg = LAYOUTS["cut"], case.make()
    live = WORLD.live_hidden(cfg)
    items = [WORLD.item(case, batch, True, torch.float64, None, live) for batch in layout.batches]
    ours = [cfg.build({name: getattr(item, name) for name in type(item).model_fields}) for item in items]
    bounds = [torch.tensor([0, *(LENGTHS[i] for i in batch)]).cumsum(0) for batch in layout.batches]
    for _ in range(2):
        cfg.loss_ctx_cls.build_batches(ours, bounds)
        for a, b in zip(ours, WORLD.build(case, layout), strict=True):
            assert a.loss_kwargs.built_metrics.keys() == b.loss_kwargs.built_metrics.keys()
            for name in type(a.loss_kwargs).model_fields:
                x, y = getattr(a.loss_kwargs, name), getattr(b.loss_kwargs, name)
                assert (x is None and y is None) or torch.equal(x, y), name


@every_loss
def test_cat(case: Case) -> None:
    """Micro-batches joined after calibration."""
    if case.by_rank:
        return
    layout = LAYOUTS["cut"]
    want = ask(case, layout)
    joined = type(want.contexts[0]).cat(want.contexts)
    whole = Layout((sum(layout.batches, ()),))
    (args,), (more,), _ = WORLD.inputs(case, whole)
    loss, _ = joined.forward(*args, **more)
    if loss.ndim == 0:
        budgets.assert_rounding("loss", loss, want.loss, 10.0, 1.0)


# -- nothing to learn --------------------------------------------------------------------------------------------------


@every_loss
def test_all_ignored(case: Case) -> None:
    names = ask(case).metrics.keys()
    for packed, run in product((True, False), RUNS):
        got = ask(case, Layout(((8, 9),), packed), poison=torch.nan, **run)
        assert float(got.loss) == 0
        assert all(bool((grad == 0).all()) for grad in got.grads.values())
        assert got.metrics.keys() == names
        assert all(bool(torch.isfinite(x)) for x in got.metrics.values())


@every_loss
def test_tiny(case: Case) -> None:
    """No token, five, and one where a sequence may be alone."""
    alone = () if "pair_ids" in case.fields else ((1,),)
    for sequences, run in product(((), (0, 1), *alone), RUNS):
        got = ask(case, Layout((sequences,)), **run)
        for x in (got.loss, *got.grads.values(), *got.metrics.values()):
            assert bool(torch.isfinite(x).all())


# -- half precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_loss
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    world = WORLD.rounded(dtype)
    got, want = ask(case, world=world, dtype=dtype), ask(case, world=world, dtype=torch.float32)
    for name, grad in got.grads.items():
        assert bool(torch.isfinite(grad).all()), name
        budgets.assert_relative(f"d {name}", grad, want.grads[name], budgets.gradient_floor(dtype))


@every_loss
def test_autocast(case: Case) -> None:
    """Weights and hidden states in float32 that bfloat16 holds: the products are exact, gradients rounded."""
    world = WORLD.rounded(torch.bfloat16)
    want = ask(case, world=world, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ask(case, world=world, dtype=torch.float32)
    assert got.loss.dtype == torch.float32
    for name, grad in got.grads.items():
        budgets.assert_relative(f"d {name}", grad, want.grads[name], 2 * budgets.gradient_floor(torch.bfloat16))


@every_loss
def test_copies_of_a_context(case: Case) -> None:
    """A batch that went through another process is the same batch."""
    (args,), (more,), _ = WORLD.inputs(case)
    (ctx,) = WORLD.build(case, mode="chunk")
    want, _ = ctx.forward(*args, **more)
    for kwargs in (copy.deepcopy(ctx.loss_kwargs), pickle.loads(pickle.dumps(ctx.loss_kwargs))):
        assert torch.equal(type(ctx)(ctx.loss_cfg, kwargs).forward(*args, **more)[0], want)
