"""Losses of whole sequences beyond a clipped ratio: GMPO, VESPO, REAL, A*-PO; and FIPO, weighted by what follows."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from xloss.losses.policies.base import Coupling, PolicyLossConfig, register_policy_loss
from xloss.losses.policies.ratio import offset_bounds
from xloss.losses.policies.token_ratio import PPOClipConfig
from xloss.metrics import Metric
from xloss.packing import Segments
from xloss.policy import sequence, surrogate
from xloss.policy.batch import PolicyBatch
from xloss.policy.level import RatioLevel


def _sequences(batch: PolicyBatch) -> Segments:
    assert batch.sequences is not None, "a context hands out sequences with every coupled loss"
    return batch.sequences


@register_policy_loss
class GMPOConfig(PolicyLossConfig):
    """GMPO: the geometric mean of token ratios, each clipped in log space towards its advantage."""

    coupling: ClassVar[Coupling] = "sequence"
    folds_is_weights: ClassVar[bool] = True

    loss_type: Literal["gmpo"] = "gmpo"
    formula: ClassVar[str] = (
        "-mean_i(A) exp(mean_i c), c = min(d, cliprange_high) where A > 0, max(d, -cliprange_low) where A < 0"
    )
    source: ClassVar[str] = "GMPO, arXiv 2507.20673"
    cliprange_low: float = Field(default=0.4, ge=0)
    cliprange_high: float = Field(default=0.4, ge=0)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return sequence.gmpo(
            batch.log_ratio,
            batch.advantages,
            _sequences(batch),
            cliprange_low=self.cliprange_low,
            cliprange_high=self.cliprange_high,
            is_weights=batch.is_weights,
        )

    def metrics(self, batch: PolicyBatch) -> dict[str, Metric]:
        log_ratio, valid = batch.log_ratio.detach(), _sequences(batch).valid
        low = (log_ratio < -self.cliprange_low) & (batch.advantages < 0)
        high = (log_ratio > self.cliprange_high) & (batch.advantages > 0)
        fractions = {"clip_frac_low": low, "clip_frac_high": high}
        return {name: Metric.mean(mask.to(log_ratio.dtype), valid) for name, mask in fractions.items()}


@register_policy_loss
class VESPOConfig(PolicyLossConfig):
    """VESPO: policy gradient under a detached gamma-shaped weight of the whole sequence's ratio."""

    coupling: ClassVar[Coupling] = "sequence"
    folds_is_weights: ClassVar[bool] = True

    loss_type: Literal["vespo"] = "vespo"
    formula: ClassVar[str] = (
        "-sg(exp(lambda + k log W - lambda W)) A lp, W = exp(sum_i d), k and lambda by the sign of A"
    )
    source: ClassVar[str] = "VESPO, arXiv 2602.10693; TRL"
    k_pos: float = Field(default=2.0, ge=0)
    lambda_pos: float = Field(default=3.0, gt=0)
    k_neg: float = Field(default=3.0, ge=0)
    lambda_neg: float = Field(default=2.0, gt=0)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        weight = self.weight(batch)
        return surrogate.reinforce(batch.logprobs, weight * batch.advantages)

    def weight(self, batch: PolicyBatch) -> Tensor:
        """``phi(W)`` of each token's sequence."""
        return sequence.vespo_weight(
            batch.log_ratio,
            batch.advantages,
            _sequences(batch),
            is_weights=batch.is_weights,
            **self.model_dump(exclude={"loss_type"}),
        )

    def metrics(self, batch: PolicyBatch) -> dict[str, Metric]:
        return {"vespo_weight": Metric.mean(self.weight(batch), _sequences(batch).valid)}


@register_policy_loss
class REALConfig(PolicyLossConfig):
    """REAL: good and bad answers of a prompt as two classes; ``loss_reduction="prompt"`` is its mean over prompts."""

    coupling: ClassVar[Coupling] = "group"
    needs: ClassVar[tuple[str, ...]] = ("groups",)

    loss_type: Literal["real"] = "real"
    formula: ClassVar[str] = (
        "log(1 + sum_neg exp(s / tau)) + log(1 + sum_pos exp(-s / tau)), s = mean_i d, over the answers of a prompt"
    )
    source: ClassVar[str] = "REAL, arXiv 2602.05630; ms-swift"
    tau: float = Field(default=0.5, gt=0)

    def level(self) -> RatioLevel:
        return "sequence"

    def per_token(self, batch: PolicyBatch) -> Tensor:
        assert batch.groups is not None
        return sequence.real(batch.log_ratio, batch.advantages, _sequences(batch), batch.groups, tau=self.tau)


@register_policy_loss
class AStarPOConfig(PolicyLossConfig):
    """A*-PO: the log-ratio to the reference is regressed onto the optimal advantage ``R - V*``, given as advantages."""

    coupling: ClassVar[Coupling] = "sequence"
    needs: ClassVar[tuple[str, ...]] = ("ref_logprobs",)
    zero_at_zero_advantage: ClassVar[bool] = False

    loss_type: Literal["a_star_po"] = "a_star_po"
    formula: ClassVar[str] = "(beta sum_i (lp - ref) - A)^2, A = R - V*"
    source: ClassVar[str] = "A*-PO, arXiv 2505.20686"
    beta: float = Field(default=1e-3, gt=0)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        assert batch.ref_logprobs is not None
        return sequence.a_star_po(
            batch.logprobs, batch.ref_logprobs, batch.advantages, _sequences(batch), beta=self.beta
        )


@register_policy_loss
class FIPOConfig(PPOClipConfig):
    """FIPO: PPO's clip, each token weighted by how the policy moved on what follows it."""

    coupling: ClassVar[Coupling] = "sequence"

    loss_type: Literal["fipo"] = "fipo"
    formula: ClassVar[str] = (
        "sg(f_t) times PPO's clip, f_t = clip(exp(sum over s >= t of gamma^(s - t) d_s)), gamma = 2^(-1 / decay_rate)"
    )
    source: ClassVar[str] = "FIPO, arXiv 2603.19835; ms-swift"
    default_bounds: ClassVar[dict[str, float]] = offset_bounds(0.2, 0.2)
    ratio_level: Literal["token"] = "token"
    cliprange_low: float | None = Field(default=0.2, ge=0)
    cliprange_high: float | None = Field(default=0.2, ge=0)
    decay_rate: float = Field(default=32.0, gt=0)
    weight_cliprange: float | None = Field(default=0.2, gt=0)
    weight_clip_high_only: bool = True
    safety_threshold: float | None = Field(default=4.0, gt=0)
    participation_threshold: float | None = Field(default=None, gt=0)

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return self.weight(batch) * self.clipped(batch)

    def weight(self, batch: PolicyBatch) -> Tensor:
        """The influence weight of each token."""
        return sequence.fipo_weight(
            batch.log_ratio,
            batch.advantages,
            _sequences(batch),
            decay_rate=self.decay_rate,
            cliprange=self.weight_cliprange,
            clip_high_only=self.weight_clip_high_only,
            safety_threshold=self.safety_threshold,
            participation_threshold=self.participation_threshold,
        )

    def metrics(self, batch: PolicyBatch) -> dict[str, Metric]:
        return super().metrics(batch) | {"fipo_weight": Metric.mean(self.weight(batch), _sequences(batch).valid)}
