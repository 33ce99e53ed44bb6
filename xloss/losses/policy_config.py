"""What a policy step adds up: the policy loss, KL penalty, entropy bonus, a critic's loss, corrections and masks."""

from __future__ import annotations

from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from xloss.distributed import TokenRanks
from xloss.head.backend import LossTwin
from xloss.losses.grpo_kwargs import GRPOLossKwargs
from xloss.losses.masked import MaskedLossConfig
from xloss.losses.nonfinite import NonFinite
from xloss.losses.policies import AnyPolicyLossConfig, PolicyLossConfig
from xloss.losses.policies.base import Coupling
from xloss.losses.reduction import Reduction, ReductionOptions, Weights
from xloss.losses.value import ValueLossConfig
from xloss.losses.xtuner_rollout import AnyRolloutCorrection
from xloss.policy.kl import KL_ESTIMATOR


class PolicyStepConfig(MaskedLossConfig):
    """``sum_t w_t (is_t policy_t + kl_loss_coef kl_t - entropy_coef H_t)``, ``w_t`` calibrated by ``loss_reduction``.

    Args:
        policy_loss_cfg: a typed policy loss or a dict of its fields, tagged by ``loss_type``.
        entropy_coef: factor of the entropy bonus, with the exact gradient of the full distribution's entropy.
        entropy_reduction: how the entropy bonus is averaged, if not by ``loss_reduction`` (TRL: ``token``).
        value_loss: loss of a critic's ``values``, given to ``forward``; needs ``returns``.
        value_loss_coef: its factor.
        rollout_correction: weights and masks on the policy term that correct the sampler against the trainer.
        positive_nll_coef: factor of the mean of ``-logprobs`` over tokens of positive ``rewards`` (VAPO).
        return_token_accuracy: report how often the label is the most probable token.
        nonfinite: what to do where the inputs of a token are NaN or inf: ``raise``, or ``drop`` the token and count it.
    """

    policy_loss_cfg: AnyPolicyLossConfig
    entropy_coef: float = Field(default=0.0, allow_inf_nan=False)
    entropy_reduction: Reduction | None = None
    value_loss: ValueLossConfig | None = None
    value_loss_coef: float = Field(default=0.1, allow_inf_nan=False)
    rollout_correction: AnyRolloutCorrection = None
    positive_nll_coef: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    return_token_accuracy: bool = False
    nonfinite: NonFinite = "raise"

    @property
    def nll_coef(self) -> float:
        """Factor of the mean negative log-likelihood of positive tokens."""
        return self.positive_nll_coef

    def policy_weights(self, counted: list[Any], weights: Weights, ranks: TokenRanks) -> Weights:
        """Weights of the policy term from those of ``loss_reduction``; ``counted`` has the labels that they count."""
        return weights

    @model_validator(mode="after")
    def _corrects_once(self) -> Self:
        if self.rollout_correction is not None:
            self.rollout_correction.check_goes_with(self.policy_loss_cfg)
        return self

    @model_validator(mode="after")
    def _entropy_reduction_holds(self) -> Self:
        self.entropy_reduction_options()  # raises
        return self

    def entropy_reduction_options(self) -> ReductionOptions:
        """The fields about the reduction of the entropy bonus as the calibration takes them."""
        asked = self.reduction_options()
        name = self.entropy_reduction
        if name is None or name == asked.reduction:
            return asked
        return ReductionOptions(
            name, None, asked.count_empty_sequences and name.startswith("sample"), asked.grad_reduce
        )

    def coupled_by(self, corrects_in_pass: bool = False) -> dict[Coupling, str]:
        """What makes a token's loss depend on others, by how far it reaches; empty where each stands alone.

        ``corrects_in_pass``: whether the rollout correction has no ``old_logprobs`` to form its weights from.
        """
        policy: PolicyLossConfig = self.policy_loss_cfg
        reach, name = policy.couples(), type(policy).__name__
        found = self.masks_couple()
        if reach == "sequence":
            found["sequence"] = f"{name} couples the tokens of a sequence"
        elif reach == "group":
            found["group"] = f"{name} couples the answers of a prompt"
        elif reach == "batch":
            found["batch"] = f"{name} couples the tokens of the micro-batch"
        if self.use_kl_loss and self.kl_ratio_level == "sequence":
            found.setdefault("sequence", "kl_ratio_level='sequence' takes the ratio of the sequence")
        if corrects_in_pass and self.rollout_correction is not None and self.rollout_correction.needs_sequences:
            found.setdefault("sequence", "rollout_correction weighs or rejects whole sequences")
        return found

    def twin(self, kw: GRPOLossKwargs, old: Tensor | None) -> LossTwin | None:
        """The policy term with its KL and entropy as a kernel knows them, ``None`` where no kernel does.

        ``old``: the log-probs that the ratio is taken against; ``None`` is on-policy.
        """
        policy: PolicyLossConfig = self.policy_loss_cfg
        known = policy.twin()
        if known is None or self.full_kl or (self.use_kl_loss and not self.kl_in_kernel(policy.ratio_anchor())):
            return None
        loss, numbers = known
        vectors = {
            "weight": kw.policy_loss_weight,
            "advantages": kw.advantages,
            "old_logprobs": old,
            "ref_logprobs": kw.ref_logprobs if self.use_kl_loss else None,
            "kl_weight": kw.kl_loss_weight,
            "aux_weight": kw.entropy_loss_weight,  # holds the coefficient
        }
        numbers["entropy_coef"] = 1.0 if self.entropy_coef else 0.0
        if not self.use_kl_loss or self.kl_loss_type is None:
            return LossTwin(loss, numbers, vectors=vectors)
        assert self.kl_loss_type != "full"
        numbers |= self.kl_numbers()
        return LossTwin(loss, numbers, KL_ESTIMATOR[self.kl_loss_type], self.kl_loss_grad, vectors)
