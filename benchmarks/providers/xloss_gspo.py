"""A loss that couples tokens, as a user would write it: the clipped ratio of sequences (GSPO, arXiv 2507.18071)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import torch
from torch import Tensor

from xloss import BaseLossConfig, BaseLossContext, BaseLossContextInputItem, BaseLossKwargs, PerToken, TokenStats
from xloss.packing import broadcast_segments, segment_sum


class SequenceRatioConfig(BaseLossConfig):
    """``r_i = exp(mean over sequence i of (lp - old))``; token mean of ``-min(r A, clip(r, 1 -+ clip) A)``."""

    clip: float

    @property
    def loss_ctx_cls(self) -> type[SequenceRatioContext]:
        return SequenceRatioContext


class SequenceRatioItem(BaseLossContextInputItem):
    """Per-token advantages and old log-probs."""

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor, PerToken(pad=0.0)]


class SequenceRatioKwargs(BaseLossKwargs):
    """The item's tensors and ``loss_weight = 1 / N`` at tokens that count."""

    advantages: Annotated[Tensor, PerToken(pad=0.0)]
    old_logprobs: Annotated[Tensor, PerToken(pad=0.0)]
    loss_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None


class TokenMeanContext(BaseLossContext[SequenceRatioItem]):
    """Weights of a mean over the tokens that count."""

    loss_kwargs: SequenceRatioKwargs

    @classmethod
    def calibrate(
        cls,
        kwargs_list: list[Any],
        loss_cfg: Any,
        cu_seq_lens_list: Sequence[Tensor] | None,
        ranks: Any,
    ) -> None:
        assert cu_seq_lens_list is not None
        for kwargs, bounds in zip(kwargs_list, cu_seq_lens_list, strict=True):
            valid = (kwargs.shifted_labels != loss_cfg.ignore_idx).float()
            kwargs.loss_weight, kwargs.cu_seq_lens = valid / valid.sum(), bounds


class SequenceRatioContext(TokenMeanContext):
    """The loss on the whole ``[T]`` vectors."""

    loss_cfg: SequenceRatioConfig

    def token_loss(self, stats: TokenStats, loss_kwargs: Any) -> Tensor:
        kw, clip = loss_kwargs, self.loss_cfg.clip
        counts = (kw.loss_weight > 0).to(stats.lse.dtype)
        total = segment_sum((stats.logprobs - kw.old_logprobs) * counts, kw.cu_seq_lens)
        mean = total / segment_sum(counts, kw.cu_seq_lens).clamp(min=1)
        ratio = broadcast_segments(mean.exp(), kw.cu_seq_lens, counts.numel())
        surrogate: Tensor = torch.minimum(ratio * kw.advantages, ratio.clamp(1 - clip, 1 + clip) * kw.advantages)
        return -surrogate * kw.loss_weight
