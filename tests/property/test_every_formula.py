"""What holds for the config and the formula of every loss there is: cases come from the registries (`registry`).

Contract: every config class, policy loss and preference term is among the cases of these tests, and every field of each
is moved by one. Configs are frozen, load what they dump, and name a misspelt field; no field of a policy loss is
without effect. A per-token formula has the gradient of its value, what it detaches held constant. Every policy loss,
whatever its fields, is its oracle.
"""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from dataclasses import fields
from itertools import pairwise
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

import xloss
from tests import budgets
from tests.oracle import policies
from tests.property import fields as fields_of
from tests.property import registry
from tests.property.registry import PLAIN, policy, policy_forms
from tests.property.same import each
from tests.property.world import WORLD, Case, Result, World, ask
from xloss import BaseLossConfig, GRPOLossConfig, PreferenceLossConfig
from xloss.losses.policies import policy_losses
from xloss.losses.preferences import preference_losses

FAR = World(1, 1.5)
FAMILIES = registry.every_case()
CASES = [case for family in FAMILIES.values() for case in family.values()]
every_loss = pytest.mark.parametrize("case", PLAIN.values(), ids=PLAIN)
every_family = pytest.mark.parametrize("cases", FAMILIES.values(), ids=FAMILIES)


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
    bases = [cls.example | more for more in ({}, *registry.TOGETHER.get(name, []))]
    worlds = (FAR, WORLD, World(2, 1.5))
    for field in fields_of.own_fields(cls):
        if not fields_of.candidates(cls.model_fields[field]):
            continue  # a tag
        found = (
            differ(ask(policy({"loss_type": name} | other), world=w), ask(policy({"loss_type": name} | base), world=w))
            for w in worlds
            for base in bases
            for other in fields_of.moved(cls, base, cls, (field,), numbers=len(fields_of.NUMBERS))
        )
        assert any(found), f"{field} of {name} changes nothing"


def of_xloss(registry: dict[str, type]) -> set[str]:
    """Names of xloss's own losses; other tests of this process may have registered theirs."""
    return {name for name, cls in registry.items() if cls.__module__.startswith("xloss.")}


def test_every_config_is_here() -> None:
    """A config class, a policy loss or a preference term that is added is in all of these tests, or this one fails."""
    made = {type(case.make()) for case in CASES}
    known = {getattr(xloss, name) for name in xloss.__all__}
    known = {cls for cls in known if isinstance(cls, type) and issubclass(cls, BaseLossConfig)} - {BaseLossConfig}
    assert made == known
    configs = [case.make() for case in PLAIN.values()]
    assert {c.policy_loss_cfg.loss_type for c in configs if isinstance(c, GRPOLossConfig)} == of_xloss(policy_losses())
    terms = {t.loss_type for c in configs if isinstance(c, PreferenceLossConfig) for t in c.loss_type}
    assert terms == of_xloss(preference_losses())


NOT_MOVED = {"layout"}
"""`layout` names pairs that are not numbered; here they are."""


def test_every_field_of_a_config_is_moved() -> None:
    configs = [case.make() for case in CASES]
    for cls in {type(cfg) for cfg in configs}:
        parents = [base for base in cls.__mro__[1:] if base in {type(cfg) for cfg in configs}]
        for name in {*fields_of.own_fields(cls, BaseLossConfig, *parents)} - NOT_MOVED:
            default = cls.model_fields[name].default
            values = [getattr(cfg, name) for cfg in configs if isinstance(cfg, cls)]
            assert any(value != default for value in values), f"{name} of {cls.__name__} is at its default in all cases"


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


# -- oracles -----------------------------------------------------------------------------------------------------------


def test_every_policy_has_an_oracle() -> None:
    assert policies.POLICIES.keys() == of_xloss(policy_losses())


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
