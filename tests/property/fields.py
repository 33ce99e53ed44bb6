"""Configs with each field moved off its default, one at a time."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from xloss.errors import OptionError

Fields = dict[str, Any]
NUMBERS = (0.3, 0.05, 0.9, 1.3, 2.5, -0.4)


def candidates(info: FieldInfo) -> list[Any]:
    """Values of a field other than its default, the likely ones first."""

    def of(annotation: Any) -> list[Any]:
        if get_origin(annotation) is Annotated:
            return of(get_args(annotation)[0])
        if get_origin(annotation) is Literal:
            return list(get_args(annotation))
        if get_origin(annotation) in (Union, types.UnionType):
            return [value for part in get_args(annotation) for value in of(part)]
        return {bool: [True, False], float: list(NUMBERS), int: [2, 3], type(None): [None]}.get(annotation, [])

    return [value for value in of(info.annotation) if info.is_required() or value != info.default]


def valid(make: Callable[..., Any], fields: Fields) -> bool:
    try:
        make(**fields)
    except (ValidationError, OptionError):
        return False
    return True


def moved(
    model: type[BaseModel], base: Fields, make: Callable[..., Any], names: tuple[str, ...], numbers: int = 1
) -> Iterator[Fields]:
    """`base` with one of the fields `names` moved off its default, by every choice and some numbers that validate."""
    for name in names:
        found = [base | {name: value} for value in candidates(model.model_fields[name])]
        found = [fields for fields in found if valid(make, fields)]
        chosen = [f for f in found if type(f[name]) is not float]
        yield from chosen + [f for f in found if type(f[name]) is float][:numbers]


def own_fields(model: type[BaseModel], *others: type[BaseModel]) -> tuple[str, ...]:
    """Fields that the others have not."""
    known = {"loss_type"}.union(*(set(o.model_fields) for o in others))
    return tuple(n for n in model.model_fields if n not in known)


def name_of(fields: Fields) -> str:
    return "-".join(f"{k}={v}" for k, v in fields.items()) or "default"
