"""The rollout correction with XTuner's names and tuples, and its call on packed rollouts."""

from __future__ import annotations

from typing import Annotated, Any, Self

import torch
from pydantic import BeforeValidator, ConfigDict, model_validator
from torch import Tensor

from xloss.errors import ShapeError
from xloss.losses.correction import correct, correction_metrics, log_mismatch
from xloss.losses.model import StrictModel
from xloss.losses.rollout_correction import Action, RolloutCorrection
from xloss.metrics import Metric
from xloss.packing import Segments
from xloss.policy.weights import Level

XTUNER_NAMES = {
    "mismatch_k1": "mismatch/mismatch_kl",
    "mismatch_k3": "mismatch/mismatch_k3_kl",
    "mismatch_abs": "mismatch/mismatch_logprob_abs_diff",
    "mismatch_log_ppl_diff": "mismatch/mismatch_log_ppl_diff",
    "mismatch_ppl_ratio": "mismatch/mismatch_ppl_ratio",
    "rollout_is_mean": "mismatch/rollout_is_mean",
    "rollout_is_std": "mismatch/rollout_is_std",
    "rollout_is_min": "mismatch/rollout_is_min",
    "rollout_is_max": "mismatch/rollout_is_max",
    "rollout_is_ess": "mismatch/rollout_is_eff_sample_size",
    "rollout_is_low_frac": "mismatch/rollout_is_ratio_fraction_low",
    "rollout_is_high_frac": "mismatch/rollout_is_ratio_fraction_high",
    "rollout_is_veto_frac": "mismatch/rollout_is_veto_fraction",
}
"""XTuner's name of each figure of ``correction_metrics`` that it has too."""


class RolloutImportanceSampling(StrictModel):
    """XTuner's names and its tuples, ``(upper, lower)``. ``native()`` says the same with named bounds.

    Args:
        rollout_is_level: ``token``, ``sequence`` or ``geometric``.
        rollout_is_mode: ``truncate`` (clamps at both ends), ``mask`` or ``both``.
        rollout_is_threshold: (upper, lower) of the weight; ``None`` switches the correction off.
        rollout_is_mask_threshold: (upper, lower) of the mask, where it differs.
        rollout_is_veto_threshold: (upper, lower) beyond which one token rejects its sequence.
    """

    model_config = ConfigDict(frozen=True)

    rollout_is_level: Level = "token"
    rollout_is_mode: Action = "truncate"
    rollout_is_threshold: tuple[float, float] | None = None
    rollout_is_mask_threshold: tuple[float, float] | None = None
    rollout_is_veto_threshold: tuple[float, float] | None = None

    @model_validator(mode="after")
    def _upper_first(self) -> Self:
        for name in ("rollout_is_threshold", "rollout_is_mask_threshold", "rollout_is_veto_threshold"):
            pair = getattr(self, name)
            if pair is not None and not pair[0] > pair[1] >= 0:
                raise ValueError(f"{name} is (upper, lower), as in XTuner, with upper > lower >= 0; got {pair}")
            if pair is not None and name != "rollout_is_threshold" and self.rollout_is_threshold is None:
                raise ValueError(f"{name} needs rollout_is_threshold: without it the correction is off")
        return self

    def native(self) -> RolloutCorrection | None:
        """The same correction; ``None`` where it is off. Rejected tokens leave the batch, as in XTuner."""
        if self.rollout_is_threshold is None:
            return None
        high, low = self.rollout_is_threshold
        masks = self.rollout_is_mode != "truncate" and self.rollout_is_mask_threshold is not None
        mask_high, mask_low = self.rollout_is_mask_threshold or (None, None)
        veto_high, veto_low = self.rollout_is_veto_threshold or (None, None)
        return RolloutCorrection(
            level=self.rollout_is_level,
            action=self.rollout_is_mode,
            low=low,
            high=high,
            mask_low=mask_low if masks else None,
            mask_high=mask_high if masks else None,
            veto_low=veto_low or None,
            veto_high=veto_high,
            renormalize_rejected=True,
        )

    def compute_rollout_importance_weights_and_metrics(
        self, old_log_prob: Tensor, rollout_log_prob: Tensor, num_tokens: Tensor, response_mask: Tensor
    ) -> tuple[Tensor | None, Tensor, dict[str, float], dict[str, float]]:
        """What XTuner computes before it builds a loss; reads results back to the host.

        Set ``is_weights`` to the weights and the labels to ``ignore_idx`` where the mask is 0, or leave both to
        ``GRPOLossConfig(rollout_correction=...)``, which does the same.

        Args:
            old_log_prob: of the trainer, ``[T]`` or ``[1, T]``, as are ``rollout_log_prob`` and ``response_mask``.
            num_tokens: lengths of the packed sequences, ``[N]``, T in all.

        Returns:
            Weights (0 outside ``response_mask``; ``None`` where the correction is off), the mask without rejected
            tokens, figures of the mismatch (the pack taken as one sequence), figures of the weights.
        """
        valid = response_mask.reshape(-1).bool()
        ends = torch.as_tensor(num_tokens, device=valid.device).cumsum(0)
        if int(ends[-1]) != valid.numel():
            raise ShapeError(f"num_tokens must add up to {valid.numel()} as response_mask has; got {int(ends[-1])}")
        old, rollout = (x.reshape(-1) for x in (old_log_prob, rollout_log_prob))
        x = log_mismatch(old, rollout)
        pack = Segments.of(torch.tensor([0, valid.numel()], device=valid.device), valid)
        off = RolloutCorrection()
        figures = correction_metrics(correct(off, x, valid, pack), off)
        mismatch = _named(figures, "mismatch")
        for name, logprobs in (("training", old), ("rollout", rollout)):
            mismatch[f"mismatch/mismatch_{name}_ppl"] = float(torch.exp(-pack.mean(logprobs))[0])
        native = self.native()
        if native is None:
            return None, response_mask, mismatch, {}
        sequences = Segments.of(torch.cat([ends.new_zeros(1), ends]), valid)
        found = correct(native, x, valid, sequences)
        metrics = _named(correction_metrics(found, native), "rollout_is")
        kept = found.kept.reshape(response_mask.shape).to(response_mask.dtype)
        return found.truncated.reshape(response_mask.shape), kept, mismatch, metrics


def _named(metrics: dict[str, Metric], prefix: str) -> dict[str, float]:
    """Results of those that begin with ``prefix``, by XTuner's names."""
    return {
        XTUNER_NAMES[name]: float(metric.result())
        for name, metric in metrics.items()
        if name.startswith(prefix) and name in XTUNER_NAMES
    }


def _native(value: Any) -> Any:
    return value.native() if isinstance(value, RolloutImportanceSampling) else value


AnyRolloutCorrection = Annotated[RolloutCorrection | None, BeforeValidator(_native)]
"""A ``RolloutCorrection`` or a dict of its fields, XTuner's ``RolloutImportanceSampling``, or ``None``."""
