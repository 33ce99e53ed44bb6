"""A loss that fails, or goes its own way, at a chosen step of its calibration."""

from __future__ import annotations

from typing import Annotated, Any

import torch
from torch import Tensor

from xloss import BaseLossConfig, BaseLossContext, BaseLossContextInputItem, BaseLossKwargs, PerBatch, distributed
from xloss.losses.ce import CELossConfig


class Item(BaseLossContextInputItem):
    steps: Annotated[Tensor | None, PerBatch()] = None  # of its calibration: 0 a sum over ranks, 1 a maximum
    raises_at: int | None = None
    rows: bool = True


class Kwargs(BaseLossKwargs):
    steps: Annotated[Tensor | None, PerBatch()] = None
    raises_at: int | None = None
    rows: bool = True


def item(labels: Tensor, steps: list[str], *, raises_at: int | None = None, rows: bool = True) -> Item:
    maxima = torch.tensor([s == "max" for s in steps])
    return Item(shifted_labels=labels, steps=maxima, raises_at=raises_at, rows=rows)


class Config(BaseLossConfig):
    @property
    def loss_ctx_cls(self) -> type[BaseLossContext[Any]]:
        return Context


class Context(BaseLossContext[Item]):
    loss_kwargs: Kwargs

    @classmethod
    def calibrate(cls, kwargs_list: list[Any], loss_cfg: Any, cu_seq_lens_list: Any, ranks: Any) -> None:
        steps = kwargs_list[0].steps.tolist()
        for i, maximum in enumerate([*steps, None]):
            if i == kwargs_list[0].raises_at:
                raise ValueError(f"step {i}")
            if maximum:
                distributed.all_reduce_max(1)
            elif maximum is not None:
                distributed.all_reduce_sum(torch.ones(1))

    def live_mask(self) -> Tensor:
        if not self.loss_kwargs.rows:
            raise ValueError("no rows")
        return super().live_mask()


def build_contexts(configs: list[CELossConfig], labels: Tensor, bounds: Tensor) -> None:
    """Contexts of these configs calibrated together."""
    contexts = [cfg.build({"shifted_labels": labels}) for cfg in configs]
    type(contexts[0]).build_batches(contexts, [bounds] * len(contexts))
