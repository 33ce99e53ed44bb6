"""Comparing results of the small step, and checking many cases in one test."""

from __future__ import annotations

from collections.abc import Callable

import torch

from tests import budgets
from tests.property.world import Case, Result


def assert_same(got: Result, want: Result, relative: float | None = None) -> None:
    """Up to float64 rounding of numbers of unit size, or to a relative error."""
    assert got.metrics.keys() == want.metrics.keys()
    pairs = {"loss": (got.loss, want.loss)} | {f"d {n}": (got.grads[n], want.grads[n]) for n in want.grads}
    pairs |= {f"metric {n}": (got.metrics[n], want.metrics[n]) for n in want.metrics}
    for name, (ours, theirs) in pairs.items():
        if relative is None:
            budgets.assert_rounding(name, ours, theirs, 10.0, 1.0)
        else:
            found, allowed = budgets.error(ours, theirs), relative * (1.0 + budgets.norm(theirs))
            assert found <= allowed, f"{name}: error {found:.3g} > {allowed:.3g}"


def assert_equal(got: Result, want: Result) -> None:
    """To the last bit."""
    assert torch.equal(got.loss, want.loss), f"loss {got.loss} != {want.loss}"
    for name in want.grads:
        assert torch.equal(got.grads[name], want.grads[name]), f"d {name}"
    for name in want.metrics:
        assert torch.equal(got.metrics[name], want.metrics[name]), name


def each(cases: dict[str, Case], check: Callable[[Case], None]) -> None:
    """`check` of every case; an error says of which."""
    for name, case in cases.items():
        try:
            check(case)
        except BaseException as error:
            error.add_note(f"in case {name}")
            raise
