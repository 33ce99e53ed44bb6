"""Multi-token prediction: the loss of a head that predicts some tokens further ahead than the main one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Self

from pydantic import Field, model_validator
from torch import Tensor

from xloss.distributed import TokenRanks
from xloss.distributed.vocab import HeadWeight
from xloss.errors import MissingFieldError
from xloss.head.backend import LossTwin
from xloss.head.plan import Plan
from xloss.losses import calibration
from xloss.losses.base import TokenLoss
from xloss.losses.ce import CELossConfig, CELossContext, CELossContextInputItem, CELossKwargs
from xloss.losses.facts import LossForm
from xloss.losses.info import LossInfo
from xloss.losses.model import PerToken, require
from xloss.metrics import Metric
from xloss.packing import roll_segments
from xloss.policy.kl import KLType, kl_penalty
from xloss.stats import TokenStats


class MTPLossConfig(CELossConfig):
    """Cross-entropy on labels rolled ``mtp_depth`` tokens to the left inside each sequence (DeepSeek-V3, arXiv
    2412.19437), with all options of ``CELossConfig``; or, in RL, a KL penalty of the same tokens.

    Args:
        mtp_depth: how many tokens further ahead than the main head, from 1.
        detach_mtp_lm_head_weight: give the head (weight and bias) no gradient (XTuner, in RL).
        kl_loss_type: take the KL penalty against ``rollout_logprobs`` in place of the cross-entropy; XTuner's is
            ``low_var_kl``.
    """

    forms: ClassVar[tuple[LossForm, ...]] = (
        LossForm(
            "mtp",
            "cross_entropy (or KL) of the label mtp_depth tokens further ahead",
            "DeepSeek-V3, arXiv 2412.19437; XTuner, Megatron-LM, torchtitan",
            "Multi-token prediction: labels rolled inside each sequence.",
        ),
    )

    mtp_depth: int = Field(default=1, ge=1)
    detach_mtp_lm_head_weight: bool = False
    kl_loss_type: KLType | None = None

    def form(self) -> str:
        return "mtp"

    @model_validator(mode="after")
    def _kl_alone(self) -> Self:
        names = ("label_smoothing", "focal_gamma", "token_scaling", "z_loss_coef")
        if self.kl_loss_type is not None and (given := [name for name in names if getattr(self, name)]):
            raise ValueError(f"kl_loss_type takes the place of the cross-entropy, which {given[0]} is about; give one")
        return self

    @property
    def loss_ctx_cls(self) -> type[MTPLossContext]:
        return MTPLossContext


class MTPLossContextInputItem(CELossContextInputItem):
    """Labels of one micro-batch as the main head has them: rolling is done here.

    Args:
        token_weight: as in ``CELossContextInputItem``; rolled with the labels.
        rollout_logprobs: log-probs of ``shifted_labels`` as the sampler reported them, for ``kl_loss_type``; rolled
            with the labels.
    """

    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None


class MTPLossKwargs(CELossKwargs):
    """The item's tensors, and those rolled: at t of ``mtp_labels`` stands the label that this depth predicts there."""

    rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    mtp_labels: Annotated[Tensor | None, PerToken(pad=-100)] = None
    mtp_rollout_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None


class MTPLossContext(CELossContext):
    """Loss of one depth on one micro-batch. Its hidden states are those of that depth, at the main head's positions."""

    loss_cfg: MTPLossConfig
    loss_kwargs: MTPLossKwargs

    @classmethod
    def calibrate(
        cls,
        kwargs_list: list[Any],
        loss_cfg: Any,
        cu_seq_lens_list: Sequence[Tensor] | None,
        ranks: TokenRanks,
    ) -> None:
        calibration.attach_cu_seq_lens(kwargs_list, cu_seq_lens_list)
        rolled = []
        for kwargs in kwargs_list:
            bounds = kwargs.cu_seq_lens
            if bounds is None and (kwargs.shifted_labels.ndim == 1 or kwargs.shifted_labels.shape[0] == 1):
                raise MissingFieldError(
                    "MTPLossContext needs cu_seq_lens_list for a pack of shape "
                    f"{tuple(kwargs.shifted_labels.shape)}: labels are rolled inside its sequences"
                )
            if loss_cfg.kl_loss_type is not None:
                require(kwargs, "rollout_logprobs", "kl_loss_type compares with the sampler's log-probs")

            def roll(x: Tensor | None, fill: float = 0.0, bounds: Tensor | None = bounds) -> Tensor | None:
                return None if x is None else roll_segments(x, bounds, loss_cfg.mtp_depth, fill)

            kwargs.mtp_labels = roll(kwargs.shifted_labels, loss_cfg.ignore_idx)
            kwargs.mtp_rollout_logprobs = roll(kwargs.rollout_logprobs)
            as_main = {"shifted_labels": kwargs.mtp_labels, "token_weight": roll(kwargs.token_weight)}
            rolled.append(kwargs.replaced(as_main))
        super().calibrate(rolled, loss_cfg, cu_seq_lens_list, ranks)
        for kwargs, other in zip(kwargs_list, rolled, strict=True):
            kwargs.loss_weight, kwargs.z_loss_weight = other.loss_weight, other.z_loss_weight

    def check_ready(self) -> None:
        super().check_ready()
        if self.loss_cfg.kl_loss_type is not None:
            require(self.loss_kwargs, "mtp_rollout_logprobs", "give rollout_logprobs, which kl_loss_type compares with")

    def head_labels(self, loss_kwargs: Any) -> Tensor:
        return require(loss_kwargs, "mtp_labels", "call build_batches on the contexts of this optimizer step first")

    def twin(self, loss_kwargs: Any) -> LossTwin | None:
        return super().twin(loss_kwargs) if self.loss_cfg.kl_loss_type is None else None

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        loss, metrics = super().token_loss(stats, loss_kwargs)
        if self.loss_cfg.kl_loss_type is None:
            return loss, metrics
        kl = kl_penalty(stats.logprobs, loss_kwargs.mtp_rollout_logprobs, self.loss_cfg.kl_loss_type)
        return kl * loss_kwargs.loss_weight, {**metrics, "mtp_kl": Metric.mean(kl)}

    def forward(
        self, hidden_states: Tensor, head_weight: HeadWeight, head_bias: Tensor | None = None
    ) -> tuple[Tensor, LossInfo]:
        """As ``BaseLossContext.forward``, with the hidden states of this depth."""
        return super().forward(hidden_states, *self._head(head_weight, head_bias))

    __call__ = forward

    def explain(
        self,
        hidden_states: Tensor | None = None,
        head_weight: HeadWeight | None = None,
        head_bias: Tensor | None = None,
    ) -> Plan:
        if head_weight is not None:
            head_weight, head_bias = self._head(head_weight, head_bias)
        return super().explain(hidden_states, head_weight, head_bias)

    def _head(self, weight: HeadWeight, bias: Tensor | None) -> tuple[HeadWeight, Tensor | None]:
        if not self.loss_cfg.detach_mtp_lm_head_weight:
            return weight, bias
        return weight.detach(), None if bias is None else bias.detach()
