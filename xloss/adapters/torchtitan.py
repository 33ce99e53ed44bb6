"""torchtitan: a loss component that takes hidden states and the ``lm_head``, in the place of ``ChunkedLossWrapper``.

torchtitan hands hidden states to subclasses of ``ChunkedLossWrapper`` only, divides by the valid tokens of the global
batch (``global_valid_tokens``), and tells from the end of a metric's key how ranks and micro-batches add it up.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torchtitan.components.loss import ChunkedLossWrapper

from xloss.adapters.given import checked, local_context, reduced_by
from xloss.distributed import alone
from xloss.errors import MissingFieldError, OptionError, UnsupportedError, unknown_name
from xloss.losses.base import BaseLossContext
from xloss.losses.ce import CELossConfig
from xloss.losses.config import BaseLossConfig
from xloss.metrics import Metric

_ALIASES = {"generator_logprobs": "rollout_logprobs"}


class XlossLoss(ChunkedLossWrapper):  # type: ignore[misc]
    """A loss config of xloss as torchtitan's loss: ``loss=XlossLoss.Config(loss_cfg=CELossConfig())``.

    The loss is ``sum_t loss_t / global_valid_tokens``; nothing is exchanged between ranks. It runs inside the call of
    ``lm_head``, where FSDP has its weight whole and takes its gradient.
    """

    @dataclass(kw_only=True, slots=True)
    class Config(ChunkedLossWrapper.Config):  # type: ignore[misc]
        loss_cfg: BaseLossConfig = field(default_factory=CELossConfig)
        """A loss of ``loss_reduction="token"``. Its ``mode``, ``chunk_size`` and ``plan`` say how the head
        runs; ``num_chunks`` and ``loss_fn`` of ``ChunkedLossWrapper`` must stay as they are."""

    def __init__(self, config: Any, *, compile_config: Any = None) -> None:
        """Raises ``OptionError`` or ``UnsupportedError`` where the config cannot be honoured."""
        default = ChunkedLossWrapper.Config()
        for name, where in (("num_chunks", "chunk_size"), ("loss_fn", "the config itself")):
            if getattr(config, name) != getattr(default, name):
                raise OptionError(
                    f"{name}={getattr(config, name)!r} is of torchtitan's chunks; use {where} of loss_cfg"
                )
        self.loss_cfg = reduced_by(checked(config.loss_cfg, "torchtitan", head=False), "token", run_as="sum")
        self.lm_head: nn.Module | None = None

    def __call__(
        self, pred: Tensor, labels: Tensor, global_valid_tokens: Tensor | float | None = None, **loss_inputs: Any
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Loss and metrics of one micro-batch.

        Args:
            pred: hidden states ``[B, L, D]``.
            labels: ``[B, L]``, already shifted, -100 where there is none.
            global_valid_tokens: what to divide by; ``None``: 1.
            loss_inputs: ``positions``, which start at 0 in each packed sequence; ``loss_mask``; and fields of the
                config's kwargs ``[B, L]``, ``generator_logprobs`` standing for ``rollout_logprobs``.

        Raises:
            MissingFieldError: no ``lm_head`` yet, or the loss needs a field. OptionError: it knows no such field.
            UnsupportedError: a tensor-parallel head beside plain hidden states.
        """
        if self.lm_head is None:
            raise MissingFieldError("set_lm_head(lm_head) must come before the first loss")
        ctx = self._context(labels, loss_inputs)

        head: Any = self.lm_head

        def inside(hidden_states: Tensor) -> Tensor:
            weight, bias = head.weight, getattr(head, "bias", None)
            if isinstance(weight, DTensor) and not isinstance(hidden_states, DTensor):
                raise UnsupportedError(
                    "the lm_head is tensor-parallel and its hidden states are plain tensors, whose gradient torchtitan "
                    "would sum over ranks once more; use spmd_backend='partial_dtensor'"
                )
            loss, self._info = ctx.forward(hidden_states.flatten(0, 1), weight, bias)
            return loss

        with _forward_of(head, inside):
            loss: Tensor = head(pred)
        total = 1 if global_valid_tokens is None else global_valid_tokens
        return loss / total, _metrics(self._info.metrics, ctx.live_rows().num_live, total)

    def _context(self, labels: Tensor, loss_inputs: dict[str, Any]) -> BaseLossContext[Any]:
        inputs = {_ALIASES.get(name, name): value for name, value in loss_inputs.items()}
        positions, mask = inputs.pop("positions", None), inputs.pop("loss_mask", None)
        known = set(self.loss_cfg.loss_kwargs_cls.model_fields)
        for name in inputs.keys() - known:
            raise OptionError(unknown_name(f"loss input of {type(self.loss_cfg).__name__}", name, sorted(known)))
        labels = labels if mask is None else labels.masked_fill(mask == 0, self.loss_cfg.ignore_idx)
        fields = {"shifted_labels": labels, **inputs}
        flat = {name: None if value is None else value.flatten() for name, value in fields.items()}
        with alone():
            return local_context(self.loss_cfg, flat, _bounds(labels, positions))


def _bounds(labels: Tensor, positions: Tensor | None) -> Tensor:
    """``cu_seq_lens`` of the flattened rows: a sequence starts with each row, and wherever ``positions`` is 0."""
    starts = torch.zeros_like(labels, dtype=torch.bool) if positions is None else positions == 0
    starts[:, 0] = True
    ends = starts.new_tensor([labels.numel()], dtype=torch.int64)
    return torch.cat([starts.flatten().nonzero().squeeze(1), ends])


def _metrics(metrics: dict[str, Metric], num_tokens: int, total: Any) -> dict[str, Tensor]:
    """Figures whose keys say how they add up: means and fractions come weighed by this micro-batch's tokens."""
    found = {}
    for name, metric in metrics.items():
        value = metric.result()
        if metric.reducer in ("max", "min"):
            found[f"{name}/{metric.reducer}"] = value
        elif metric.reducer != "sum":
            found[f"{name.removesuffix('_frac')}/frac" if name.endswith("_frac") else f"{name}/mean"] = (
                value * num_tokens / total
            )
        elif name.endswith("_loss"):
            found[f"{name}/mean"] = value / total
    return found


@contextmanager
def _forward_of(module: nn.Module, forward: Any) -> Iterator[None]:
    """``module`` computes ``forward`` when it is called, between its own hooks."""
    own = vars(module).get("forward")  # torchtitan puts one there when it parallelises
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own
