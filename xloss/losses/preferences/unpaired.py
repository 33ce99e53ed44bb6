"""Losses that judge each sequence alone: KTO and its kin."""

from __future__ import annotations

from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from xloss.losses.preferences.base import PreferenceBatch, PreferenceTerm, register_preference_loss
from xloss.policy import preference as formulas


class UnpairedTerm(PreferenceTerm):
    """A term that judges each sequence alone, desirable or not.

    Args:
        desirable_weight: factor of desirable sequences' losses.
        undesirable_weight: factor of the others'.
    """

    paired: ClassVar[bool] = False
    reads_scores: ClassVar[bool] = False

    desirable_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    undesirable_weight: float = Field(default=1.0, ge=0, allow_inf_nan=False)

    def side(self, log_ratios: Tensor, batch: PreferenceBatch, desirable: bool) -> Tensor:
        """Losses of one side."""
        raise NotImplementedError

    def losses(self, batch: PreferenceBatch) -> Tensor:
        chosen = self.desirable_weight * self.side(batch.chosen.log_ratios, batch, True)
        return torch.cat([chosen, self.undesirable_weight * self.side(batch.rejected.log_ratios, batch, False)])


@register_preference_loss
class KTOTerm(UnpairedTerm):
    """KTO: each sequence against a reference point; needs ``kl``."""

    loss_type: Literal["kto"] = "kto"
    formula: ClassVar[str] = (
        "desirable_weight (1 - sigma(beta (u - kl))), undesirable_weight (1 - sigma(beta (kl - u)))"
    )
    source: ClassVar[str] = "KTO, arXiv 2402.01306"
    needs: ClassVar[tuple[str, ...]] = ("kl",)

    def side(self, log_ratios: Tensor, batch: PreferenceBatch, desirable: bool) -> Tensor:
        assert batch.kl is not None
        return formulas.kto(log_ratios, batch.kl, self.scale, desirable)


@register_preference_loss
class APOZeroUnpairedTerm(UnpairedTerm):
    """APO-zero on unpaired sequences: KTO with a reference point of 0."""

    loss_type: Literal["apo_zero_unpaired"] = "apo_zero_unpaired"
    formula: ClassVar[str] = "desirable_weight (1 - sigma(beta u)), undesirable_weight sigma(beta u)"
    source: ClassVar[str] = "APO, arXiv 2408.06266; TRL"

    def side(self, log_ratios: Tensor, batch: PreferenceBatch, desirable: bool) -> Tensor:
        return formulas.kto(log_ratios, 0.0, self.scale, desirable)


@register_preference_loss
class BCOTerm(UnpairedTerm):
    """BCO on unpaired sequences; needs ``reward_shift``."""

    loss_type: Literal["bco"] = "bco"
    formula: ClassVar[str] = (
        "-desirable_weight log sigma(beta u - shift), -undesirable_weight log sigma(shift - beta u)"
    )
    source: ClassVar[str] = "BCO, arXiv 2404.04656; TRL"
    needs: ClassVar[tuple[str, ...]] = ("reward_shift",)

    def side(self, log_ratios: Tensor, batch: PreferenceBatch, desirable: bool) -> Tensor:
        assert batch.reward_shift is not None
        return formulas.bco(self.scale * log_ratios, batch.reward_shift, desirable)
