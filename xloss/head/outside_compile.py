"""Keeps the head out of ``torch.compile`` graphs: its own loops are already what a compiler would have to find."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def outside_compile(fn: Callable[P, R]) -> Callable[P, R]:
    """``fn`` as a graph break under ``torch.compile``, and untouched otherwise.

    ``torch.compiler.disable`` does the same but imports the compiler when it decorates, which takes a second; here it
    is used only once the compiler is loaded anyway.
    """
    disabled: list[Callable[P, R]] = []

    @wraps(fn)
    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        compiler = sys.modules.get("torch._dynamo")
        if compiler is None:
            return fn(*args, **kwargs)
        if not disabled:
            disabled.append(compiler.disable(fn))
        return disabled[0](*args, **kwargs)

    wrapped._torchdynamo_disable = True  # type: ignore[attr-defined]
    return wrapped
