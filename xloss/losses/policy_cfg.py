"""One typed config per policy loss, tagged by ``loss_type``: its parameters, its defaults, and its formula."""

from __future__ import annotations

import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, ConfigDict, Field, model_validator
from torch import Tensor

from xloss.errors import unknown_name
from xloss.head.backend import TwinName
from xloss.losses.model import StrictModel
from xloss.policy import surrogate

Twin = tuple[TwinName, dict[str, float | None]]


class PolicyLossConfig(StrictModel):
    """Parameters of one policy loss; ``per_token`` is its formula from ``xloss.policy``."""

    model_config = ConfigDict(frozen=True)

    zero_at_zero_advantage: ClassVar[bool] = True
    """Whether a token with advantage 0 has no gradient, whatever its log-probs."""

    def per_token(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        """Loss of each token ``[T]``, unweighted."""
        raise NotImplementedError

    def ratio_bounds(self) -> tuple[float, float] | None:
        """Lowest and highest ratio that is not clipped, or ``None`` where nothing clips."""
        return None

    def twin(self) -> Twin | None:
        """Name and numbers of the kernel that knows this formula, or ``None``."""
        return None


class VanillaConfig(PolicyLossConfig):
    """PPO / GRPO clip, with XTuner's dual clip and log-ratio clamp. ``clip_ratio_c=None`` is plain PPO."""

    loss_type: Literal["vanilla"] = "vanilla"
    cliprange_low: float = Field(ge=0, lt=1)
    cliprange_high: float = Field(ge=0)
    clip_ratio_c: float | None = Field(default=3.0, gt=1)
    log_prob_diff_min: float | None = -20.0
    log_prob_diff_max: float | None = 20.0

    def per_token(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        return surrogate.ppo_clip(logprobs, old_logprobs, advantages, **self.model_dump(exclude={"loss_type"}))

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

    def per_token(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        return surrogate.cispo(logprobs, old_logprobs, advantages, **self.model_dump(exclude={"loss_type"}))

    def ratio_bounds(self) -> tuple[float, float]:
        return self.clip_low_threshold, self.clip_high_threshold

    def twin(self) -> Twin:
        return "cispo", {"ratio_min": self.clip_low_threshold, "ratio_max": self.clip_high_threshold}


class ImportanceSamplingConfig(PolicyLossConfig):
    """Unclipped importance-weighted policy gradient."""

    loss_type: Literal["importance_sampling"] = "importance_sampling"

    def per_token(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        return surrogate.importance_sampling(logprobs, old_logprobs, advantages)

    def twin(self) -> Twin:
        return "importance_sampling", {}


class DROConfig(PolicyLossConfig):
    """Direct reward optimisation: a quadratic pull towards the old policy instead of a clip."""

    loss_type: Literal["dro"] = "dro"
    beta: float = Field(default=0.05, ge=0)
    zero_at_zero_advantage: ClassVar[bool] = False

    def per_token(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        return surrogate.dro(logprobs, old_logprobs, advantages, beta=self.beta)

    def twin(self) -> Twin:
        return "dro", {"beta": self.beta}


class ReinforceConfig(PolicyLossConfig):
    """Plain policy gradient; the old policy does not enter."""

    loss_type: Literal["reinforce"] = "reinforce"

    def per_token(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor) -> Tensor:
        return surrogate.reinforce(logprobs, advantages)

    def twin(self) -> Twin:
        return "reinforce", {}


_BY_TYPE: dict[str, type[PolicyLossConfig]] = {
    cls.model_fields["loss_type"].default: cls
    for cls in (VanillaConfig, CISPOConfig, ImportanceSamplingConfig, DROConfig, ReinforceConfig)
}


def _from_dict(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    loss_type = value.get("loss_type", "vanilla")
    if loss_type not in _BY_TYPE:
        raise ValueError(unknown_name("loss_type", str(loss_type), list(_BY_TYPE)))
    return _BY_TYPE[loss_type].model_validate(value)


AnyPolicyLossConfig = Annotated[
    VanillaConfig | CISPOConfig | ImportanceSamplingConfig | DROConfig | ReinforceConfig, BeforeValidator(_from_dict)
]
"""A typed policy loss, or a dict of its fields; a dict without ``loss_type`` is ``vanilla`` (XTuner)."""
