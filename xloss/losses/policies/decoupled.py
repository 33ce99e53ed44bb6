"""Decoupled PPO: the clip is around the proximal policy, the importance weight is of the behaviour policy."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from xloss.losses.policies.base import PolicyLossConfig, register_policy_loss
from xloss.policy import coupled
from xloss.policy.batch import PolicyBatch


@register_policy_loss
class DecoupledPPOConfig(PolicyLossConfig):
    """PPO for asynchronous training: ``old_logprobs`` of the proximal, ``rollout_logprobs`` of the behaviour policy."""

    loss_type: Literal["decoupled_ppo"] = "decoupled_ppo"
    formula: ClassVar[str] = (
        "sg(w) times PPO's clip on r = exp(lp - old), w = exp(old - rollout) masked or truncated to "
        "[behave_low, behave_high]"
    )
    source: ClassVar[str] = "AReaL, arXiv 2505.24298"
    cliprange_low: float = Field(default=0.2, ge=0, lt=1)
    cliprange_high: float = Field(default=0.2, ge=0)
    clip_ratio_c: float | None = Field(default=None, gt=1)
    behave_action: Literal["mask", "truncate"] = "mask"
    behave_low: float | None = Field(default=None, ge=0)
    behave_high: float | None = Field(default=5.0, gt=0)
    needs: ClassVar[tuple[str, ...]] = ("old_logprobs", "rollout_logprobs")

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.behave_low is not None and self.behave_high is not None and self.behave_low > self.behave_high:
            raise ValueError(f"behave_low={self.behave_low} is above behave_high={self.behave_high}")
        return self

    def per_token(self, batch: PolicyBatch) -> Tensor:
        assert batch.rollout_logprobs is not None
        return coupled.decoupled_ppo(
            batch.logprobs,
            batch.old_logprobs,
            batch.rollout_logprobs,
            batch.advantages,
            behave_mask=self.behave_action == "mask",
            **self.model_dump(exclude={"loss_type", "behave_action"}),
        )

    def ratio_bounds(self) -> tuple[float, float]:
        return 1 - self.cliprange_low, 1 + self.cliprange_high
