"""Cross-entropy for supervised fine-tuning and pre-training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, ClassVar

from pydantic import Field
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.head.backend import LossTwin
from xloss.losses.base import BaseLossContext, TokenLoss, require
from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs, PerToken
from xloss.losses.reduced import ReducedLossConfig
from xloss.losses.reduction import attach_token_weights
from xloss.metrics import Metric
from xloss.stats import StatSpec, TokenStats


class CELossConfig(ReducedLossConfig):
    """``sum_t w_t (nll_t + z_loss_coef lse_t^2)``, with weights calibrated over the whole global batch.

    Args:
        label_smoothing: mass spread evenly over the vocabulary, target included (torch; arXiv 1512.00567).
        z_loss_coef: factor of ``lse^2`` (PaLM, arXiv 2204.02311).
    """

    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    z_loss_coef: float = Field(default=0.0, ge=0)

    @property
    def loss_ctx_cls(self) -> type[CELossContext]:
        return CELossContext


class CELossContextInputItem(BaseLossContextInputItem):
    """Labels of one micro-batch.

    Args:
        token_weight: free weight of each token, multiplied into ``loss_reduction``'s and counted in the denominator.
    """

    token_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None


class CELossKwargs(BaseLossKwargs):
    """Args: token_weight: as in the item. loss_weight: calibrated weight, the denominator included."""

    token_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None


class CELossContext(BaseLossContext[CELossContextInputItem]):
    """Cross-entropy of one micro-batch."""

    loss_cfg: CELossConfig
    loss_kwargs: CELossKwargs
    token_local: ClassVar[bool] = True

    @classmethod
    def calibrate(
        cls,
        kwargs_list: list[CELossKwargs],
        loss_cfg: CELossConfig,
        cu_seq_lens_list: Sequence[Tensor] | None,
        sp_mesh: DeviceMesh | None,
    ) -> None:
        options = loss_cfg.reduction_options()
        attach_token_weights(kwargs_list, loss_cfg.ignore_idx, options, cu_seq_lens_list, sp_mesh)

    def check_ready(self) -> None:
        require(self.loss_kwargs, "loss_weight", "call build_batches on the contexts of this optimizer step first")

    def stats_needed(self) -> StatSpec:
        return StatSpec(mean_logit=self.loss_cfg.label_smoothing > 0)

    def twin(self, loss_kwargs: Any) -> LossTwin:
        cfg, weight = self.loss_cfg, loss_kwargs.loss_weight
        numbers: dict[str, float | None] = {"label_smoothing": cfg.label_smoothing, "z_loss_coef": cfg.z_loss_coef}
        return LossTwin("ce", numbers, vectors={"weight": weight, "aux_weight": weight})

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        cfg, nll = self.loss_cfg, -stats.logprobs
        loss = nll
        if cfg.label_smoothing:
            assert stats.mean_logit is not None
            loss = (1 - cfg.label_smoothing) * nll + cfg.label_smoothing * (stats.lse - stats.mean_logit)
        if cfg.z_loss_coef:
            loss = loss + cfg.z_loss_coef * stats.lse.square()
        metrics = {"nll": Metric.mean(nll), "num_tokens": Metric.count_of(nll)}
        if stats.entropy is not None:
            metrics["entropy"] = Metric.mean(stats.entropy)
        return loss * loss_kwargs.loss_weight, metrics
