"""OREAL: likelihood on positive answers beside a policy loss whose signs are weighed apart."""

from __future__ import annotations

from typing import Any, ClassVar, Self

from pydantic import Field, model_validator

from xloss.distributed import TokenRanks
from xloss.losses.facts import LossForm
from xloss.losses.grpo import GRPOLossConfig, GRPOLossContext
from xloss.losses.grpo_kwargs import GRPOLossKwargs
from xloss.losses.policy_tokens import positive_tokens, token_shares
from xloss.losses.reduction import Weights


class OrealLossConfig(GRPOLossConfig):
    """``f+ sum_{A > 0} (p policy_t - s logprobs_t) / N+  +  f- sum_{A <= 0} policy_t / N-``, and GRPO's other terms.

    ``N+`` and ``N-`` count tokens over the global batch, at least 1 each (arXiv 2502.06781; XTuner's names).

    Args:
        positive_loss_factor: ``f+``.
        pos_sft_loss_weight: ``s``.
        pos_policy_loss_weight: ``p``.
        negative_loss_factor: ``f-``.
    """

    forms: ClassVar[tuple[LossForm, ...]] = (
        LossForm(
            "oreal",
            "f+ (p policy - s lp) / N+ where A > 0, f- policy / N- elsewhere",
            "OREAL, arXiv 2502.06781; XTuner",
            "Likelihood on good answers beside a policy loss whose signs are weighed apart.",
            {"policy_loss_cfg": {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.2}},
        ),
    )

    positive_loss_factor: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    pos_sft_loss_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    pos_policy_loss_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    negative_loss_factor: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    @property
    def nll_coef(self) -> float:
        return self.pos_sft_loss_weight * self.positive_loss_factor

    def policy_weights(self, counted: list[Any], weights: Weights, ranks: TokenRanks) -> Weights:
        positive = [positive_tokens(kwargs, self.ignore_idx) for kwargs in counted]
        negative = [
            (kwargs.shifted_labels != self.ignore_idx) & ~mask for kwargs, mask in zip(counted, positive, strict=True)
        ]
        gain = self.pos_policy_loss_weight * self.positive_loss_factor
        of_positive = token_shares(positive, gain, self.grad_reduce, ranks)
        of_negative = token_shares(negative, self.negative_loss_factor, self.grad_reduce, ranks)
        return lambda: [a + b for a, b in zip(of_positive(), of_negative(), strict=True)]

    @property
    def loss_ctx_cls(self) -> type[OrealLossContext]:
        return OrealLossContext

    @model_validator(mode="after")
    def _own_weights(self) -> Self:
        if self.loss_reduction != "token":
            raise ValueError(
                f"OREAL averages over tokens of each sign: loss_reduction must be 'token'; got {self.loss_reduction!r}"
            )
        if self.positive_nll_coef:
            raise ValueError("positive_nll_coef is pos_sft_loss_weight in OREAL; give that")
        return self


class OrealLossKwargs(GRPOLossKwargs):
    """As GRPO's; ``nll_loss_weight`` is XTuner's ``sft_loss_weight``."""


class OrealLossContext(GRPOLossContext):
    """OREAL loss of one micro-batch."""

    loss_cfg: OrealLossConfig
    loss_kwargs: OrealLossKwargs
