"""What corrects for a sampler that is not quite the trainer: the config."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import ConfigDict, Field, model_validator
from torch import Tensor

from xloss.losses.model import StrictModel
from xloss.losses.policies.base import PolicyLossConfig
from xloss.policy.weights import Estimator, Level, Over

Action = Literal["truncate", "mask", "both"]


class Rejection(StrictModel):
    """One criterion of rejection sampling: keep where ``low <= statistic <= high``, in nats (verl ``rollout_rs``).

    Args:
        estimator: of KL(sampler, trainer) by each token: ``k1 = -x``, ``k2 = x^2 / 2``, ``k3 = exp(x) - x - 1``.
        over: the statistic is that of the token, or its ``sum``, ``mean`` or ``max`` over the sequence.
        low: lower bound; ``None`` leaves it open.
        high: upper bound.
    """

    model_config = ConfigDict(frozen=True)

    estimator: Estimator
    over: Over = "token"
    low: float | None = None
    high: float | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.low is None and self.high is None:
            raise ValueError("a Rejection needs low, high or both: it would keep everything")
        _ordered("low", self.low, "high", self.high)
        return self


class RolloutCorrection(StrictModel):
    """Weights ``w`` and a mask on the policy term, from ``x = old_logprobs - rollout_logprobs``.

    Args:
        level: ``w = exp(x)`` of the token, ``sequence`` of the sum or ``geometric`` of the mean of ``x`` over the
            sequence; ``None`` leaves the weights at 1.
        action: ``truncate`` clamps ``w`` into the bounds, ``mask`` rejects where it is outside, ``both`` does both.
        low: lower bound of ``w``; ``None`` leaves it open.
        high: upper bound of ``w``; ``None`` leaves it open.
        mask_low: lower bound of the mask where it is not ``low``.
        mask_high: upper bound of the mask where it is not ``high``.
        veto_low: reject a whole sequence if any of its tokens has ``exp(x)`` below this.
        veto_high: the same for above.
        reject: criteria of rejection sampling, all of which must hold.
        batch_normalize: divide ``w`` by its mean over the global batch, over tokens or, at ``sequence`` and
            ``geometric`` level, over sequences.
        renormalize_rejected: rejected tokens leave the batch, as if their label were ignored: denominators count the
            others only, and their KL and entropy terms go too (XTuner, verl). Else they stay in the denominators and
            lose their policy term alone.
        bypass: without ``old_logprobs``, take the ratio against ``rollout_logprobs`` (verl's bypass mode) instead of
            the current policy. The correction compares the current policy with the sampler either way.
    """

    model_config = ConfigDict(frozen=True)

    level: Level | None = "token"
    action: Action = "truncate"
    low: float | None = Field(default=None, ge=0)
    high: float | None = Field(default=2.0, gt=0)
    mask_low: float | None = Field(default=None, ge=0)
    mask_high: float | None = Field(default=None, gt=0)
    veto_low: float | None = Field(default=None, gt=0)
    veto_high: float | None = Field(default=None, gt=0)
    reject: tuple[Rejection, ...] = ()
    batch_normalize: bool = False
    renormalize_rejected: bool = False
    bypass: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for low, high in (("low", "high"), ("mask_low", "mask_high"), ("veto_low", "veto_high")):
            _ordered(low, getattr(self, low), high, getattr(self, high))
        _ordered("mask_low", self.mask_bounds[0], "mask_high", self.mask_bounds[1])
        if self.level is None:
            names = ("action", "low", "high", "mask_low", "mask_high", "batch_normalize")
            of_weights = [n for n in names if getattr(self, n) != type(self).model_fields[n].default]
            if of_weights:
                raise ValueError(f"level=None has no weights, but {of_weights} are about weights")
            if not (self.reject or self.vetoes):
                raise ValueError("level=None without reject, veto_low or veto_high corrects nothing; leave it out")
        if self.action == "truncate" and (self.mask_low is not None or self.mask_high is not None):
            raise ValueError("mask_low and mask_high need action='mask' or 'both'; action='truncate' masks nothing")
        return self

    @property
    def mask_bounds(self) -> tuple[float | None, float | None]:
        """Bounds of the mask on ``w``."""
        low = self.low if self.mask_low is None else self.mask_low
        return low, self.high if self.mask_high is None else self.mask_high

    def truncated(self, weight: Tensor) -> Tensor:
        """``w`` clamped into its bounds."""
        return weight if self.low is None and self.high is None else weight.clamp(self.low, self.high)

    def check_goes_with(self, policy: PolicyLossConfig) -> None:
        """Raise ``ValueError`` where the policy loss does itself what this would do."""
        name = type(policy).__name__
        if policy.folds_is_weights:
            raise ValueError(f"{name} folds is_weights into its formula: give those instead of rollout_correction")
        weighs = "rollout_logprobs" in policy.needs or policy.ratio_anchor() == "rollout"
        if weighs and self.level is not None:
            raise ValueError(
                f"{name} weighs by the sampler itself; the weights of rollout_correction would do it twice: set its "
                "level to None, or leave it out"
            )

    @property
    def vetoes(self) -> bool:
        """Whether single tokens can reject their sequence."""
        return self.veto_low is not None or self.veto_high is not None

    @property
    def needs_sequences(self) -> bool:
        """Whether a token's weight or mask depends on the rest of its sequence."""
        return self.level in ("sequence", "geometric") or self.vetoes or any(r.over != "token" for r in self.reject)


def _ordered(low_name: str, low: float | None, high_name: str, high: float | None) -> None:
    if low is not None and high is not None and low > high:
        raise ValueError(f"{low_name}={low} is above {high_name}={high}")
