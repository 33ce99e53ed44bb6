"""The interpreter lane: every kernel against float64, on a CPU.

Run as a process of its own: `TRITON_INTERPRET=1 pytest -m interpret tests/interpret`. The variable is read when a
kernel is decorated, so it cannot be set later. Two guards hold for every test: bfloat16 is refused (the interpreter
computes it wrongly without saying so), and `torch.empty` returns NaN.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
HERE = Path(__file__).parent

collect_ignore_glob = [] if INTERPRETED and find_spec("triton") else ["test_*.py"]


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "interpret: kernels under Triton's interpreter (TRITON_INTERPRET=1)")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if HERE in Path(item.fspath).parents:
            item.add_marker(pytest.mark.interpret)
            # lanes a `where` throws away: -inf minus -inf, exp of a huge number
            item.add_marker(pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter"))


@pytest.fixture(autouse=True, scope="session")
def no_bfloat16() -> Iterator[None]:
    """Refuse a bfloat16 argument to an interpreted kernel."""
    from triton.runtime.interpreter import GridExecutor

    launch = GridExecutor.__call__

    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for value in [*args, *kwargs.values()]:
            value = getattr(value, "base", value)
            if isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16:
                raise AssertionError("the interpreter is silently wrong in bfloat16")
        return launch(self, *args, **kwargs)

    GridExecutor.__call__ = checked
    yield
    GridExecutor.__call__ = launch


@pytest.fixture(autouse=True, scope="session")
def poison() -> Iterator[None]:
    """torch.empty and empty_like hand out NaN (the smallest integer for integers)."""
    originals = {name: getattr(torch, name) for name in ("empty", "empty_like")}

    def poisoned(make: Any) -> Any:
        def wrapper(*args: Any, **kwargs: Any) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            return tensor.fill_(float("nan") if tensor.is_floating_point() else torch.iinfo(tensor.dtype).min)

        return wrapper

    for name, make in originals.items():
        setattr(torch, name, poisoned(make))
    yield
    for name, make in originals.items():
        setattr(torch, name, make)
