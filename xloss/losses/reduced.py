"""Configs of losses that are a weighted sum over tokens: ``loss_reduction`` and what it needs."""

from __future__ import annotations

from typing import Self

from pydantic import Field, model_validator

from xloss.losses.config import BaseLossConfig
from xloss.losses.reduction import Reduction, ReductionOptions


class ReducedLossConfig(BaseLossConfig):
    """A loss summed over tokens with calibrated weights.

    Args:
        loss_reduction: ``token`` mean, ``sample`` mean of token means, ``square``, ``sample_sum`` mean of token sums,
            ``sample_sum_norm`` (that, divided by ``norm_length``), ``prompt`` mean of token means, or ``sum``.
        norm_length: the constant of ``sample_sum_norm`` (Dr. GRPO: the longest completion).
        count_empty_sequences: whether sequence means also count sequences without a valid token (TRL).
    """

    loss_reduction: Reduction = "token"
    norm_length: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    count_empty_sequences: bool = False

    def reduction_options(self) -> ReductionOptions:
        """The fields about reduction as the calibration takes them."""
        return ReductionOptions(self.loss_reduction, self.norm_length, self.count_empty_sequences, self.grad_reduce)

    @model_validator(mode="after")
    def _reduction_holds(self) -> Self:
        self.reduction_options()  # raises
        return self
