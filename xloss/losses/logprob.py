"""Log-probs of a batch in the trio's clothes: old and reference log-probs, evaluation."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor

from xloss.distributed.vocab import HeadWeight
from xloss.losses.base import BaseLossContext, TokenLoss
from xloss.losses.config import BaseLossConfig
from xloss.losses.info import LossInfo
from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs
from xloss.stats import TokenStats


class LogProbConfig(BaseLossConfig):
    """Settings of the log-prob pass. Without gradient it runs forward-only."""

    @property
    def loss_ctx_cls(self) -> type[LogProbContext]:
        return LogProbContext


class LogProbKwargs(BaseLossKwargs):
    """Labels whose log-probs are wanted."""


class LogProbContext(BaseLossContext[BaseLossContextInputItem]):
    """``forward`` returns log-probs in the shape of the labels in place of a loss; 0 at ignored labels.

    (XTuner's returns the log-prob of token 0 there.) Differentiable.
    """

    loss_cfg: LogProbConfig
    loss_kwargs: LogProbKwargs
    token_local: ClassVar[bool] = False

    def needs_whole(self) -> bool:
        return False  # a log-prob is of its own token

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> TokenLoss:
        return stats.logprobs.sum()

    def forward(
        self, hidden_states: Tensor, head_weight: HeadWeight, head_bias: Tensor | None = None
    ) -> tuple[Tensor, LossInfo]:
        """Log-probs ``[.., T]``, nats, float32 (float64 for float64); and the ``LossInfo``."""
        _, info = super().forward(hidden_states, head_weight, head_bias)
        assert info.logprobs is not None
        return info.logprobs, info

    __call__ = forward
