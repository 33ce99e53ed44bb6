"""What an adapter's test module says of itself for the table of ``docs/integrations.md``.

Each module names its comparisons with a package's own path in ``COMPARISONS``. Its tests run them and hold the result
to a budget; ``python -m tests.integrations.report`` runs them again and writes the table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor

from tests.budgets import error, norm

Gradients = Mapping[str, Tensor]


@dataclass(frozen=True)
class Comparison:
    """One run of an adapter and of the package's own path on the same model and data.

    Args:
        name: the adapter.
        package: whose version the table gives, as the registry knows it.
        what: what was run.
        run: gives the largest relative difference of a gradient.
    """

    name: str
    package: str
    what: str
    run: Callable[[], float]


def worst(got: Gradients, want: Gradients) -> float:
    """Largest of ``|got - want| / |want|`` over the parameters, Frobenius; inf where one has no counterpart.

    A gradient below a thousandth of the whole one is held against that: biases that a softmax cancels have none.
    """
    assert want, "nothing to compare"
    if got.keys() != want.keys():
        return float("inf")
    floor = 1e-3 * sum(norm(g) ** 2 for g in want.values()) ** 0.5
    assert floor > 0, "every gradient is 0"
    return max(error(got[name], want[name]) / max(norm(want[name]), floor) for name in want)
