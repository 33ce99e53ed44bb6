"""Configs of policy losses that may leave tokens out of the policy term, by drift from the sampler or by entropy."""

from __future__ import annotations

from pydantic import Field
from torch import Tensor

from xloss.losses.kl import KLPenaltyConfig
from xloss.losses.policies.base import Coupling
from xloss.policy.batch import PolicyBatch
from xloss.policy.masks import off_policy_sequence_mask, top_entropy_mask


class MaskedLossConfig(KLPenaltyConfig):
    """A policy loss whose masks keep the denominators: tokens left out of the policy term still count.

    Args:
        opsm_delta: keep sequences of negative advantage only up to this drift from their sampler (``rollout_logprobs``,
            else the old ones), in nats per token: the off-policy sequence mask.
        top_entropy_quantile: keep this share of the micro-batch's tokens, those of highest entropy.
    """

    opsm_delta: float | None = None
    top_entropy_quantile: float | None = Field(default=None, gt=0, le=1)

    def masks_couple(self) -> dict[Coupling, str]:
        """What the masks make a token depend on, with the reason in words."""
        found: dict[Coupling, str] = {}
        if self.opsm_delta is not None:
            found["sequence"] = "opsm_delta masks by the mean over a sequence"
        if self.top_entropy_quantile is not None:
            found["batch"] = "top_entropy_quantile ranks the tokens of the micro-batch"
        return found

    def policy_masks(self, batch: PolicyBatch) -> dict[str, Tensor]:
        """``[T]`` bool of each mask asked for: tokens to keep in the policy term."""
        found: dict[str, Tensor] = {}
        if self.opsm_delta is not None:
            assert batch.sequences is not None
            sampled = batch.old_logprobs if batch.rollout_logprobs is None else batch.rollout_logprobs
            found["opsm"] = off_policy_sequence_mask(
                batch.logprobs, sampled, batch.advantages, batch.sequences, delta=self.opsm_delta
            )
        if self.top_entropy_quantile is not None:
            assert batch.sequences is not None and batch.entropy is not None
            valid = batch.sequences.valid
            found["low_entropy"] = top_entropy_mask(batch.entropy, valid, quantile=self.top_entropy_quantile)
        return found
