"""Losses on the ratio of each token alone that kernels know: PPO, CISPO, importance sampling, DRO, REINFORCE."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field, model_validator
from torch import Tensor

from xloss.losses.policies.base import PolicyLossConfig, Twin, register_policy_loss
from xloss.policy import surrogate
from xloss.policy.batch import PolicyBatch


@register_policy_loss
class VanillaConfig(PolicyLossConfig):
    """PPO / GRPO clip, with XTuner's dual clip and log-ratio clamp. ``clip_ratio_c=None`` is plain PPO."""

    loss_type: Literal["vanilla"] = "vanilla"
    cliprange_low: float = Field(ge=0, lt=1)
    cliprange_high: float = Field(ge=0)
    clip_ratio_c: float | None = Field(default=3.0, gt=1)
    log_prob_diff_min: float | None = -20.0
    log_prob_diff_max: float | None = 20.0

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.ppo_clip(
            batch.logprobs, batch.old_logprobs, batch.advantages, **self.model_dump(exclude={"loss_type"})
        )

    def ratio_bounds(self) -> tuple[float, float]:
        return 1 - self.cliprange_low, 1 + self.cliprange_high

    def twin(self) -> Twin:
        low, high = self.ratio_bounds()
        return "ppo", {
            "ratio_min": low,
            "ratio_max": high,
            "dual_clip": self.clip_ratio_c,
            "log_ratio_min": -math.inf if self.log_prob_diff_min is None else self.log_prob_diff_min,
            "log_ratio_max": math.inf if self.log_prob_diff_max is None else self.log_prob_diff_max,
        }


@register_policy_loss
class CISPOConfig(PolicyLossConfig):
    """CISPO with absolute thresholds on the ratio; one-sided by default."""

    loss_type: Literal["cispo"] = "cispo"
    clip_low_threshold: float = Field(default=0.0, ge=0)
    clip_high_threshold: float = Field(default=5.0, gt=0)

    @model_validator(mode="after")
    def _ordered(self) -> CISPOConfig:
        if self.clip_low_threshold > self.clip_high_threshold:
            raise ValueError(
                f"clip_low_threshold={self.clip_low_threshold} is above clip_high_threshold={self.clip_high_threshold}"
            )
        return self

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.cispo(
            batch.logprobs, batch.old_logprobs, batch.advantages, **self.model_dump(exclude={"loss_type"})
        )

    def ratio_bounds(self) -> tuple[float, float]:
        return self.clip_low_threshold, self.clip_high_threshold

    def twin(self) -> Twin:
        return "cispo", {"ratio_min": self.clip_low_threshold, "ratio_max": self.clip_high_threshold}


@register_policy_loss
class ImportanceSamplingConfig(PolicyLossConfig):
    """Unclipped importance-weighted policy gradient."""

    loss_type: Literal["importance_sampling"] = "importance_sampling"

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.importance_sampling(batch.logprobs, batch.old_logprobs, batch.advantages)

    def twin(self) -> Twin:
        return "importance_sampling", {}


@register_policy_loss
class DROConfig(PolicyLossConfig):
    """Direct reward optimisation: a quadratic pull towards the old policy instead of a clip."""

    loss_type: Literal["dro"] = "dro"
    beta: float = Field(default=0.05, ge=0)
    zero_at_zero_advantage: ClassVar[bool] = False

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.dro(batch.logprobs, batch.old_logprobs, batch.advantages, beta=self.beta)

    def twin(self) -> Twin:
        return "dro", {"beta": self.beta}


@register_policy_loss
class ReinforceConfig(PolicyLossConfig):
    """Plain policy gradient; the old policy does not enter."""

    loss_type: Literal["reinforce"] = "reinforce"

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.reinforce(batch.logprobs, batch.advantages)

    def twin(self) -> Twin:
        return "reinforce", {}
