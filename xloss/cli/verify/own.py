"""A loss of the user's own, found by its import path, and a batch for it."""

from __future__ import annotations

import os
import sys
from importlib import import_module
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from xloss import (
    BaseLossConfig,
    BaseLossContextInputItem,
    GRPOLossConfig,
    PolicyLossConfig,
    PreferenceLossConfig,
    PreferenceTerm,
    RLLossContextInputItem,
)
from xloss.cli.errors import CannotRun
from xloss.cli.verify.cases import KNOWN_FIELDS, LossCase, policy_case, preference_case


def own_case(path: str) -> LossCase:
    """The case of a config, its class, or a function that makes one, at ``package.module:name``.

    Raises:
        CannotRun: there is nothing at that path, it is no loss, or it needs what nobody can make up.
    """
    config = _config(_found(path), path)
    name = path.replace(":", ".").rpartition(".")[2]
    if type(config) is GRPOLossConfig:
        return policy_case(name, config)
    if isinstance(config, PreferenceLossConfig):
        return preference_case(name, config)
    item = _item_of(config)
    known = tuple(field for field in item.model_fields if field in KNOWN_FIELDS)
    lacking = [
        field
        for field, info in item.model_fields.items()
        if info.is_required() and field not in (*known, "shifted_labels")
    ]
    if lacking:
        raise CannotRun(
            f"--loss {path}: its {item.__name__} requires {', '.join(lacking)}, which the made-up batch has not. "
            f"It has {', '.join(KNOWN_FIELDS)}; give the field a default, or one of these names."
        )
    return LossCase(name, config, item, known)


def _found(path: str) -> Any:
    module, _, name = path.partition(":") if ":" in path else path.rpartition(".")
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        return getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise CannotRun(f"--loss {path}: {error}. Give package.module:Name.") from error
    finally:
        sys.path.remove(os.getcwd())


def _config(found: Any, path: str) -> BaseLossConfig:
    if isinstance(found, type) and issubclass(found, PolicyLossConfig | PreferenceTerm):
        found = _made(found, dict(found.example), path)
    if isinstance(found, type) and issubclass(found, BaseLossConfig):
        found = _made(found, {}, path)
    if isinstance(found, PolicyLossConfig):
        return GRPOLossConfig(policy_loss_cfg=found)
    if isinstance(found, PreferenceTerm):
        return PreferenceLossConfig(loss_type=(found,))
    if isinstance(found, BaseLossConfig):
        return found
    if callable(found) and not isinstance(found, type):
        return _config(found(), path)
    raise CannotRun(
        f"--loss {path} is {found!r}. Accepted: a BaseLossConfig, PolicyLossConfig or PreferenceTerm, its class, or a "
        "function without arguments that makes one."
    )


def _made(cls: type[BaseModel], fields: dict[str, Any], path: str) -> Any:
    try:
        return cls(**fields)
    except ValidationError as error:
        needed = ", ".join(str(problem["loc"][0]) for problem in error.errors() if problem["loc"])
        raise CannotRun(
            f"--loss {path}: {cls.__name__} needs values for {needed}. Give the path of a config, or of a function "
            "that makes one."
        ) from error


def _item_of(config: BaseLossConfig) -> type[BaseLossContextInputItem]:
    """What stands in the brackets of ``BaseLossContext[...]``."""
    for cls in config.loss_ctx_cls.__mro__:
        for base in getattr(cls, "__orig_bases__", ()):
            for argument in get_args(base):
                if isinstance(argument, type) and issubclass(argument, BaseLossContextInputItem):
                    return argument
    return RLLossContextInputItem if isinstance(config, GRPOLossConfig) else BaseLossContextInputItem
