"""The KL penalty of a policy loss: its config, and its value on a batch."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator
from torch import Tensor

from xloss.losses.policies.base import Anchor
from xloss.losses.reduced import ReducedLossConfig
from xloss.policy.batch import PolicyBatch
from xloss.policy.kl import KLGrad, KLType, kl_limits, kl_penalty

Limit = Annotated[float, Field(gt=0, allow_inf_nan=False)] | Literal["auto"] | None


class KLPenaltyConfig(ReducedLossConfig):
    """A loss with an optional KL penalty to a reference policy.

    Args:
        use_kl_loss: add the KL penalty; needs ``ref_logprobs``.
        kl_loss_coef: its factor.
        kl_loss_type: its estimator, required with ``use_kl_loss``; or ``full``, the exact KL(policy, reference) over
            the vocabulary, which needs ``ref_hidden_states`` instead and the reference's head in ``forward``.
        kl_loss_grad: its gradient: ``plain``, ``straight_through``, ``unbiased`` or ``score_function``
            (``xloss.policy.kl.kl_penalty``).
        kl_ratio_anchor: whose samples ``unbiased`` corrects for: ``old`` (as the policy loss finds it) or ``rollout``.
        kl_ratio_level: ``token``, or ``sequence``: the mean log-ratio of the sequence (TRL with sequence-level ratios).
        kl_clamp_in: limit of ``|logprobs - ref_logprobs|``; ``auto`` is 20 for k3 and none for the others.
        kl_clamp_out: limit of the value; ``auto`` is 10 for k3 and none for the others.
        kl_clamp_straight_through: whether a clamped token keeps its gradient.
        kl_clamp_weighted: whether ``kl_clamp_out`` limits the value times the ratio of ``unbiased``, and a clamped
            token loses the gradient of that ratio or of the score function too (NeMo RL).
    """

    use_kl_loss: bool = False
    kl_loss_coef: float = Field(default=0.001, allow_inf_nan=False)
    kl_loss_type: KLType | Literal["full"] | None = None
    kl_loss_grad: KLGrad = "plain"
    kl_ratio_anchor: Anchor = "old"
    kl_ratio_level: Literal["token", "sequence"] = "token"
    kl_clamp_in: Limit = "auto"
    kl_clamp_out: Limit = "auto"
    kl_clamp_straight_through: bool = False
    kl_clamp_weighted: bool = False

    @model_validator(mode="after")
    def _kl_holds(self) -> Self:
        if self.use_kl_loss and self.kl_loss_type is None:
            raise ValueError("kl_loss_type must be given with use_kl_loss=True; low_var_kl (k3) is the usual choice")
        if self.kl_loss_grad != "unbiased" and (self.kl_ratio_anchor, self.kl_ratio_level) != ("old", "token"):
            raise ValueError(
                "kl_ratio_anchor and kl_ratio_level describe the ratio of kl_loss_grad='unbiased'; got "
                f"kl_loss_grad={self.kl_loss_grad!r}"
            )
        if self.kl_clamp_straight_through and self.kl_loss_grad == "straight_through":
            raise ValueError(
                "kl_clamp_straight_through=True means nothing with kl_loss_grad='straight_through', whose gradient no "
                "clamp stops"
            )
        if self.kl_clamp_weighted and (
            self.kl_clamp_straight_through or self.kl_loss_grad not in ("unbiased", "score_function")
        ):
            raise ValueError(
                "kl_clamp_weighted=True is for kl_loss_grad 'unbiased' and 'score_function' without "
                f"kl_clamp_straight_through; got kl_loss_grad={self.kl_loss_grad!r}"
            )
        of_estimators = ("kl_loss_grad", "kl_clamp_in", "kl_clamp_out", "kl_clamp_straight_through")
        for name in of_estimators if self.kl_loss_type == "full" else ():
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(
                    f"{name}={getattr(self, name)!r} is about estimates from one token; kl_loss_type='full' is exact, "
                    "and so is its gradient"
                )
        return self

    @property
    def full_kl(self) -> bool:
        """Whether the penalty compares whole distributions."""
        return self.use_kl_loss and self.kl_loss_type == "full"

    def kl_in_kernel(self, anchor: Anchor) -> bool:
        """Whether kernels can form the penalty beside a policy loss with this anchor."""
        same_ratio = self.kl_loss_grad != "unbiased" or self.kl_ratio_anchor == anchor
        clamps_known = not (self.kl_clamp_straight_through or self.kl_clamp_weighted)
        return same_ratio and clamps_known and not self.full_kl

    def kl_numbers(self) -> dict[str, float]:
        """Numbers of the penalty as kernels take them."""
        assert self.kl_loss_type is not None and self.kl_loss_type != "full"
        limits = kl_limits(self.kl_loss_type, self.kl_clamp_in, self.kl_clamp_out)
        inner, outer = (math.inf if limit is None else limit for limit in limits)
        return {"kl_clamp_in": inner, "kl_clamp_out": outer}


def kl_of(cfg: KLPenaltyConfig, batch: PolicyBatch, sampled: Tensor | None, divergence: Tensor | None) -> Tensor:
    """The penalty of each token ``[T]``, before its coefficient.

    ``sampled``: log-probs of the policy whose samples ``unbiased`` corrects for; ``None``: the current one's.
    ``divergence``: that of the whole distributions, for ``full``.
    """
    if cfg.kl_loss_type == "full":
        assert divergence is not None
        return divergence
    assert cfg.kl_loss_type is not None and batch.ref_logprobs is not None
    log_ratio = None
    if cfg.kl_loss_grad == "unbiased":
        log_ratio = batch.logprobs - (batch.logprobs.detach() if sampled is None else sampled)
        if cfg.kl_ratio_level == "sequence":
            assert batch.sequences is not None
            log_ratio = batch.sequences.spread(batch.sequences.mean(log_ratio))
    return kl_penalty(
        batch.logprobs,
        batch.ref_logprobs,
        cfg.kl_loss_type,
        grad=cfg.kl_loss_grad,
        log_ratio=log_ratio,
        clamp_in=cfg.kl_clamp_in,
        clamp_out=cfg.kl_clamp_out,
        clamp_straight_through=cfg.kl_clamp_straight_through,
        clamp_weighted=cfg.kl_clamp_weighted,
    )
