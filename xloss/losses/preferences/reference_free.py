"""Losses of pairs without a reference: SFT, CPO, SimPO, AlphaPO, ORPO."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from torch import Tensor

from xloss.losses.preferences.base import (
    Coef,
    PreferenceBatch,
    PreferenceTerm,
    SmoothedTerm,
    register_preference_loss,
)
from xloss.policy import preference as formulas


@register_preference_loss
class SFTTerm(PreferenceTerm):
    """Negative log-likelihood of chosen sequences: the RPO term, MPO's generation loss."""

    loss_type: Literal["sft"] = "sft"
    formula: ClassVar[str] = "-sum_t lp of chosen sequences"
    source: ClassVar[str] = "RPO, arXiv 2404.19733; MPO, 2411.10442"
    reads_reference: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = False

    def losses(self, batch: PreferenceBatch) -> Tensor:
        return torch.zeros_like(batch.chosen.logprobs)

    def nll_factor(self) -> float:
        return 1.0


class ReferenceFreeTerm(PreferenceTerm):
    """A term without a reference, with likelihood of the chosen sequences beside.

    Args:
        nll_coef: factor of the chosen sequences' negative log-likelihood.
    """

    reads_reference: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = False

    nll_coef: Coef = 1.0

    def nll_factor(self) -> float:
        return self.nll_coef


@register_preference_loss
class CPOTerm(SmoothedTerm, ReferenceFreeTerm):
    """CPO: the DPO loss without a reference, and likelihood of the chosen."""

    loss_type: Literal["cpo"] = "cpo"
    formula: ClassVar[str] = "-log sigma(beta (S_w - S_l)) + nll_coef NLL_w"
    source: ClassVar[str] = "CPO, arXiv 2401.08417"

    def losses(self, batch: PreferenceBatch) -> Tensor:
        margin = batch.chosen.logprobs - batch.rejected.logprobs
        return formulas.logistic(self.scale * margin, self.smoothing)


@register_preference_loss
class SimPOTerm(SmoothedTerm, ReferenceFreeTerm):
    """SimPO: means per token, and a target margin.

    Args:
        gamma: target of ``beta`` times the difference (a margin ratio ``r`` is ``gamma = beta r``).
    """

    loss_type: Literal["simpo"] = "simpo"
    formula: ClassVar[str] = "-log sigma(beta (mean S_w - mean S_l) - gamma) + nll_coef NLL_w"
    source: ClassVar[str] = "SimPO, arXiv 2405.14734"
    default_beta: ClassVar[float] = 2.0
    default_average_log_prob: ClassVar[bool] = True

    nll_coef: Coef = 0.0
    gamma: Coef = 0.5

    def losses(self, batch: PreferenceBatch) -> Tensor:
        margin = batch.chosen.logprobs - batch.rejected.logprobs
        return formulas.logistic(self.scale * margin - self.gamma, self.smoothing)


@register_preference_loss
class AlphaPOTerm(SmoothedTerm, ReferenceFreeTerm):
    """AlphaPO: SimPO with a bent reward.

    Args:
        gamma: target of ``beta`` times the difference of rewards.
        alpha: bend of the reward; 0 is SimPO.
    """

    loss_type: Literal["alphapo"] = "alphapo"
    formula: ClassVar[str] = (
        "-log sigma(beta (R_w - R_l) - gamma) + nll_coef NLL_w, R = (1 - exp(-alpha mean S)) / alpha"
    )
    source: ClassVar[str] = "AlphaPO, arXiv 2501.03884"
    default_beta: ClassVar[float] = 2.0
    default_average_log_prob: ClassVar[bool] = True

    nll_coef: Coef = 0.0
    gamma: Coef = 0.5
    alpha: Coef = 0.25

    def losses(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = (formulas.alpha_reward(s.logprobs, self.alpha) for s in (batch.chosen, batch.rejected))
        return formulas.logistic(self.scale * (chosen - rejected) - self.gamma, self.smoothing)


@register_preference_loss
class ORPOTerm(ReferenceFreeTerm):
    """ORPO: log odds of means per token, and likelihood of the chosen."""

    loss_type: Literal["orpo"] = "orpo"
    formula: ClassVar[str] = "nll_coef NLL_w - beta log sigma(odds_w - odds_l), odds = mean S - log(1 - exp(mean S))"
    source: ClassVar[str] = "ORPO, arXiv 2403.07691"
    default_average_log_prob: ClassVar[bool] = True

    def losses(self, batch: PreferenceBatch) -> Tensor:
        odds = formulas.log_odds(batch.chosen.logprobs) - formulas.log_odds(batch.rejected.logprobs)
        return self.scale * formulas.logistic(odds)
