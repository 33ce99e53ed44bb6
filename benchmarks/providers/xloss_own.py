"""Losses that no kernel knows, as a user would write them: one on each way in."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from benchmarks.providers.xloss_gspo import TokenMeanContext
from xloss import BaseLossConfig, PolicyLossConfig, TokenStats, register_policy_loss
from xloss.policy.batch import PolicyBatch


@register_policy_loss
class SoftplusConfig(PolicyLossConfig):
    """``-A log(1 + r)``, in the registry of policy losses."""

    loss_type: Literal["benchmark_softplus"] = "benchmark_softplus"

    def per_token(self, batch: PolicyBatch) -> Tensor:
        return -torch.nn.functional.softplus(batch.logprobs - batch.old_logprobs) * batch.advantages


class TanhRatioConfig(BaseLossConfig):
    """``-A tanh(lp - old)``, a ``token_loss``."""

    @property
    def loss_ctx_cls(self) -> type[TanhRatioContext]:
        return TanhRatioContext


class TanhRatioContext(TokenMeanContext):
    """Each token's loss is its own: one pass."""

    loss_cfg: TanhRatioConfig
    token_local: ClassVar[bool] = True

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> Tensor:
        log_ratio = stats.logprobs - loss_kwargs.old_logprobs
        return -torch.tanh(log_ratio) * loss_kwargs.advantages * loss_kwargs.loss_weight
