"""Token-ratio losses for data of another policy, by torch alone: hard masks, tapers, soft gates."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from xloss.losses.policies.base import Anchor, register_policy_loss
from xloss.losses.policies.ratio import ClippedRatioConfig, LeveledRatioConfig, offset_bounds
from xloss.policy import surrogate
from xloss.policy.batch import PolicyBatch


@register_policy_loss
class RolloutISConfig(ClippedRatioConfig):
    """The ratio to the sampler as a constant weight, and 0 where it is out of bounds."""

    loss_type: Literal["rollout_is"] = "rollout_is"
    formula: ClassVar[str] = "-sg(r) A lp where low < r < high, else 0"
    source: ClassVar[str] = "GLM-5, arXiv 2602.15763; SkyRL"
    default_bounds: ClassVar[dict[str, float]] = offset_bounds(0.2, 0.2)
    anchor: Anchor = "rollout"
    cliprange_low: float | None = Field(default=0.2, ge=0, allow_inf_nan=False)
    cliprange_high: float | None = Field(default=0.2, ge=0, allow_inf_nan=False)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.rollout_is(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            **self.thresholds(),
            log_ratio_clamp=self.log_ratio_clamp,
        )


@register_policy_loss
class TOPRConfig(LeveledRatioConfig):
    """Tapered off-policy REINFORCE: good tokens in full, bad ones by their ratio, at most 1."""

    loss_type: Literal["topr"] = "topr"
    formula: ClassVar[str] = (
        "-positive_weight A lp where A > advantage_threshold, else -negative_weight sg(min(r, 1)) A lp"
    )
    source: ClassVar[str] = "TOPR, arXiv 2503.14286"
    positive_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    negative_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    advantage_threshold: float = Field(default=0.0, allow_inf_nan=False)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.topr(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            positive_weight=self.positive_weight,
            negative_weight=self.negative_weight,
            advantage_threshold=self.advantage_threshold,
            log_ratio_clamp=self.log_ratio_clamp,
        )


@register_policy_loss
class SAPOConfig(LeveledRatioConfig):
    """A sigmoid gate on the ratio in the place of a clip."""

    loss_type: Literal["sapo"] = "sapo"
    formula: ClassVar[str] = "-(4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A"
    source: ClassVar[str] = "SAPO, arXiv 2511.20347"
    tau_pos: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    tau_neg: float = Field(default=1.05, gt=0, allow_inf_nan=False)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.sapo(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            tau_pos=self.tau_pos,
            tau_neg=self.tau_neg,
            log_ratio_clamp=self.log_ratio_clamp,
        )
