"""What a call of the head is: how hidden states become logits, which rows matter, which statistics are wanted."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from xloss.distributed.vocab import VocabPart
from xloss.head.teacher import Teacher
from xloss.lora import LoraWeight
from xloss.stats import StatSpec


@dataclass(frozen=True)
class HeadOptions:
    """``z = softcap(logit_scale * (h W^T + b)) / temperature`` with ``softcap(x) = c tanh(x / c)``."""

    logit_scale: float = 1.0
    softcap: float | None = None
    ignore_index: int = -100
    stats: StatSpec = field(default_factory=StatSpec)


@dataclass(frozen=True)
class LiveRows:
    """Which of the ``total`` rows (tokens) matter, known on the host so that the step needs no sync.

    ``index`` lists live rows, those that can have a gradient first: ``index[:num_grad]`` go through everything,
    ``index[num_grad:num_live]`` only have their statistics computed, all others never reach the first GEMM.
    ``index=None`` means all rows in order. ``counted=False``: ignored rows may be among them, because looking would
    have made a CUDA stream wait.
    """

    total: int
    num_live: int
    num_grad: int
    index: Tensor | None = None
    counted: bool = True

    @classmethod
    def all(cls, total: int, *, counted: bool = True) -> LiveRows:
        """Every row is live and has a gradient."""
        return cls(total, total, total, None, counted)

    @classmethod
    def find(cls, live: Tensor, no_grad_rows: Tensor | None = None) -> LiveRows:
        """From masks ``[T]``. Counts rows, which waits for a CUDA device: call it where batches are built."""
        total = live.numel()
        if no_grad_rows is None:
            index = live.nonzero().squeeze(1)
            num_grad = index.numel()
        else:
            grad = (live & ~no_grad_rows).nonzero().squeeze(1)
            index = torch.cat([grad, (live & no_grad_rows).nonzero().squeeze(1)])
            num_grad = grad.numel()
        if num_grad == total:
            return cls.all(total)
        return cls(total, index.numel(), num_grad, index)

    def take(self, x: Tensor, start: int, stop: int) -> Tensor:
        """Rows ``start:stop`` of the live order of ``x [T, ...]``; a view where all rows are live."""
        return x[start:stop] if self.index is None else x.index_select(0, self.index[start:stop])

    def spread(self, values: Tensor, fill: float = 0) -> Tensor:
        """Values of the live rows ``[num_live, ...]`` put back at their places ``[T, ...]``, ``fill`` elsewhere."""
        if self.index is None:
            return values
        out = values.new_full((self.total, *values.shape[1:]), fill)
        return out.index_copy(0, self.index[: values.shape[0]], values)

    def to(self, device: torch.device | str) -> LiveRows:
        """The same rows with the index on ``device``."""
        index = None if self.index is None else self.index.to(device, non_blocking=True)
        return LiveRows(self.total, self.num_live, self.num_grad, index)


def rows_of(temperature: float | Tensor, rows: LiveRows, start: int, stop: int) -> float | Tensor:
    """The part of a scalar or per-token temperature that belongs to live rows ``start:stop``."""
    return rows.take(temperature, start, stop) if isinstance(temperature, Tensor) else temperature


class HeadTensors(NamedTuple):
    """What autograd tracks: ``[T, H]``, ``[V, H]``, ``[V]``; of adapters ``[T, r]`` (0 at dead rows) and ``[V, r]``."""

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    low_hidden: Tensor | None
    low_weight: Tensor | None


@dataclass(frozen=True)
class HeadInputs:
    """Checked, flattened inputs: ``hidden [T, H]``, labels ``[T]`` or ``[T, K]``; ``lead`` is the shape to return.

    ``teacher``: the second distribution, where the divergence from it is one of the statistics. ``part``: the weight
    ``[V_r, H]`` is a part of the vocabulary; ``group``: the ranks that must have the same tokens; ``gathered``: the
    hidden states are a copy put together from theirs. ``lora``: the head with its adapters, where it has any;
    ``weight`` is the one under them.
    """

    hidden: Tensor
    weight: Tensor
    bias: Tensor | None
    labels: Tensor
    temperature: float | Tensor
    lead: torch.Size
    operand_dtype: torch.dtype
    teacher: Teacher | None = None
    part: VocabPart | None = None
    group: dist.ProcessGroup | None = None
    gathered: bool = False
    lora: LoraWeight | None = None

    @property
    def vocab_size(self) -> int:
        """Rows of the whole head: what labels count."""
        return self.weight.shape[0] if self.part is None else self.part.vocab_size

    def tensors(self, rows: LiveRows, ignore_index: int) -> HeadTensors:
        """For the chunk loops. Adapters see live rows alone: what stands at others must not matter, be it NaN."""
        if self.lora is None:
            return HeadTensors(self.hidden, self.weight, self.bias, None, None)
        live = rows.take(self.hidden, 0, rows.num_live)
        if not rows.counted:
            ignored = self.labels == ignore_index
            live = live.masked_fill((ignored if ignored.ndim == 1 else ignored.all(1)).unsqueeze(1), 0)
        return HeadTensors(self.hidden, self.weight, self.bias, rows.spread(self.lora.down(live)), self.lora.up())

    @property
    def tracked(self) -> bool:
        """Whether autograd wants gradients of this call."""
        tensors = (self.hidden, self.weight, self.bias, *(self.lora.tensors() if self.lora else ()))
        return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
