"""What xloss can compute, for people: every loss with its formula, parameters, source and plan."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from types import UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin

import torch
from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from xloss.errors import OptionError
from xloss.losses import curves
from xloss.losses.ce import CELossConfig
from xloss.losses.config import BaseLossConfig
from xloss.losses.curves import Curve
from xloss.losses.distill import DistillLossConfig
from xloss.losses.facts import LossForm
from xloss.losses.grpo import GRPOLossConfig
from xloss.losses.mtp import MTPLossConfig
from xloss.losses.oreal import OrealLossConfig
from xloss.losses.policies import PolicyLossConfig, policy_losses
from xloss.losses.preference import PreferenceLossConfig
from xloss.losses.preferences import PreferenceTerm, preference_losses
from xloss.losses.soft_ce import SoftCELossConfig
from xloss.losses.value import ValueLossConfig

Family = Literal["supervised", "policy", "preference", "distillation", "value", "your own"]
CONFIGS: dict[type[BaseLossConfig], Family] = {
    CELossConfig: "supervised",
    SoftCELossConfig: "supervised",
    MTPLossConfig: "supervised",
    OrealLossConfig: "policy",
    DistillLossConfig: "distillation",
}
SYMBOLS: dict[Family, str] = {
    "supervised": "lp log-prob of the label, p = exp(lp), sg a constant in the gradient",
    "policy": (
        "lp log-prob of the token, r = exp(d), d = lp - old, A advantage, p = exp(lp), q = exp(old), "
        "mean_i and sum_i over its sequence of T_i tokens, sg a constant in the gradient"
    ),
    "preference": (
        "S log-prob of a sequence, u = S - ref, w chosen, l rejected, delta = u_w - u_l, eps label_smoothing, "
        "sigma the logistic function"
    ),
    "distillation": "p student, q teacher, z logits",
    "value": "x = value - return",
    "your own": "",
}
Config = TypeVar("Config", bound=BaseLossConfig)
_HEADLESS = "no head: a critic's values, beside the policy loss"


@dataclass(frozen=True)
class Parameter:
    """A field of a loss: its name, default (``required``), and what it accepts, in words."""

    name: str
    default: str
    accepts: str


@dataclass(frozen=True)
class LossEntry:
    """One loss.

    Args:
        plan: ``one-pass``, or ``two-pass`` and why.
        use: a line of Python that makes its config.
        parameters: its own fields, without those that every loss has.
        curve: draws it, or says why it cannot be drawn.
    """

    name: str
    family: Family
    summary: str
    formula: str
    source: str
    plan: str
    use: str
    parameters: tuple[Parameter, ...]
    curve: Callable[[], Curve | str]


def catalog() -> dict[str, LossEntry]:
    """Every loss by name, registered ones included, families together."""
    found = [_of_form(cls, form) for cls in CONFIGS for form in cls.forms]
    found += [_of_policy(cls) for cls in policy_losses().values()]
    found += [_of_term(cls) for cls in preference_losses().values()]
    found += [_of_value(form) for form in ValueLossConfig.forms]
    families = list(SYMBOLS)
    return {entry.name: entry for entry in sorted(found, key=lambda e: (families.index(e.family), e.name))}


def entry_at(path: str) -> LossEntry:
    """The entry of the class at a dotted import path: a policy loss, a preference term, or a config.

    Raises ``OptionError`` where there is no such class.
    """
    module, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise OptionError(f"{path!r} looks like an import path, but: {error}") from error
    if isinstance(found, type) and issubclass(found, PolicyLossConfig):
        return _of_policy(found)
    if isinstance(found, type) and issubclass(found, PreferenceTerm):
        return _of_term(found)
    if isinstance(found, type) and issubclass(found, BaseLossConfig) and not issubclass(found, PreferenceLossConfig):
        return _of_form(found, found.forms[0] if found.forms else LossForm(name, "", "", first_line(found)))
    raise OptionError(f"{path!r} is {found!r}: not a PolicyLossConfig, a PreferenceTerm or the config of one loss")


def entry_of(config: BaseLossConfig) -> LossEntry:
    """The entry of what a config computes, with its plan, and drawn with its numbers."""
    if not config.forms and isinstance(config, GRPOLossConfig):
        return _of_policy(type(config.policy_loss_cfg), config)
    if isinstance(config, PreferenceLossConfig):
        return _of_sum(config) if len(config.loss_type) > 1 else _of_term(type(config.loss_type[0]), config)
    forms = {form.name: form for form in config.forms}
    return _of_form(type(config), forms.get(config.form(), LossForm(config.form(), "", "", "")), config)


def _of_policy(cls: type[PolicyLossConfig], given: GRPOLossConfig | None = None) -> LossEntry:
    name = cls.model_fields["loss_type"].default if "loss_type" in cls.model_fields else cls.__name__
    tag = name if policy_losses().get(name) is cls else f"{cls.__module__}.{cls.__qualname__}"
    config = given or _made(lambda: GRPOLossConfig(policy_loss_cfg=cls(**cls.example)))
    return LossEntry(
        name=name,
        family="policy",
        summary=first_line(cls),
        formula=cls.formula,
        source=cls.source,
        plan=plan_of(config),
        use=f"GRPOLossConfig(policy_loss_cfg={_dict({'loss_type': tag, **cls.example})})",
        parameters=tuple(_parameters(cls)),
        curve=_no_example if config is None else partial(curves.policy_curve, config.policy_loss_cfg),
    )


def _of_term(cls: type[PreferenceTerm], given: PreferenceLossConfig | None = None) -> LossEntry:
    name = cls.model_fields["loss_type"].default if "loss_type" in cls.model_fields else cls.__name__
    config = given or _made(lambda: PreferenceLossConfig(loss_type=(cls(**cls.example),)))
    curve: Callable[[], Curve | str] = _no_example
    if config is not None:
        curve = partial(curves.preference_curve, config.terms[0], config.f_divergence, config.f_alpha)
    registered = preference_losses().get(name) is cls and not cls.example
    use = repr(name) if registered else f"{cls.__name__}({_arguments(cls.example)})"
    return LossEntry(
        name=name,
        family="preference",
        summary=first_line(cls),
        formula=cls.formula,
        source=cls.source,
        plan=plan_of(config),
        use=f"PreferenceLossConfig(loss_type={use})",
        parameters=tuple(_parameters(cls)),
        curve=curve,
    )


def _of_sum(config: PreferenceLossConfig) -> LossEntry:
    terms = config.loss_type
    return replace(
        _of_term(type(terms[0]), config),
        name=" + ".join(str(term.loss_type) for term in terms),
        summary="A weighted sum of several losses.",
        formula=" + ".join(f"{term.weight:g} {term.loss_type}" for term in terms),
        source="; ".join(dict.fromkeys(term.source for term in terms)),
        curve=partial(str, "a sum of several losses is no function of one margin"),
    )


def _of_form(cls: type[BaseLossConfig], form: LossForm, given: BaseLossConfig | None = None) -> LossEntry:
    config = given or _made(lambda: cls(**form.fields))
    curve: Callable[[], Curve | str] = partial(str, f"{form.name} is no function of one number")
    if isinstance(config, MTPLossConfig):
        curve = partial(str, "mtp has the curve of cross_entropy, at labels further ahead")
    elif isinstance(config, CELossConfig):
        curve = partial(curves.supervised_curve, config)
    elif isinstance(config, DistillLossConfig):
        curve = partial(curves.distillation_curve, config)
    return LossEntry(
        name=form.name,
        family=CONFIGS.get(cls, "your own"),
        summary=form.summary,
        formula=form.formula,
        source=form.source,
        plan=plan_of(config),
        use=f"{cls.__name__}({_arguments(form.fields)})",
        parameters=tuple(_parameters(cls, BaseLossConfig)),
        curve=curve,
    )


def _of_value(form: LossForm) -> LossEntry:
    return LossEntry(
        name=form.name,
        family="value",
        summary=form.summary,
        formula=form.formula,
        source=form.source,
        plan=_HEADLESS,
        use=f"GRPOLossConfig(policy_loss_cfg=..., value_loss={_dict(dict(form.fields))})",
        parameters=tuple(_parameters(ValueLossConfig)),
        curve=partial(curves.value_curve, ValueLossConfig(**form.fields)),
    )


def _made(make: Callable[[], Config]) -> Config | None:
    """A config with the class's example; ``None`` where that does not do."""
    try:
        return make()
    except ValidationError:
        return None


def _no_example() -> str:
    return "fields without a default need values: state some in the class variable `example`"


def plan_of(config: BaseLossConfig | None) -> str:
    """``one-pass``, or ``two-pass`` and why, as the config's context decides it."""
    if config is None:
        return "depends on fields that have no default"
    kwargs_cls = config.loss_kwargs_cls
    nothing = dict.fromkeys(kwargs_cls.model_fields) | {"shifted_labels": torch.zeros(0, dtype=torch.int64)}
    context = config.loss_ctx_cls(config, kwargs_cls.model_construct(**nothing))
    if context.has_own_loss_fn:
        return "its own loss_fn, chunk by chunk through autograd"
    return "one-pass" if context.is_token_local() else f"two-pass: {context.why_coupled()}"


def first_line(cls: type) -> str:
    """First sentence of a docstring."""
    text = " ".join((cls.__doc__ or "").split("\n\n")[0].split()).replace("``", "")
    return text.partition(". ")[0].removesuffix(".") + "." if text else ""


def _parameters(cls: type[BaseModel], beyond: type[BaseModel] | None = None) -> Iterator[Parameter]:
    inherited = () if beyond is None else beyond.model_fields
    for name, info in cls.model_fields.items():
        tag = name == "loss_type" and len(get_args(info.annotation)) == 1
        if name not in inherited and not tag:
            default = getattr(cls, f"default_{name}", info.default)  # of a term, what stands for None
            yield Parameter(name, "required" if info.is_required() else repr(default), _accepts(info))


_BOUNDS = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}


def _accepts(info: FieldInfo) -> str:
    within = (mark for arg in get_args(info.annotation) for mark in getattr(arg, "__metadata__", ()))
    found = [
        f"{word} {getattr(mark, sign):g}"
        for mark in (*info.metadata, *within)
        for sign, word in _BOUNDS.items()
        if hasattr(mark, sign)
    ]
    return ", ".join([_type(info.annotation), *found])


def _type(annotation: Any) -> str:
    if get_origin(annotation) in (Union, UnionType):
        return " | ".join(_type(arg) for arg in get_args(annotation))
    if get_origin(annotation) is Literal:
        return " | ".join(map(str, get_args(annotation)))
    if annotation is type(None):
        return "None"
    return getattr(annotation, "__name__", None) or str(annotation)


def _dict(value: Any) -> str:
    return f"dict({_arguments(value)})" if isinstance(value, dict) else repr(value)


def _arguments(fields: Mapping[str, Any]) -> str:
    return ", ".join(f"{name}={_dict(value)}" for name, value in fields.items())
