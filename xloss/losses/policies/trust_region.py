"""Losses masked by how far the sampled token's probability moved: DPPO (TV, binary KL), prime-rl's losses."""

from __future__ import annotations

import math
from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from xloss.losses.policies.base import register_policy_loss
from xloss.losses.policies.metrics import share
from xloss.losses.policies.ratio import RatioPolicyConfig
from xloss.metrics import Metric
from xloss.policy import trust_region
from xloss.policy.batch import PolicyBatch
from xloss.policy.weights import divergence


class _MaskedConfig(RatioPolicyConfig):
    """A policy gradient on kept tokens, and a quadratic pull on all."""

    ratio_cap: float | None = Field(default=20.0, gt=0, allow_inf_nan=False)
    kl_tau: float = Field(default=0.0, ge=0, allow_inf_nan=False)

    def keep(self, batch: PolicyBatch) -> Tensor:
        """Tokens whose gradient counts, bool ``[T]``."""
        raise NotImplementedError

    def gains(self, batch: PolicyBatch) -> Tensor:
        """What takes the place of advantages."""
        return batch.advantages

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return trust_region.masked_policy_gradient(
            batch.logprobs,
            batch.old_logprobs,
            self.gains(batch),
            self.keep(batch),
            ratio_cap=self.ratio_cap,
            kl_tau=self.kl_tau,
            log_ratio_clamp=self.log_ratio_clamp,
        )

    def no_gradient_without_advantage(self) -> bool:
        return self.kl_tau == 0

    def metrics(self, batch: PolicyBatch) -> dict[str, Metric]:
        log_ratio = batch.log_ratio.detach()
        kept, grown, k3 = self.keep(batch), log_ratio > 0, divergence(log_ratio, "k3")
        shares = {
            "masked_frac": ~kept,
            "masked_frac_low": ~kept & ~grown,
            "masked_frac_high": ~kept & grown,
        }
        found = super().metrics(batch) | {name: share(batch, mask) for name, mask in shares.items()}
        for name, mask in (("masked_kl_k3", ~kept), ("kept_kl_k3", kept)):
            found[name] = Metric.mean(k3, mask if batch.sequences is None else mask & batch.sequences.valid)
        return found


@register_policy_loss
class DPPOTVConfig(_MaskedConfig):
    """DPPO by total variation, ``|p - q|`` of the sampled token. ``one_sided=False`` is prime-rl's ``ipo``."""

    loss_type: Literal["dppo_tv"] = "dppo_tv"
    formula: ClassVar[str] = (
        "-A sg(min(r, ratio_cap)) lp where p - q <= delta_high (A > 0) or p - q >= -delta_low, else 0; + kl_tau d^2"
    )
    source: ClassVar[str] = "DPPO, arXiv 2602.04879; verl, SkyRL, prime-rl"
    delta_low: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    delta_high: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    one_sided: bool = True

    def keep(self, batch: PolicyBatch) -> Tensor:
        return trust_region.tv_keep(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            delta_low=self.delta_low,
            delta_high=self.delta_high,
            one_sided=self.one_sided,
        )


@register_policy_loss
class DPPOKLConfig(_MaskedConfig):
    """DPPO by the KL divergence of the sampled token against all others."""

    loss_type: Literal["dppo_kl"] = "dppo_kl"
    formula: ClassVar[str] = (
        "-A sg(min(r, ratio_cap)) lp where the binary KL(q, p) <= delta or p moved against A, else 0; + kl_tau d^2"
    )
    source: ClassVar[str] = "DPPO, arXiv 2602.04879; verl, SkyRL"
    delta_low: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    delta_high: float = Field(default=0.2, ge=0, allow_inf_nan=False)

    def keep(self, batch: PolicyBatch) -> Tensor:
        return trust_region.kl_keep(
            batch.logprobs,
            batch.old_logprobs,
            batch.advantages,
            delta_low=self.delta_low,
            delta_high=self.delta_high,
        )


@register_policy_loss
class RefKLConfig(_MaskedConfig):
    """On-policy distillation as a policy gradient (prime-rl ``ref_kl``): the advantage is ``ref - logprobs``."""

    loss_type: Literal["ref_kl"] = "ref_kl"
    formula: ClassVar[str] = "-sg(ref - lp) r where p - q >= -delta_low, else 0; + kl_tau d^2"
    source: ClassVar[str] = "prime-rl"
    needs: ClassVar[tuple[str, ...]] = ("ref_logprobs",)
    delta_low: float = Field(default=0.2, ge=0, allow_inf_nan=False)
    ratio_cap: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    kl_tau: float = Field(default=1e-3, ge=0, allow_inf_nan=False)
    log_ratio_clamp: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    def gains(self, batch: PolicyBatch) -> Tensor:
        assert batch.ref_logprobs is not None
        return (batch.ref_logprobs - batch.logprobs).detach()

    def keep(self, batch: PolicyBatch) -> Tensor:
        return trust_region.tv_keep(
            batch.logprobs,
            batch.old_logprobs,
            self.gains(batch),
            delta_low=self.delta_low,
            delta_high=math.inf,
            one_sided=False,
        )

    def no_gradient_without_advantage(self) -> bool:
        return False
