"""PPO's clip on the ratio of a sequence, a turn or a whole answer: GSPO, GSPO-token, segment ratio, RLOO, LUSPO."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from xloss.losses.policies.base import Coupling, register_policy_loss
from xloss.losses.policies.ratio import offset_bounds
from xloss.losses.policies.token_ratio import PPOClipConfig
from xloss.policy.batch import PolicyBatch
from xloss.policy.level import RatioLevel


class SequenceRatioConfig(PPOClipConfig):
    """PPO's clip above the token.

    Args:
        log_ratio_max: upper clamp of the log-ratio at its level, the gradient 0 beyond (verl: 10), or ``None``.
    """

    log_ratio_clamp: float | None = Field(default=None, gt=0)
    log_ratio_max: float | None = Field(default=None, gt=0)

    def log_ratio_limits(self) -> tuple[float | None, float | None]:
        lowest, highest = super().log_ratio_limits()
        limits = [limit for limit in (highest, self.log_ratio_max) if limit is not None]
        return lowest, min(limits, default=None)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return self.clipped(batch)


@register_policy_loss
class GSPOConfig(SequenceRatioConfig):
    """GSPO: the ratio of a sequence, the geometric mean over its tokens, with its true gradient."""

    loss_type: Literal["gspo"] = "gspo"
    formula: ClassVar[str] = "PPO's clip on s = exp(mean_i d)"
    source: ClassVar[str] = "GSPO, arXiv 2507.18071"
    default_bounds: ClassVar[dict[str, float]] = offset_bounds(3e-4, 4e-4)
    ratio_level: Literal["sequence"] = "sequence"
    cliprange_low: float | None = Field(default=3e-4, ge=0)
    cliprange_high: float | None = Field(default=4e-4, ge=0)


@register_policy_loss
class GSPOTokenConfig(SequenceRatioConfig):
    """GSPO-token: the value of GSPO with each token's own gradient; for advantages that differ within a sequence."""

    loss_type: Literal["gspo_token"] = "gspo_token"
    formula: ClassVar[str] = "PPO's clip on s_t = exp(lp - sg(lp) + sg(mean_i d))"
    source: ClassVar[str] = "GSPO-token, arXiv 2507.18071"
    default_bounds: ClassVar[dict[str, float]] = offset_bounds(3e-4, 4e-4)
    ratio_level: Literal["sequence_token"] = "sequence_token"
    cliprange_low: float | None = Field(default=3e-4, ge=0)
    cliprange_high: float | None = Field(default=4e-4, ge=0)


@register_policy_loss
class SegmentRatioConfig(SequenceRatioConfig):
    """The ratio of a turn: the geometric mean over a run of consecutive valid tokens (ROLL, agentic)."""

    loss_type: Literal["segment_ratio"] = "segment_ratio"
    formula: ClassVar[str] = "PPO's clip on exp(mean of d over the turn)"
    source: ClassVar[str] = "ROLL"
    default_bounds: ClassVar[dict[str, float]] = offset_bounds(0.2, 0.2)
    ratio_level: Literal["segment"] = "segment"
    cliprange_low: float | None = Field(default=0.2, ge=0)
    cliprange_high: float | None = Field(default=0.2, ge=0)


@register_policy_loss
class RLOOConfig(SequenceRatioConfig):
    """PPO's clip on the ratio of whole answers, the product over their tokens (RLOO in TRL)."""

    loss_type: Literal["rloo"] = "rloo"
    formula: ClassVar[str] = "PPO's clip on R = exp(sum_i d)"
    source: ClassVar[str] = "RLOO, arXiv 2402.14740; TRL"
    default_bounds: ClassVar[dict[str, float]] = offset_bounds(0.2, 0.2)
    ratio_level: Literal["sequence_sum"] = "sequence_sum"
    cliprange_low: float | None = Field(default=0.2, ge=0)
    cliprange_high: float | None = Field(default=0.2, ge=0)


@register_policy_loss
class LUSPOConfig(PPOClipConfig):
    """LUSPO: the loss of GSPO times its sequence's tokens: a mean over sequences without a length bias."""

    coupling: ClassVar[Coupling] = "sequence"

    loss_type: Literal["luspo"] = "luspo"
    formula: ClassVar[str] = "T_i times PPO's clip on s = exp(mean_i d)"
    source: ClassVar[str] = "LUSPO, arXiv 2602.05261"
    default_bounds: ClassVar[dict[str, float]] = offset_bounds(2e-3, 2.5e-3)
    ratio_level: RatioLevel = "sequence"
    log_ratio_clamp: float | None = Field(default=None, gt=0)
    cliprange_low: float | None = Field(default=2e-3, ge=0)
    cliprange_high: float | None = Field(default=2.5e-3, ge=0)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        assert batch.sequences is not None
        return self.clipped(batch) * batch.sequences.spread(batch.sequences.lengths(batch.logprobs))
