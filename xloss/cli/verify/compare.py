"""How far a layout's result is from one process's, and what kind of mistake would explain it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from xloss.cli.float64 import relative
from xloss.cli.verify.step import Outcome

BARS = {torch.float64: 1e-6, torch.float32: 1e-6, torch.bfloat16: 2e-2}
"""Relative error allowed against one process that computes in the same dtype: sums in another order, and no more.

Weights of tokens are float32 also where all else is float64.
"""
CAPS = {torch.float64: 1e-6, torch.float32: 1e-4, torch.bfloat16: math.inf}
"""Relative error allowed against float64."""
TINY = 1e-30


def badness(error: float) -> float:
    """What errors are compared by: NaN is the worst of all."""
    return math.inf if math.isnan(error) else error


@dataclass(frozen=True)
class Errors:
    """Relative errors, the worst of all steps; of gradients the worst parameter's.

    Args:
        gradient: ``||g - g1|| / ||g1||`` against one process of the same dtype.
        gradient64: the same against float64.
        values: of the loss, the per-token log-probs and the metrics, the worst.
        parameter: the one with the worst gradient, its ``factor`` (``g`` is nearest to ``factor * g1``) and what is
            left over beside the factor, relative to ``||g1||``.
        value: the worst of the values.
    """

    gradient: float
    gradient64: float
    values: float
    parameter: str
    factor: float
    rest: float
    value: str

    @property
    def worst(self) -> float:
        """The larger of both; NaN where one is."""
        return max(self.gradient, self.values, key=badness)


def compare(found: Sequence[Outcome], one: Sequence[Outcome], exact: Sequence[Outcome]) -> Errors:
    """``found`` against one process of the same dtype and one in float64, step by step."""
    return max(
        (_compare(*outcomes) for outcomes in zip(found, one, exact, strict=True)),
        key=lambda errors: badness(errors.worst),
    )


def _compare(found: Outcome, one: Outcome, exact: Outcome) -> Errors:
    gradients, gradients64 = _gradients(found, one), _gradients(found, exact)
    parameter = max(gradients, key=lambda name: badness(gradients[name]))
    factor, rest = _factor(found.grads.get(parameter), one.grads[parameter])
    values = {
        "the loss": abs(found.loss - one.loss) / max(one.scale, TINY),
        "log-probs": _relative(found.logprobs, one.logprobs),
        **{f"metric {n}": _apart(found.metrics.get(n, math.nan), x) for n, x in one.metrics.items()},
    }
    value = max(values, key=lambda name: badness(values[name]))
    return Errors(
        gradient=gradients[parameter],
        gradient64=max(gradients64.values(), key=badness),
        values=values[value],
        parameter=parameter,
        factor=factor,
        rest=rest,
        value=value,
    )


def _gradients(found: Outcome, expected: Outcome) -> dict[str, float]:
    """Errors by parameter. One that is frozen on one side has none."""
    names = [n for n, grad in expected.grads.items() if grad is not None and found.grads.get(n, grad) is not None]
    return {name: _relative(found.grads.get(name), expected.grads[name]) for name in names}


def _relative(found: Tensor | None, expected: Tensor | None) -> float:
    if found is None or expected is None or found.shape != expected.shape:
        return math.inf
    return relative(found, expected.double())


def _apart(found: float, expected: float) -> float:
    return abs(found - expected) / max(1.0, abs(expected))


def _factor(found: Tensor | None, expected: Tensor | None) -> tuple[float, float]:
    """``c`` of the least squares ``found = c expected``, and the relative size of what is left."""
    if found is None or expected is None or found.shape != expected.shape:
        return math.nan, math.nan
    g, want = found.double().flatten(), expected.double().flatten()
    size = float(want @ want)
    if size == 0:
        return math.nan, math.nan
    factor = float(g @ want) / size
    return factor, float((g - factor * want).norm()) / math.sqrt(size)


def allowed_error(dtype: torch.dtype, own: float) -> float:
    """What a layout may be off by: the bar, unless one process is further than that from float64.

    ``own`` is its distance. On large shapes, and where a loss is a difference of large sums, two computations that
    are each as good as one process are up to twice that apart.
    """
    return BARS[dtype] if own <= BARS[dtype] else min(2 * own, CAPS[dtype])


def explain(errors: Errors, allowed: float, counts: dict[str, int]) -> str:
    """What failed in words: which parameter or value, and the factor where it is one.

    Args:
        errors: of the layout.
        allowed: its bar.
        counts: numbers a factor may come from, such as ``{"ranks": 4, "micro-batches": 3}``.
    """
    if not errors.gradient <= allowed:
        what = f"the gradient of {errors.parameter} is "
        if math.isnan(errors.gradient) or math.isinf(errors.gradient):
            return what + "not finite, or not of the parameter's shape"
        if errors.factor == 0 and errors.rest == 0:
            return what + "0: nothing reaches it"
        if errors.rest <= 1e-3 * abs(errors.factor - 1) and abs(errors.factor - 1) > 1e-3:
            return what + _by_factor(errors.factor, counts)
        return what + f"off by {errors.gradient:.1e}, and by no common factor ({errors.factor:.3f} fits best)"
    if not errors.values <= allowed:
        return f"{errors.value} differs by {errors.values:.1e}"
    return f"gradients are off float64's by {errors.gradient64:.1e}, and so are those of one process"


def _by_factor(factor: float, counts: dict[str, int]) -> str:
    if factor <= 0:
        return f"{factor:.3g}x what it should be"
    size = max(factor, 1 / factor)
    near = [name for name, count in counts.items() if count > 1 and math.isclose(size, count, rel_tol=1e-3)]
    if factor > 1:
        return f"{size:.3g}x too large" + "".join(f": added over {name} where one counts" for name in near[:1])
    return f"{size:.3g}x too small" + "".join(f": divided by the number of {name} once too often" for name in near[:1])
