"""Losses of pairs against a reference: DPO and its kin."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field
from torch import Tensor

from xloss.losses.preferences.base import PreferenceBatch, PreferenceTerm, SmoothedTerm, register_preference_loss
from xloss.policy import preference as formulas


class LogisticTerm(SmoothedTerm):
    """DPO's loss; conservative DPO with ``label_smoothing``."""

    def losses(self, batch: PreferenceBatch) -> Tensor:
        return formulas.logistic(self.margin(batch), self.smoothing)


@register_preference_loss
class SigmoidTerm(LogisticTerm):
    """DPO on sums over tokens."""

    loss_type: Literal["sigmoid"] = "sigmoid"
    formula: ClassVar[str] = "-log sigma(beta delta) (1 - eps) - log sigma(-beta delta) eps"
    source: ClassVar[str] = "DPO, arXiv 2305.18290; conservative DPO, Mitchell 2023"


@register_preference_loss
class SigmoidNormTerm(LogisticTerm):
    """DPO on means per token."""

    loss_type: Literal["sigmoid_norm"] = "sigmoid_norm"
    formula: ClassVar[str] = "-log sigma(beta delta) (1 - eps) - log sigma(-beta delta) eps, delta of means per token"
    source: ClassVar[str] = "TRL; open-instruct dpo_norm"
    default_average_log_prob: ClassVar[bool] = True


@register_preference_loss
class RobustTerm(SmoothedTerm):
    """DPO that is unbiased under flipped labels; ``label_smoothing`` below 1/2."""

    loss_type: Literal["robust"] = "robust"
    formula: ClassVar[str] = "(-log sigma(beta delta) (1 - eps) + log sigma(-beta delta) eps) / (1 - 2 eps)"
    source: ClassVar[str] = "Robust DPO, arXiv 2403.00409"
    label_smoothing: float | None = Field(default=None, ge=0, lt=0.5)

    def losses(self, batch: PreferenceBatch) -> Tensor:
        return formulas.robust(self.margin(batch), self.smoothing)


@register_preference_loss
class HingeTerm(PreferenceTerm):
    """Hinge loss on the margin (SLiC, RSO)."""

    loss_type: Literal["hinge"] = "hinge"
    formula: ClassVar[str] = "max(0, 1 - beta delta)"
    source: ClassVar[str] = "SLiC, arXiv 2305.10425; RSO, 2309.06657"

    def losses(self, batch: PreferenceBatch) -> Tensor:
        return formulas.hinge(self.margin(batch))


@register_preference_loss
class IPOTerm(PreferenceTerm):
    """IPO, on means per token as TRL; OpenRLHF and ROLL sum (``average_log_prob=False``)."""

    loss_type: Literal["ipo"] = "ipo"
    formula: ClassVar[str] = "(delta - 1 / (2 beta))^2, delta of means per token"
    source: ClassVar[str] = "IPO, arXiv 2310.12036; TRL"
    default_average_log_prob: ClassVar[bool] = True

    def losses(self, batch: PreferenceBatch) -> Tensor:
        return formulas.ipo(batch.chosen.scores - batch.rejected.scores, self.scale)


@register_preference_loss
class EXOPairTerm(SmoothedTerm):
    """EXO: reverse KL to smoothed labels; ``label_smoothing`` above 0, by default the paper's 0.001."""

    loss_type: Literal["exo_pair"] = "exo_pair"
    formula: ClassVar[str] = (
        "q_w (log q_w - log(1 - eps)) + q_l (log q_l - log eps), q_w = sigma(beta delta), q_l = 1 - q_w"
    )
    source: ClassVar[str] = "EXO, arXiv 2402.00856"
    default_label_smoothing: ClassVar[float] = 1e-3
    label_smoothing: float | None = Field(default=None, gt=0, lt=1)

    def losses(self, batch: PreferenceBatch) -> Tensor:
        return formulas.exo_pair(self.margin(batch), self.smoothing)


@register_preference_loss
class NCAPairTerm(PreferenceTerm):
    """NCA: also keeps the chosen sequence likely in itself."""

    loss_type: Literal["nca_pair"] = "nca_pair"
    formula: ClassVar[str] = "-log sigma(beta u_w) - log sigma(-beta u_w) / 2 - log sigma(-beta u_l) / 2"
    source: ClassVar[str] = "NCA, arXiv 2402.05369"

    def losses(self, batch: PreferenceBatch) -> Tensor:
        return formulas.nca_pair(self.scale * batch.chosen.scores, self.scale * batch.rejected.scores)


@register_preference_loss
class BCOPairTerm(PreferenceTerm):
    """BCO on pairs; without ``reward_shift`` its shift is 0, as in TRL and Liger."""

    loss_type: Literal["bco_pair"] = "bco_pair"
    formula: ClassVar[str] = "-log sigma(beta u_w - shift) - log sigma(shift - beta u_l)"
    source: ClassVar[str] = "BCO, arXiv 2404.04656; TRL, Liger"

    def losses(self, batch: PreferenceBatch) -> Tensor:
        shift = 0.0 if batch.reward_shift is None else batch.reward_shift
        chosen = formulas.bco(self.scale * batch.chosen.scores, shift, True)
        return chosen + formulas.bco(self.scale * batch.rejected.scores, shift, False)


@register_preference_loss
class SPPOHardTerm(PreferenceTerm):
    """SPPO with hard labels: both scores are regressed, the chosen one up, the other down."""

    loss_type: Literal["sppo_hard"] = "sppo_hard"
    formula: ClassVar[str] = "(u_w - 1 / (2 beta))^2 + (u_l + 1 / (2 beta))^2"
    source: ClassVar[str] = "SPPO, arXiv 2405.00675"

    def losses(self, batch: PreferenceBatch) -> Tensor:
        return formulas.sppo_hard(batch.chosen.scores, batch.rejected.scores, self.scale)


@register_preference_loss
class AOTTerm(SmoothedTerm):
    """AOT: order statistics over the pairs of the micro-batch."""

    loss_type: Literal["aot"] = "aot"
    formula: ClassVar[str] = "DPO on sort(S_w - S_l) - sort(ref_w - ref_l) over the pairs of the micro-batch"
    source: ClassVar[str] = "AOT, arXiv 2406.05882; TRL"
    reads_scores: ClassVar[bool] = False

    def losses(self, batch: PreferenceBatch) -> Tensor:
        chosen, rejected = batch.chosen, batch.rejected
        policy, reference = chosen.logprobs - rejected.logprobs, chosen.ref_logprobs - rejected.ref_logprobs
        return formulas.logistic(self.scale * formulas.aot_margin(policy, reference), self.smoothing)


@register_preference_loss
class AOTUnpairedTerm(SmoothedTerm):
    """AOT on unpaired samples: order statistics of chosen and rejected log-ratios, as many of each."""

    loss_type: Literal["aot_unpaired"] = "aot_unpaired"
    formula: ClassVar[str] = "DPO on sort(u_w) - sort(u_l) over the micro-batch"
    source: ClassVar[str] = "AOT, arXiv 2406.05882; TRL"
    reads_scores: ClassVar[bool] = False

    def losses(self, batch: PreferenceBatch) -> Tensor:
        margin = formulas.aot_margin(batch.chosen.log_ratios, batch.rejected.log_ratios)
        return formulas.logistic(self.scale * margin, self.smoothing)


@register_preference_loss
class APOZeroTerm(PreferenceTerm):
    """APO-zero: raise chosen, lower rejected."""

    loss_type: Literal["apo_zero"] = "apo_zero"
    formula: ClassVar[str] = "1 - sigma(beta u_w) + sigma(beta u_l)"
    source: ClassVar[str] = "APO, arXiv 2408.06266"
    reads_scores: ClassVar[bool] = False

    def losses(self, batch: PreferenceBatch) -> Tensor:
        chosen = formulas.kto(batch.chosen.log_ratios, 0.0, self.scale, True)
        return chosen + formulas.kto(batch.rejected.log_ratios, 0.0, self.scale, False)


@register_preference_loss
class APODownTerm(PreferenceTerm):
    """APO-down: lower both, rejected more."""

    loss_type: Literal["apo_down"] = "apo_down"
    formula: ClassVar[str] = "sigma(beta u_w) + 1 - sigma(beta delta)"
    source: ClassVar[str] = "APO, arXiv 2408.06266"

    def losses(self, batch: PreferenceBatch) -> Tensor:
        return formulas.apo_down(self.scale * batch.chosen.log_ratios, self.margin(batch))


@register_preference_loss
class DiscoPOPTerm(PreferenceTerm):
    """DiscoPOP: a logistic and an exponential loss, blended by the margin.

    Args:
        tau: temperature of the blend.
    """

    loss_type: Literal["discopop"] = "discopop"
    formula: ClassVar[str] = "(1 - s) (-log sigma(beta delta)) + s exp(-beta delta), s = sigma(beta delta / tau)"
    source: ClassVar[str] = "DiscoPOP, arXiv 2406.08414"
    tau: float = Field(default=0.05, gt=0, allow_inf_nan=False)

    def losses(self, batch: PreferenceBatch) -> Tensor:
        return formulas.discopop(self.margin(batch), self.tau)
