"""What policy losses on a ratio share: its anchor, its clamp, and the two ways to give its bounds."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field, model_validator

from xloss.losses.policies.base import Anchor, PolicyLossConfig
from xloss.losses.policies.metrics import share
from xloss.metrics import Metric
from xloss.policy.batch import PolicyBatch
from xloss.policy.level import RatioLevel


class RatioPolicyConfig(PolicyLossConfig):
    """A loss on ``r = exp(logprobs - anchor)``, the log-ratio clamped to ``+-log_ratio_clamp``."""

    anchor: Anchor = "old"
    log_ratio_clamp: float | None = Field(default=20.0, gt=0, allow_inf_nan=False)

    def ratio_anchor(self) -> Anchor:
        return self.anchor

    def metrics(self, batch: PolicyBatch) -> dict[str, Metric]:
        if self.log_ratio_clamp is None:
            return {}
        return {"log_ratio_clamp_frac": share(batch, batch.log_ratio.detach().abs() > self.log_ratio_clamp)}


class LeveledRatioConfig(RatioPolicyConfig):
    """A loss whose formula holds for the ratio of a token, of a sequence, or of a turn: ``ratio_level`` chooses."""

    ratio_level: RatioLevel = "token"

    def level(self) -> RatioLevel:
        return self.ratio_level


def offset_bounds(low: float, high: float) -> dict[str, float]:
    """Default bounds in both forms from those as offsets."""
    return {
        "cliprange_low": low,
        "cliprange_high": high,
        "clip_low_threshold": 1 - low,
        "clip_high_threshold": 1 + high,
    }


_OFFSETS = ("cliprange_low", "cliprange_high")
_THRESHOLDS = ("clip_low_threshold", "clip_high_threshold")


class ClippedRatioConfig(LeveledRatioConfig):
    """Bounds of the ratio as offsets from 1 or as absolute thresholds; those not in use are ``None``.

    One bound may be given alone: the other is then the default bound, in the same form.
    """

    default_bounds: ClassVar[dict[str, float]]
    """The default of every one of the four fields, were it in use."""

    cliprange_low: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    cliprange_high: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    clip_low_threshold: float | None = Field(default=None, ge=0, allow_inf_nan=False)
    clip_high_threshold: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _one_form(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        given = {name: data[name] for name in (*_OFFSETS, *_THRESHOLDS) if data.get(name) is not None}
        forms = [form for form in (_OFFSETS, _THRESHOLDS) if not given.keys().isdisjoint(form)]
        if len(forms) == 2:
            raise ValueError(
                f"bounds of the ratio are offsets from 1 ({', '.join(_OFFSETS)}) or absolute "
                f"({', '.join(_THRESHOLDS)}), not both; got {given}"
            )
        unused = {name: data[name] for name in data if name not in (*_OFFSETS, *_THRESHOLDS)}
        if not forms:
            return unused  # None stands for the default
        return unused | dict.fromkeys((*_OFFSETS, *_THRESHOLDS)) | {n: cls.default_bounds[n] for n in forms[0]} | given

    @model_validator(mode="after")
    def _ordered(self) -> ClippedRatioConfig:
        low, high = self.clip_low_threshold, self.clip_high_threshold
        if low is not None and high is not None and low > high:
            raise ValueError(f"clip_low_threshold={low} is above clip_high_threshold={high}")
        return self

    def ratio_bounds(self) -> tuple[float, float]:
        if self.cliprange_low is not None and self.cliprange_high is not None:
            return 1 - self.cliprange_low, 1 + self.cliprange_high
        assert self.clip_low_threshold is not None
        assert self.clip_high_threshold is not None
        return self.clip_low_threshold, self.clip_high_threshold

    def thresholds(self) -> dict[str, float]:
        """The bounds in use as the formulas of ``xloss.policy.surrogate`` take them."""
        low, high = self.ratio_bounds()
        return {"clip_low_threshold": low, "clip_high_threshold": high}
