"""Every error xloss raises at a user: one tree, one stable code a class, each explained in ``docs/errors.md``.

A message names the argument, what was given, what is accepted and, where it helps, what to do.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import ClassVar


class XlossError(Exception):
    """Base of all errors raised by xloss. ``code`` is stable and documented."""

    code: ClassVar[str] = "xloss"

    def __str__(self) -> str:
        return f"[{self.code}] {super().__str__()}"


class ShapeError(XlossError, ValueError):
    """A tensor has a shape that does not fit the others."""

    code = "shape"


class DtypeError(XlossError, TypeError):
    """A tensor has a dtype that is not accepted, or that differs from the one it must match."""

    code = "dtype"


class DeviceError(XlossError, ValueError):
    """Tensors that must be on one device are on several."""

    code = "device"


class LabelError(XlossError, ValueError):
    """A label is neither ``ignore_idx`` nor inside ``[0, V)``."""

    code = "label"


class MissingFieldError(XlossError, ValueError):
    """The chosen loss needs a field that is ``None``."""

    code = "missing-field"


class NonFiniteError(XlossError, ValueError):
    """A field holds NaN or inf at a token of the loss."""

    code = "non-finite"


class OptionError(XlossError, ValueError):
    """An option has a value outside its accepted range."""

    code = "option"


class UnsupportedError(XlossError, NotImplementedError):
    """The chosen mode or plan cannot honour an option; the message names one that can."""

    code = "unsupported"


class GraphError(XlossError, RuntimeError):
    """Autograd asked for something whose answer would be wrong (a second backward of freed gradients, say)."""

    code = "graph"


class RankError(XlossError, RuntimeError):
    """Another rank raised, or ranks do not do the same; the message says which rank, and what."""

    code = "rank"


CODES: tuple[str, ...] = tuple(
    cls.code
    for cls in (
        XlossError,
        ShapeError,
        DtypeError,
        DeviceError,
        LabelError,
        MissingFieldError,
        NonFiniteError,
        OptionError,
        UnsupportedError,
        GraphError,
        RankError,
    )
)


def unknown_name(kind: str, given: str, accepted: list[str], listed_by: str = "") -> str:
    """Message for a misspelt name: what was given, the nearest accepted one, and all accepted ones (or what lists them,
    where they are too many)."""
    near = get_close_matches(given, accepted, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    names = f"{listed_by} lists all" if listed_by else f"Accepted: {', '.join(sorted(accepted))}"
    return f"unknown {kind} {given!r}.{hint} {names}."
