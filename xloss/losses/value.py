"""The value loss of a critic beside a policy loss: its config, and its share of a micro-batch."""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from xloss import shapes
from xloss.errors import MissingFieldError
from xloss.losses.facts import LossForm
from xloss.losses.model import StrictModel
from xloss.metrics import Metric
from xloss.policy.value import ValueLossType, value_loss


class ValueLossConfig(StrictModel):
    """``rho(v - R)``, or ``max(rho(v - R), rho(clip(v, v_old +- value_clip) - R))``, of each token.

    Args:
        loss_type: ``mse`` (``x^2 / 2``), ``mae``, ``huber``, ``smooth_l1`` or ``cauchy``.
        scale: where ``huber`` (its delta), ``smooth_l1`` (its beta) and ``cauchy`` (its c) leave the parabola.
        value_clip: how far values may move from ``old_values``, or ``None`` for no clip.
    """

    model_config = ConfigDict(frozen=True)

    forms: ClassVar[tuple[LossForm, ...]] = tuple(
        LossForm(name, formula, source, summary, {"loss_type": name})
        for name, formula, source, summary in (
            ("mse", "x^2 / 2, or its larger value at the clipped v", "PPO, arXiv 1707.06347", "Squared error."),
            ("mae", "|x|", "-", "Absolute error."),
            ("huber", "x^2 / 2 to |x| = scale, scale (|x| - scale / 2) beyond", "Huber, 1964", "Squared, then linear."),
            ("smooth_l1", "huber / scale", "arXiv 1504.08083; torch", "Huber's loss in another scale."),
            ("cauchy", "scale^2 / 2 log(1 + (x / scale)^2)", "-", "Squared, then logarithmic."),
        )
    )

    loss_type: ValueLossType = "mse"
    scale: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    value_clip: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _scale_is_read(self) -> Self:
        if self.scale != 1.0 and self.loss_type in ("mse", "mae"):
            raise ValueError(f"scale={self.scale} has no effect with loss_type={self.loss_type!r}")
        return self


def weighted_value_loss(
    cfg: ValueLossConfig, values: Tensor | None, kwargs: Any, weight: Tensor, ignore_idx: int
) -> tuple[Tensor, dict[str, Metric]]:
    """Weighted loss of each token in the shape of the labels, float32 (float64 for float64), and metrics.

    ``kwargs`` holds ``returns``, and ``old_values`` where ``cfg`` clips. What stands at ignored labels changes nothing.
    Raises ``MissingFieldError``, ``ShapeError``, ``DtypeError``, ``DeviceError`` for ``values`` that do not fit.
    """
    if values is None:
        raise MissingFieldError("value_loss is set in the config: give forward(..., values=) the critic's values")
    labels = kwargs.shifted_labels
    shapes.check_per_token("values", values, labels)
    valid = labels != ignore_idx
    dtype = torch.promote_types(values.dtype, torch.float32)
    v, returns = (x.to(dtype).masked_fill(~valid, 0) for x in (values, kwargs.returns.detach()))
    old = None if kwargs.old_values is None else kwargs.old_values.detach().to(dtype).masked_fill(~valid, 0)
    loss = value_loss(v, returns, old, **cfg.model_dump())
    residual = returns - v
    metrics = {
        "value_loss": Metric.mean(loss, valid),
        "value_residual_sum": Metric.total(residual, valid),
        "value_residual_sq_sum": Metric.total(residual.square(), valid),
        "returns_sum": Metric.total(returns, valid),
        "returns_sq_sum": Metric.total(returns.square(), valid),
        "num_values": Metric.count_of(returns, valid),
    }
    if cfg.value_clip is not None:
        free = value_loss(v.detach(), returns, loss_type=cfg.loss_type, scale=cfg.scale)
        metrics["value_clip_frac"] = Metric.mean((loss.detach() > free).to(dtype), valid)
    return loss * weight, metrics


def explained_variance(results: dict[str, Tensor]) -> Tensor:
    """``1 - Var(returns - values) / Var(returns)`` from finalised metrics; 0 where the returns do not vary."""
    count = results["num_values"].clamp(min=1)
    left, of_returns = (
        results[f"{name}_sq_sum"] / count - (results[f"{name}_sum"] / count).square()
        for name in ("value_residual", "returns")
    )
    return torch.where(of_returns > 0, 1 - left / of_returns, torch.zeros_like(left))
