"""How a class of formulas is known by its ``loss_type``."""

from __future__ import annotations

from typing import Any, TypeVar

from xloss.errors import OptionError
from xloss.losses.model import StrictModel

Tagged = TypeVar("Tagged", bound=StrictModel)


def register(cls: type[Tagged], known: dict[str, type[Any]]) -> type[Tagged]:
    """Add a class to those known by the default of ``loss_type``.

    Raises ``OptionError`` when it declares none, or another class has it.
    """
    field = cls.model_fields.get("loss_type")
    name = None if field is None else field.default
    if not isinstance(name, str):
        raise OptionError(
            f'{cls.__name__} must declare its tag with a default: loss_type: Literal["my_loss"] = "my_loss"'
        )
    other = known.get(name)
    if other is not None and other.__qualname__ != cls.__qualname__:
        raise OptionError(f"loss_type {name!r} of {cls.__name__} is taken by {other.__name__}; choose another name")
    known[name] = cls
    return cls
