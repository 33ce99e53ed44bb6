"""Losses on the ratio of each token alone that kernels know: PPO, CISPO, importance sampling, DRO, REINFORCE."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from xloss.losses.policies.base import PolicyLossConfig, Twin, register_policy_loss
from xloss.losses.policies.metrics import share
from xloss.losses.policies.ratio import ClippedRatioConfig, LeveledRatioConfig, offset_bounds
from xloss.metrics import Metric
from xloss.policy import surrogate
from xloss.policy.batch import PolicyBatch


@register_policy_loss
class VanillaConfig(PolicyLossConfig):
    """PPO / GRPO clip, with XTuner's dual clip and log-ratio clamp. ``clip_ratio_c=None`` is plain PPO."""

    loss_type: Literal["vanilla"] = "vanilla"
    formula: ClassVar[str] = (
        "max(-r A, -clip(r, 1 - cliprange_low, 1 + cliprange_high) A), at most -clip_ratio_c A where A < 0"
    )
    source: ClassVar[str] = "PPO, arXiv 1707.06347; dual clip, 1912.09729; XTuner"
    example: ClassVar[dict[str, Any]] = {"cliprange_low": 0.2, "cliprange_high": 0.2}
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


class PPOClipConfig(ClippedRatioConfig):
    """What losses with PPO's clip share; above the token they stand in ``sequence_ratio``."""

    dual_clip_c: float | None = Field(default=None, gt=1, allow_inf_nan=False)
    delta: float | None = Field(default=None, gt=1, allow_inf_nan=False)

    @model_validator(mode="after")
    def _delta_is_outside(self) -> Self:
        if self.delta is not None and self.delta < self.ratio_bounds()[1]:
            raise ValueError(f"delta={self.delta} is below the upper bound of the ratio, {self.ratio_bounds()[1]}")
        return self

    def log_ratio_limits(self) -> tuple[float | None, float | None]:
        """Lower and upper clamp of the log-ratio."""
        clamp = self.log_ratio_clamp
        return (None, None) if clamp is None else (-clamp, clamp)

    def clipped(self, batch: PolicyBatch) -> Tensor:
        """The clipped surrogate of each token ``[T]``."""
        low, high = self.ratio_bounds()
        lowest, highest = self.log_ratio_limits()
        return surrogate.ppo_clip(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            cliprange_low=1 - low,
            cliprange_high=high - 1,
            clip_ratio_c=self.dual_clip_c,
            delta=self.delta,
            log_prob_diff_min=lowest,
            log_prob_diff_max=highest,
        )

    def metrics(self, batch: PolicyBatch) -> dict[str, Metric]:
        log_ratio, losing = batch.log_ratio.detach(), batch.advantages < 0
        bounds = {"dual_clip_frac": self.dual_clip_c, "delta_clip_frac": self.delta}
        found = {
            name: share(batch, losing & (log_ratio > math.log(bound)))
            for name, bound in bounds.items()
            if bound is not None
        }
        return super().metrics(batch) | found


@register_policy_loss
class PPOConfig(PPOClipConfig):
    """PPO / GRPO clip under the field's most common names and defaults: no dual clip, no two-sided clip."""

    loss_type: Literal["ppo"] = "ppo"
    formula: ClassVar[str] = "max(-min(r, delta) A, -clip(r, low, high) A), at most -dual_clip_c A where A < 0"
    source: ClassVar[str] = "PPO, arXiv 1707.06347; two ranges: DAPO, 2503.14476"
    default_bounds: ClassVar[dict[str, float]] = offset_bounds(0.2, 0.2)
    cliprange_low: float | None = Field(default=0.2, ge=0, allow_inf_nan=False)
    cliprange_high: float | None = Field(default=0.2, ge=0, allow_inf_nan=False)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return self.clipped(batch)

    def twin(self) -> Twin:
        low, high = self.ratio_bounds()
        limit = math.inf if self.log_ratio_clamp is None else self.log_ratio_clamp
        return "ppo", {
            "ratio_min": low,
            "ratio_max": high,
            "dual_clip": self.dual_clip_c,
            "delta": self.delta,
            "log_ratio_min": -limit,
            "log_ratio_max": limit,
        }


@register_policy_loss
class CISPOConfig(ClippedRatioConfig):
    """CISPO: the clipped ratio as a constant weight; one-sided by default."""

    loss_type: Literal["cispo"] = "cispo"
    formula: ClassVar[str] = "-sg(clip(r, low, high)) A lp"
    source: ClassVar[str] = "MiniMax-M1, arXiv 2506.13585"
    default_bounds: ClassVar[dict[str, float]] = offset_bounds(1.0, 4.0)
    clip_low_threshold: float | None = Field(default=0.0, ge=0, allow_inf_nan=False)
    clip_high_threshold: float | None = Field(default=5.0, gt=0, allow_inf_nan=False)
    unified_mask: bool = False

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.cispo(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            **self.thresholds(),
            unified_mask=self.unified_mask,
            log_ratio_clamp=self.log_ratio_clamp,
        )

    def twin(self) -> Twin | None:
        return None if self.unified_mask else _cispo_twin(*self.ratio_bounds(), self.log_ratio_clamp)


@register_policy_loss
class TISConfig(ClippedRatioConfig):
    """Truncated importance sampling as a policy gradient: CISPO between 0 and 1."""

    loss_type: Literal["tis"] = "tis"
    formula: ClassVar[str] = "-sg(clip(r, 0, 1)) A lp"
    source: ClassVar[str] = "ROLL"
    default_bounds: ClassVar[dict[str, float]] = offset_bounds(1.0, 0.0)
    clip_low_threshold: float | None = Field(default=0.0, ge=0, allow_inf_nan=False)
    clip_high_threshold: float | None = Field(default=1.0, gt=0, allow_inf_nan=False)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        low, high = self.ratio_bounds()
        return surrogate.cispo(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            clip_low_threshold=low,
            clip_high_threshold=high,
            log_ratio_clamp=self.log_ratio_clamp,
        )

    def twin(self) -> Twin:
        return _cispo_twin(*self.ratio_bounds(), self.log_ratio_clamp)


@register_policy_loss
class ImportanceSamplingConfig(LeveledRatioConfig):
    """Unclipped importance-weighted policy gradient."""

    loss_type: Literal["importance_sampling"] = "importance_sampling"
    formula: ClassVar[str] = "-r A"
    source: ClassVar[str] = "Tinker"
    log_ratio_clamp: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.importance_sampling(
            batch.logprobs, batch.old_logprobs, batch.advantages, log_ratio_clamp=self.log_ratio_clamp
        )

    def twin(self) -> Twin:
        limit = math.inf if self.log_ratio_clamp is None else self.log_ratio_clamp
        return "importance_sampling", {"log_ratio_min": -limit, "log_ratio_max": limit}


@register_policy_loss
class DROConfig(PolicyLossConfig):
    """Direct reward optimisation: a quadratic pull towards the old policy instead of a clip."""

    loss_type: Literal["dro"] = "dro"
    formula: ClassVar[str] = "-(A lp - beta/2 d^2)"
    source: ClassVar[str] = "DRO, arXiv 2405.19107; Tinker"
    beta: float = Field(default=0.05, ge=0, allow_inf_nan=False)
    zero_at_zero_advantage: ClassVar[bool] = False

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.dro(batch.logprobs, batch.old_logprobs, batch.advantages, beta=self.beta)

    def twin(self) -> Twin:
        return "dro", {"beta": self.beta}


@register_policy_loss
class KimiConfig(PolicyLossConfig):
    """Kimi k1.5's mirror descent, k2 to the old policy: the formula of ``dro`` under its own name and default."""

    loss_type: Literal["kimi"] = "kimi"
    formula: ClassVar[str] = "-A lp + tau/2 d^2"
    source: ClassVar[str] = "Kimi k1.5, arXiv 2501.12599"
    tau: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    zero_at_zero_advantage: ClassVar[bool] = False

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.dro(batch.logprobs, batch.old_logprobs, batch.advantages, beta=self.tau)

    def twin(self) -> Twin:
        return "dro", {"beta": self.tau}


@register_policy_loss
class ReinforceConfig(PolicyLossConfig):
    """Plain policy gradient; the old policy does not enter."""

    loss_type: Literal["reinforce"] = "reinforce"
    formula: ClassVar[str] = "-A lp"
    source: ClassVar[str] = "Williams, 1992; GPG, arXiv 2504.02546"

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return surrogate.reinforce(batch.logprobs, batch.advantages)

    def twin(self) -> Twin:
        return "reinforce", {}


def _cispo_twin(low: float, high: float, clamp: float | None) -> Twin:
    limit = math.inf if clamp is None else clamp
    return "cispo", {"ratio_min": low, "ratio_max": high, "log_ratio_min": -limit, "log_ratio_max": limit}
