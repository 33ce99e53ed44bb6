"""Labels as Transformers gives them, at their own tokens, made into a cross-entropy context."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from xloss.errors import ShapeError
from xloss.losses.ce import CELossConfig, CELossContext, CELossKwargs
from xloss.packing import shift_labels as shift


def shifted_labels(labels: Tensor, inputs: dict[str, Any], ignore_idx: int = -100) -> Tensor:
    """``labels [B, S]`` moved one place to the left inside each sequence, ``ignore_idx`` at its last token.

    A row holds several sequences where ``cu_seq_lens_q`` says so or, as in Transformers' own masks, where
    ``position_ids`` do not rise by 1 and there is no ``attention_mask``.
    """
    starts = torch.zeros_like(labels, dtype=torch.bool)
    bounds, positions = inputs.get("cu_seq_lens_q"), inputs.get("position_ids")
    if bounds is not None:
        if labels.shape[0] != 1:
            raise ShapeError(f"cu_seq_lens_q describes one packed row; labels are {tuple(labels.shape)}")
        inner = bounds[:-1].to(device=labels.device, dtype=torch.int64)
        starts.view(-1)[inner.clamp(max=max(labels.shape[1] - 1, 0))] = True
    elif positions is not None and inputs.get("attention_mask") is None and positions.shape == labels.shape:
        starts[:, 1:] = positions.diff(dim=-1) != 1
    return shift(labels.masked_fill(starts, ignore_idx), ignore_idx=ignore_idx)


def label_context(cfg: CELossConfig, labels: Tensor | None, inputs: dict[str, Any]) -> CELossContext:
    """Cross-entropy of a micro-batch as Transformers reduces it: ``sum / num_items_in_batch``, or the local mean.

    ``shift_labels`` of ``inputs`` are taken as they are, in the place of ``labels``.
    """
    given = inputs.get("shift_labels")
    if given is None:
        assert labels is not None
        given = shifted_labels(labels, inputs, cfg.ignore_idx)
    valid = given != cfg.ignore_idx
    items = inputs.get("num_items_in_batch")
    total = valid.sum().clamp(min=1) if items is None else torch.as_tensor(items, device=valid.device)
    return CELossContext(cfg, CELossKwargs(shifted_labels=given, loss_weight=valid / total))
