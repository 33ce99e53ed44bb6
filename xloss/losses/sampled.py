"""Configs of policy losses on samples of another policy: its correction, likelihood of the good ones, bad inputs."""

from __future__ import annotations

from pydantic import Field

from xloss.losses.masked import MaskedLossConfig
from xloss.losses.nonfinite import NonFinite
from xloss.losses.policies.base import PolicyLossConfig
from xloss.losses.xtuner_rollout import AnyRolloutCorrection


class SampledLossConfig(MaskedLossConfig):
    """A policy loss on samples, with what may be done about them beside the loss itself.

    Args:
        rollout_correction: weights and masks on the policy term that correct the sampler against the trainer.
        positive_nll_coef: factor of the mean of ``-logprobs`` over tokens of positive ``rewards`` (VAPO).
        nonfinite: what to do where the inputs of a token are NaN or inf: ``raise``, or ``drop`` the token and count it.
    """

    rollout_correction: AnyRolloutCorrection = None
    positive_nll_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    nonfinite: NonFinite = "raise"

    @property
    def nll_coef(self) -> float:
        """Factor of the mean negative log-likelihood of positive tokens."""
        return self.positive_nll_coef

    def check_corrects_once(self, policy: PolicyLossConfig) -> None:
        """Raise where ``rollout_correction`` would do again, or undo, what the policy loss does itself."""
        if self.rollout_correction is None:
            return
        name = type(policy).__name__
        if policy.folds_is_weights:
            raise ValueError(f"{name} folds is_weights into its formula: give those instead of rollout_correction")
        weighs = "rollout_logprobs" in policy.needs or policy.ratio_anchor() == "rollout"
        if weighs and self.rollout_correction.level is not None:
            raise ValueError(
                f"{name} weighs by the sampler itself; the weights of rollout_correction would do it twice: set its "
                "level to None, or leave it out"
            )
