"""Policy losses that rank the tokens of a micro-batch: Clip-Cov, KL-Cov, M2PO."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from xloss.losses.policies.base import Coupling, PolicyLossConfig, register_policy_loss
from xloss.policy import coupled
from xloss.policy.batch import PolicyBatch


def _valid(batch: PolicyBatch) -> Tensor:
    assert batch.sequences is not None
    return batch.sequences.valid


@register_policy_loss
class ClipCovConfig(PolicyLossConfig):
    """PPO clip that also drops a few random tokens of high covariance between advantage and log-prob."""

    loss_type: Literal["clip_cov"] = "clip_cov"
    formula: ClassVar[str] = "PPO's clip; 0 at a few random tokens with clip_cov_lb < cov(A, lp) < clip_cov_ub"
    source: ClassVar[str] = "Clip-Cov, arXiv 2505.22617; verl"
    cliprange_low: float = Field(default=0.2, ge=0, lt=1)
    cliprange_high: float = Field(default=0.2, ge=0)
    clip_cov_ratio: float = Field(default=0.0002, ge=0, le=1)
    clip_cov_lb: float = Field(default=1.0, allow_inf_nan=False)
    clip_cov_ub: float = Field(default=5.0, allow_inf_nan=False)
    seed: int = 0
    coupling: ClassVar[Coupling] = "batch"

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.clip_cov_lb >= self.clip_cov_ub:
            raise ValueError(f"clip_cov_lb={self.clip_cov_lb} must be below clip_cov_ub={self.clip_cov_ub}")
        return self

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return coupled.clip_cov(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            _valid(batch),
            **self.model_dump(exclude={"loss_type"}),
        )

    def ratio_bounds(self) -> tuple[float, float]:
        return 1 - self.cliprange_low, 1 + self.cliprange_high


@register_policy_loss
class KLCovConfig(PolicyLossConfig):
    """Unclipped policy gradient with a KL penalty on the tokens of highest covariance."""

    loss_type: Literal["kl_cov"] = "kl_cov"
    formula: ClassVar[str] = "-r A, + ppo_kl_coef |d| at the tokens of highest cov(A, lp)"
    source: ClassVar[str] = "KL-Cov, arXiv 2505.22617; verl"
    kl_cov_ratio: float = Field(default=0.0002, ge=0, le=1)
    ppo_kl_coef: float = Field(default=0.1, ge=0, allow_inf_nan=False)
    coupling: ClassVar[Coupling] = "batch"
    zero_at_zero_advantage: ClassVar[bool] = False

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return coupled.kl_cov(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            _valid(batch),
            **self.model_dump(exclude={"loss_type"}),
        )


@register_policy_loss
class M2POConfig(PolicyLossConfig):
    """Policy gradient without the tokens whose squared log-ratio drives its mean over ``m2_threshold``."""

    loss_type: Literal["m2po"] = "m2po"
    formula: ClassVar[str] = (
        "-r A (or PPO's clip) on the tokens left when the largest d^2 go until their mean < m2_threshold"
    )
    source: ClassVar[str] = "M2PO, arXiv 2510.01161; AReaL, Trinity-RFT"
    m2_threshold: float = Field(default=0.04, gt=0, allow_inf_nan=False)
    trust_region_only: bool = True
    moment_of: Literal["current", "old"] = "current"
    cliprange_low: float | None = Field(default=None, ge=0, lt=1)
    cliprange_high: float | None = Field(default=None, ge=0)
    coupling: ClassVar[Coupling] = "batch"

    @model_validator(mode="after")
    def _both_or_none(self) -> Self:
        if (self.cliprange_low is None) != (self.cliprange_high is None):
            raise ValueError(
                "cliprange_low and cliprange_high go together; "
                f"got cliprange_low={self.cliprange_low}, cliprange_high={self.cliprange_high}"
            )
        return self

    def needed(self) -> tuple[str, ...]:
        """``moment_of="old"`` takes the moment of ``old_logprobs - rollout_logprobs``."""
        return ("old_logprobs", "rollout_logprobs") if self.moment_of == "old" else ()

    def per_token(self, batch: PolicyBatch) -> Tensor:
        moment = None
        if self.moment_of == "old":
            assert batch.rollout_logprobs is not None
            moment = batch.old_logprobs - batch.rollout_logprobs
        return coupled.m2po(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            _valid(batch),
            moment_log_ratio=moment,
            **self.model_dump(exclude={"loss_type", "moment_of"}),
        )

    def ratio_bounds(self) -> tuple[float, float] | None:
        if self.cliprange_low is None or self.cliprange_high is None:
            return None
        return 1 - self.cliprange_low, 1 + self.cliprange_high
