"""The contract between the chunk loops and whatever does the row work on a chunk of logits."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import torch
from torch import Tensor

from xloss.distributed.vocab import VocabPart
from xloss.head.options import HeadOptions
from xloss.head.teacher import TeacherRows
from xloss.stats import TokenStats

Adjoints = dict[str, Tensor]


TwinName = Literal["ce", "reinforce", "importance_sampling", "ppo", "cispo", "dro"]


@dataclass(frozen=True)
class RawRows:
    """A chunk as the GEMM left it: raw logits ``[C, V]``, bias ``[V]`` not yet added; labels ``[C]`` or ``[C, K]``.

    ``teacher``: a second distribution's part of the chunk, where the divergence from it is wanted. ``part``: other
    ranks hold the rest of the vocabulary. Labels are rows of this part then, V where another has the label.
    """

    logits: Tensor
    labels: Tensor
    temperature: float | Tensor
    bias: Tensor | None
    teacher: TeacherRows | None = None
    part: VocabPart | None = None

    def keep_rows_(self, index: Tensor) -> RawRows:
        """Rows ``index`` (ascending) of everything, moved to the front of the buffers in place."""
        t, teacher = self.temperature, self.teacher
        return replace(
            self,
            logits=_to_front_(self.logits, index),
            labels=self.labels[index],
            temperature=t.index_select(0, index) if isinstance(t, Tensor) else t,
            teacher=None if teacher is None else teacher.select(index, _to_front_(teacher.logits, index)),
        )


def _to_front_(buffer: Tensor, index: Tensor) -> Tensor:
    step = max(1, (4 << 20) // max(1, buffer.shape[1] * buffer.element_size()))
    for start in range(0, index.numel(), step):
        part = index[start : start + step]
        buffer[start : start + part.numel()] = buffer.index_select(0, part)
    return buffer[: index.numel()]


@dataclass(frozen=True)
class RowState:
    """A chunk between forward and backward. What its logits buffer holds now is the backend's business.

    Of a part of the vocabulary, ``forward`` gives that part's own statistics, and with ``top1`` its logit, ``peak``;
    ``backward`` reads those of the whole, and ``share [C]``, the part's share of the probability, if it is there.
    """

    rows: RawRows
    stats: TokenStats
    holds_probs: bool = False
    peak: Tensor | None = None
    share: Tensor | None = None

    def keep_rows_(self, index: Tensor) -> RowState:
        """Move rows ``index`` (ascending) to the front of the buffers, in place, and forget the others."""
        stats = self.stats.map(lambda x: x.index_select(0, index))
        return RowState(self.rows.keep_rows_(index), stats, self.holds_probs)


@dataclass(frozen=True)
class TokenRows:
    """A chunk before any product: hidden ``[C, H]`` and weight ``[V, H]`` as operands, and what ``RawRows`` has."""

    hidden: Tensor
    weight: Tensor
    labels: Tensor
    temperature: float | Tensor
    bias: Tensor | None
    part: VocabPart | None = None


@dataclass(frozen=True)
class LossTwin:
    """A token-local loss as a kernel knows it: its name, its numbers, and one value per token of each vector it reads.

    ``weight`` multiplies the main term, ``kl_weight`` the KL penalty, ``aux_weight`` the entropy bonus and the z-loss.
    """

    loss: TwinName
    numbers: dict[str, float | None] = field(default_factory=dict)
    kl: Literal["k1", "abs", "k2", "k3"] | None = None
    kl_grad: Literal["plain", "straight_through", "unbiased", "score_function"] = "plain"
    vectors: dict[str, Tensor | None] = field(default_factory=dict)

    def rows(self, start: int, stop: int) -> LossTwin:
        """The twin for tokens ``start:stop``."""
        return replace(self, vectors={k: None if v is None else v[start:stop] for k, v in self.vectors.items()})


class RowBackend(Protocol):
    """Row work on one chunk of logits. ``xloss.head.chunk`` (torch) and ``xloss.head.fused`` (Triton) are the two."""

    def forward(self, rows: RawRows, options: HeadOptions, *, for_backward: bool) -> RowState:
        """Statistics of the chunk (of some label where the label is ignored: the caller masks those)."""
        ...

    def resume(self, rows: RawRows, options: HeadOptions, stats: TokenStats) -> RowState:
        """State of a chunk whose logits were computed again and whose statistics are known."""
        ...

    def backward(self, state: RowState, adjoints: Adjoints, options: HeadOptions, operand: torch.dtype) -> Tensor:
        """Gradient of the raw logits ``[C, V]`` in the state's buffer; in dtype ``operand`` if that saves a pass."""
        ...

    def loss_rows(
        self, rows: RawRows, options: HeadOptions, twin: LossTwin, operand: torch.dtype
    ) -> tuple[TokenStats, Tensor, Tensor] | None:
        """Statistics, loss of each row ``[C]`` and gradient of the raw logits at once; ``None``: no such kernel."""
        ...

    def scale(self, grad: Tensor, upstream: Tensor, dtype: torch.dtype, *, in_place: bool) -> Tensor:
        """``grad * upstream`` in ``dtype``, without a host sync; may overwrite ``grad`` if ``in_place``."""
        ...


class HeadBackend(Protocol):
    """The head on a chunk of tokens without ever writing its logits. ``xloss.head.fused`` is the one that can."""

    def head_stats(self, rows: TokenRows, options: HeadOptions) -> tuple[TokenStats, Tensor | None]:
        """Statistics of the chunk, 0 where the label is ignored; of a part with ``top1``, its logit."""
        ...

    def strip_dlogits(
        self, rows: TokenRows, stats: TokenStats, adjoints: Adjoints, options: HeadOptions, strip: slice, out: Tensor
    ) -> Tensor:
        """Gradient of the raw logits of the vocabulary entries ``strip``, ``[C, S]``, written into ``out``."""
        ...
