"""What a distillation is given for one micro-batch, and what calibration makes of it."""

from __future__ import annotations

from typing import Annotated

from torch import Tensor

from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs, PerToken


class DistillLossContextInputItem(BaseLossContextInputItem):
    """Labels and a teacher's view of one micro-batch. ``temperature`` is that of the divergence here.

    Args:
        token_weight: free weight of each token, multiplied into ``loss_reduction``'s and counted in the denominator.
        teacher_hidden_states: ``[.., H2]``; its head is given to ``forward``.
        teacher_logits: ``[.., V]``, after the teacher's own scale and cap, any float dtype.
        teacher_topk_ids: ``[.., K]``, int; ``ignore_idx`` where a token has fewer.
        teacher_topk_logprobs: ``[.., K]``; with ``topk_mode="renormalized"`` logits do as well.
    """

    token_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    teacher_hidden_states: Annotated[Tensor | None, PerToken(pad=0.0, trailing=True, head_only=True)] = None
    teacher_logits: Annotated[Tensor | None, PerToken(pad=0.0, trailing=True, head_only=True)] = None
    teacher_topk_ids: Annotated[Tensor | None, PerToken(pad=-100, trailing=True)] = None
    teacher_topk_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, trailing=True)] = None


class DistillLossKwargs(BaseLossKwargs):
    """Args: the item's. loss_weight: calibrated weight, the denominator included."""

    token_weight: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    teacher_hidden_states: Annotated[Tensor | None, PerToken(pad=0.0, trailing=True, head_only=True)] = None
    teacher_logits: Annotated[Tensor | None, PerToken(pad=0.0, trailing=True, head_only=True)] = None
    teacher_topk_ids: Annotated[Tensor | None, PerToken(pad=-100, trailing=True)] = None
    teacher_topk_logprobs: Annotated[Tensor | None, PerToken(pad=0.0, trailing=True)] = None
    loss_weight: Annotated[Tensor | None, PerToken(pad=0.0, weight=True)] = None
