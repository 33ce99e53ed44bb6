"""Cross-entropy against K weighted targets a token: soft labels, teacher top-k, Tinker's ``[N, K]`` cross-entropy."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from torch import Tensor

from xloss.distributed import TokenRanks
from xloss.errors import ShapeError
from xloss.losses import calibration
from xloss.losses.base import BaseLossContext, TokenLoss
from xloss.losses.facts import LossForm
from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs, PerToken, require
from xloss.losses.reduced import ReducedLossConfig
from xloss.losses.reduction import Reduction, reduction_weights
from xloss.metrics import Metric
from xloss.policy import supervised
from xloss.stats import TokenStats


class SoftCELossConfig(ReducedLossConfig):
    """``-sum_t w_t sum_k target_weights_tk log p_t(target_tokens_tk)``.

    Args:
        loss_reduction: as for all losses; the default is the plain sum, ``w_t = 1`` (Tinker).
    """

    forms: ClassVar[tuple[LossForm, ...]] = (
        LossForm("soft_cross_entropy", "-sum_k w_k lp_k", "Tinker", "Cross-entropy on K weighted targets a token."),
    )

    loss_reduction: Reduction = "sum"

    @property
    def loss_ctx_cls(self) -> type[SoftCELossContext]:
        return SoftCELossContext


class SoftCELossContextInputItem(BaseLossContextInputItem):
    """Targets of one micro-batch.

    Args:
        shifted_labels: says which tokens count: ``ignore_idx`` leaves a token out, anything else (such as
            ``target_tokens[..., 0]``) keeps it.
        target_tokens: ``[.., K]``, int; ``ignore_idx`` leaves a target out.
        target_weights: ``[.., K]``, float, of any sign; they need not sum to 1.
    """

    target_tokens: Annotated[Tensor, PerToken(pad=-100, trailing=True)]
    target_weights: Annotated[Tensor, PerToken(pad=0.0, trailing=True)]


class SoftCELossKwargs(BaseLossKwargs):
    """Args: target_tokens, target_weights: as in the item. loss_weight: calibrated, the denominator included."""

    target_tokens: Annotated[Tensor, PerToken(pad=-100, trailing=True)]
    target_weights: Annotated[Tensor, PerToken(pad=0.0, trailing=True)]
    loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None

    def check(self) -> None:
        super().check()
        if self.target_tokens.shape != self.target_weights.shape:
            raise ShapeError(
                f"target_weights must have the shape of target_tokens, {tuple(self.target_tokens.shape)}; "
                f"got {tuple(self.target_weights.shape)}"
            )


class SoftCELossContext(BaseLossContext[SoftCELossContextInputItem]):
    """Soft cross-entropy of one micro-batch. ``info.logprobs`` is ``[.., K]``, 0 at targets left out."""

    loss_cfg: SoftCELossConfig
    loss_kwargs: SoftCELossKwargs
    token_local: ClassVar[bool] = True
    label_field: ClassVar[str] = "target_tokens"

    @classmethod
    def calibrate(
        cls,
        kwargs_list: list[Any],
        loss_cfg: Any,
        cu_seq_lens_list: Sequence[Tensor] | None,
        ranks: TokenRanks,
    ) -> None:
        calibration.attach_cu_seq_lens(kwargs_list, cu_seq_lens_list)
        options = loss_cfg.reduction_options()
        weights = reduction_weights(kwargs_list, loss_cfg.ignore_idx, options, ranks)
        for kwargs, weight in zip(kwargs_list, weights(), strict=True):
            kwargs.loss_weight = weight

    def check_ready(self) -> None:
        require(self.loss_kwargs, "loss_weight", "call build_batches on the contexts of this optimizer step first")

    def head_labels(self, loss_kwargs: Any) -> Tensor:
        ignore_idx, targets = self.loss_cfg.ignore_idx, loss_kwargs.target_tokens
        ignored: Tensor = loss_kwargs.shifted_labels == ignore_idx
        labels: Tensor = targets.masked_fill(ignored.unsqueeze(-1), ignore_idx)
        return labels

    def known_zero_grad(self) -> Tensor:
        return (self._weights(self.loss_kwargs) == 0).all(-1)

    def _weights(self, loss_kwargs: Any) -> Tensor:
        """``target_weights``, 0 at targets left out whatever stands there."""
        left_out = self.head_labels(loss_kwargs) == self.loss_cfg.ignore_idx
        weights: Tensor = loss_kwargs.target_weights.masked_fill(left_out, 0)
        return weights

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        loss = supervised.soft_cross_entropy(stats.logprobs, self._weights(loss_kwargs))
        metrics = {"soft_ce": Metric.mean(loss), "num_tokens": Metric.count_of(loss)}
        if stats.entropy is not None:
            metrics["entropy"] = Metric.mean(stats.entropy)
        return loss * loss_kwargs.loss_weight, metrics
