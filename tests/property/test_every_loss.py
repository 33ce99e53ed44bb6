"""What holds for every loss there is, and for every option of each: cases come from the registries (`registry`).

Contract: in float64, loss, gradients of hidden states, weight and bias, and metrics are the same in eager mode and in
chunks of any size, in one pass and in two; packed, padded, in any order of sequences, and however the step is cut into
micro-batches, whatever the reduction. NaN, inf or -inf at ignored tokens of any field change not one bit. What is left
of a micro-batch without a token of the loss is a differentiable 0. A per-token formula has the gradient of its value,
what it detaches held constant. bfloat16 and float16 give float32's gradients, rounded. Configs are frozen, load what
they dump, and name a misspelt field; no field is without effect. Every policy loss, whatever its fields, is its oracle.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise, product
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import xloss
from tests import budgets
from tests.oracle import policies
from tests.property import registry
from tests.property.registry import PLAIN, policy, policy_forms
from tests.property.world import LAYOUTS, LENGTHS, WHOLE, Case, Layout, Result, World, assert_equal, assert_same
from xloss import BaseLossConfig, GRPOLossConfig, PreferenceLossConfig
from xloss.errors import UnsupportedError
from xloss.losses.policies import policy_losses
from xloss.losses.preferences import preference_losses

WORLD, FAR = World(), World(1, 1.5)
FAMILIES = registry.every_case()
CASES = [case for family in FAMILIES.values() for case in family.values()]
every_loss = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
every_family = pytest.mark.parametrize("cases", FAMILIES.values(), ids=FAMILIES)
RUNS: list[dict[str, Any]] = [{"mode": "eager"}, {"mode": "chunk"}, {"mode": "chunk", "plan": "two_pass"}]


def each(cases: dict[str, Case], check: Callable[[Case], None]) -> None:
    """`check` of every case; an error says of which."""
    for name, case in cases.items():
        try:
            check(case)
        except BaseException as error:
            error.add_note(f"in case {name}")
            raise


def ask(case: Case, layout: Layout = WHOLE, world: World = WORLD, **run: Any) -> Result:
    return world.run(case, layout, **({"mode": "chunk"} | run))


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


# -- per-token formulas ------------------------------------------------------------------------------------------------


class Constant:
    """A function whose `detach()`ed tensors are those of its first call: the constants of a stopped gradient."""

    def __init__(self, fn: Callable[..., Tensor]) -> None:
        self.fn = fn
        self.kept: list[Tensor] | None = None

    def __call__(self, *inputs: Tensor) -> Tensor:
        detach, first, calls = Tensor.detach, self.kept is None, iter(self.kept or ())
        seen: list[Tensor] = []

        def kept(x: Tensor) -> Tensor:
            seen.append(detach(x).clone() if first else next(calls))
            return detach(x) if first else seen[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Tensor, "detach", kept)
            out = self.fn(*inputs)
        self.kept = seen
        return out


def formula(case: Case) -> tuple[Callable[..., Tensor], list[Tensor]]:
    """`token_loss` of a case as a function of the statistics it reads, and those statistics."""
    (ctx,) = WORLD.build(case, mode="eager")
    (args,), (more,), _ = WORLD.inputs(case)
    seen: list[Any] = []
    own = type(ctx).token_loss

    def spy(stats: Any, kwargs: Any) -> Any:
        seen.append((stats, kwargs))
        return own(ctx, stats, kwargs)

    ctx.token_loss = spy
    ctx.forward(*args, **more)
    ((stats, kwargs),) = seen
    given = {f.name: getattr(stats, f.name) for f in fields(stats)}
    names = [n for n, x in given.items() if x is not None and n != "top1"]

    def fn(*values: Tensor) -> Tensor:
        out = own(ctx, type(stats)(**(given | dict(zip(names, values, strict=True)))), kwargs)
        loss: Tensor = out[0] if isinstance(out, tuple) else out
        return loss

    return fn, [given[n].detach().clone().requires_grad_() for n in names]


@every_family
def test_gradcheck(cases: dict[str, Case]) -> None:
    each(cases, slope_is_right)


def slope_is_right(case: Case) -> None:
    fn, inputs = formula(case)
    assert torch.autograd.gradcheck(Constant(fn), inputs, fast_mode=True, **budgets.GRADCHECK)


def test_gradcheck_sees_a_wrong_slope() -> None:
    x = torch.randn(5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(Constant(lambda x: x.detach() * x), (x,), **budgets.GRADCHECK)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        torch.autograd.gradcheck(Constant(lambda x: x.square() + 1e-3 * (x - x.data)), (x,), **budgets.GRADCHECK)


# -- half precision ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
@every_loss
def test_half_precision(case: Case, dtype: torch.dtype) -> None:
    world = WORLD.rounded(dtype)
    got, want = ask(case, world=world, dtype=dtype), ask(case, world=world, dtype=torch.float32)
    for name, grad in got.grads.items():
        assert bool(torch.isfinite(grad).all()), name
        budgets.assert_relative(f"d {name}", grad, want.grads[name], budgets.gradient_floor(dtype))


# -- configs -----------------------------------------------------------------------------------------------------------


@every_family
def test_config_comes_back(cases: dict[str, Case]) -> None:
    each(cases, comes_back)


def comes_back(case: Case) -> None:
    cfg = case.make()
    cls = type(cfg)
    assert cls.model_validate(cfg.model_dump()) == cfg
    assert cls.model_validate_json(cfg.model_dump_json()) == cfg
    assert copy.deepcopy(cfg) == cfg
    assert pickle.loads(pickle.dumps(cfg)) == cfg


@every_loss
def test_config_is_strict(case: Case) -> None:
    cfg = case.make()
    with pytest.raises(ValidationError, match="frozen"):
        cfg.chunk_size = 3
    for part in (cfg, *(getattr(cfg, n) for n in ("policy_loss_cfg", "value_loss") if hasattr(cfg, n))):
        if part is not None:
            name = next(
                n for n in reversed(type(part).model_fields) if n != "loss_type" or len(type(part).model_fields) == 1
            )
            with pytest.raises(ValidationError, match=f"Did you mean '{name}'"):
                type(part).model_validate(part.model_dump() | {name + "x": 1})


def differ(a: Result, b: Result) -> bool:
    return not torch.equal(a.loss, b.loss) or any(not torch.equal(a.grads[n], b.grads[n]) for n in a.grads)


@pytest.mark.parametrize("name", policy_losses())
def test_every_field_of_a_policy_counts(name: str) -> None:
    cls = policy_losses()[name]
    bases = [registry.example(cls) | more for more in ({}, *registry.TOGETHER.get(name, []))]
    worlds = (FAR, WORLD, World(2, 1.5))
    for field in registry.own_fields(cls):
        if not registry.candidates(cls.model_fields[field]):
            continue  # a tag
        found = (
            differ(ask(policy({"loss_type": name} | other), world=w), ask(policy({"loss_type": name} | base), world=w))
            for w in worlds
            for base in bases
            for other in registry.moved(cls, base, cls, (field,), numbers=len(registry.NUMBERS))
        )
        assert any(found), f"{field} of {name} changes nothing"


def test_every_config_is_here() -> None:
    """A config class, a policy loss or a preference term that is added is in all of these tests, or this one fails."""
    made = {type(case.make()) for case in CASES}
    known = {getattr(xloss, name) for name in xloss.__all__}
    known = {cls for cls in known if isinstance(cls, type) and issubclass(cls, BaseLossConfig)} - {BaseLossConfig}
    assert made == known
    configs = [case.make() for case in PLAIN.values()]
    assert {c.policy_loss_cfg.loss_type for c in configs if isinstance(c, GRPOLossConfig)} == policy_losses().keys()
    terms = {t.loss_type for c in configs if isinstance(c, PreferenceLossConfig) for t in c.loss_type}
    assert terms == preference_losses().keys()


NOT_MOVED = {"layout"}
"""`layout` names pairs that are not numbered; here they are."""


def test_every_field_of_a_config_is_moved() -> None:
    configs = [case.make() for case in CASES]
    for cls in {type(cfg) for cfg in configs}:
        parents = [base for base in cls.__mro__[1:] if base in {type(cfg) for cfg in configs}]
        for name in {*registry.own_fields(cls, BaseLossConfig, *parents)} - NOT_MOVED:
            default = cls.model_fields[name].default
            values = [getattr(cfg, name) for cfg in configs if isinstance(cfg, cls)]
            assert any(value != default for value in values), f"{name} of {cls.__name__} is at its default in all cases"


# -- oracles -----------------------------------------------------------------------------------------------------------


def test_every_policy_has_an_oracle() -> None:
    assert policies.POLICIES.keys() == policy_losses().keys()


@pytest.mark.parametrize("name", policy_losses())
def test_oracle(name: str) -> None:
    """Ratios near 1 and far from it. What a loss draws at random, its own tests know."""
    for form in policy_forms(name):
        case = policy(form)
        for world in () if case.by_place else (WORLD, FAR):
            assert_oracle(form, case, world)


def assert_oracle(form: dict[str, Any], case: Case, world: World) -> None:
    cls, t = policy_losses()[form["loss_type"]], world.by_token
    leaves = [x.clone().requires_grad_() for x in (t["hidden"], world.head["weight"], world.head["bias"])]
    logits = (leaves[0] @ leaves[1].T + leaves[2]) / t["temperature"][:, None]
    lp = torch.log_softmax(logits, -1).gather(1, t["shifted_labels"].clamp(min=0)[:, None])[:, 0]
    tokens = policies.Tokens(
        lp,
        t["old_logprobs"],
        t["advantages"],
        world.live,
        list(pairwise(world.bounds)),
        t["ref_logprobs"],
        t["is_weights"] if cls.folds_is_weights else None,
        t["group_ids"],
        t["rollout_logprobs"],
    )
    losses = policies.per_token(form["loss_type"], tokens, case.make().policy_loss_cfg.model_dump())
    if not cls.folds_is_weights:
        losses = losses * t["is_weights"]
    loss = losses[world.live].sum() / world.live.sum()
    grads = torch.autograd.grad(1.7 * loss, leaves)
    got = ask(case, world=world)
    budgets.assert_relative("loss", got.loss, loss.detach(), budgets.F32_LOSS)
    for name, want in zip(("hidden", "weight", "bias"), grads, strict=True):
        budgets.assert_relative(f"d {name}", got.grads[name], want, budgets.F32_GRADIENT)
