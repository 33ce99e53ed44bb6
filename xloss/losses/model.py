"""What a loss is given for one micro-batch: input items, and calibrated kwargs that can be cut, joined and moved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from pydantic import PrivateAttr
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss.distributed import Order
from xloss.errors import MissingFieldError, OptionError, ShapeError
from xloss.head.options import LiveRows
from xloss.losses.split import Split, joined_split
from xloss.losses.token_batch import PerBatch, PerToken, StrictModel, TokenBatch
from xloss.metrics import Metric, merge_metrics
from xloss.packing import check_cu_seq_lens

__all__ = [
    "BaseLossContextInputItem",
    "BaseLossKwargs",
    "PerBatch",
    "PerToken",
    "StrictModel",
    "TokenBatch",
    "require",
]


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens ``start:stop`` of a batch of ``length`` that ``chunk`` cut; ``whole`` is the same in all its pieces."""

    whole: BaseLossKwargs
    start: int
    stop: int
    length: int


class BaseLossContextInputItem(TokenBatch):
    """What a user hands in for one micro-batch, before calibration."""


class BaseLossKwargs(TokenBatch):
    """Everything the loss of one micro-batch needs, calibrated: ready for ``Context.forward``.

    Args:
        cu_seq_lens: ``[N + 1]`` bounds of the sequences packed in ``shifted_labels``, or ``None``.
    """

    cu_seq_lens: Annotated[Tensor | None, PerBatch()] = None
    _rows: tuple[object, list[tuple[Tensor, int]], LiveRows] | None = PrivateAttr(default=None)
    _cut: bool = PrivateAttr(default=False)
    _torn: bool = PrivateAttr(default=False)
    _piece: Piece | None = PrivateAttr(default=None)
    _metrics: dict[str, Metric] = PrivateAttr(default_factory=dict)

    @property
    def cut(self) -> bool:
        """Whether this is a piece made by ``chunk``, in which sequences may stand in part."""
        return self._cut

    @property
    def torn(self) -> bool:
        """Whether this was cut from a part of a split batch, so that its whole is lost."""
        return self._torn

    @property
    def built_metrics(self) -> dict[str, Metric]:
        """Figures found where the batch was built; they join those of its forward."""
        return self._metrics

    def keep_metrics(self, metrics: dict[str, Metric]) -> None:
        """Report these with this batch."""
        self._metrics = metrics

    def remember_rows(self, rows: LiveRows, config: object) -> None:
        """Keep live rows counted for these tensors and ``config``; a tensor replaced or written to ends that."""
        tensors = [value for value, _ in self.per_token().values()]
        if not any(t.is_inference() for t in tensors):  # those have no version counter to notice a write by
            self._rows = (config, [(t, t._version) for t in tensors], rows)

    def known_rows(self, config: object) -> LiveRows | None:
        """Live rows counted before under an equal ``config``, if they still hold."""
        if self._rows is None or self._rows[0] != config:
            return None
        now = [value for value, _ in self.per_token().values()]
        _, then, rows = self._rows
        same = len(now) == len(then) and all(a is b and a._version == v for a, (b, v) in zip(now, then, strict=True))
        return rows if same else None

    def to(self, device: torch.device | str) -> Self:
        config = None if self._rows is None else self._rows[0]
        rows = self.known_rows(config)
        super().to(device)
        self._metrics = {name: metric.to(device) for name, metric in self._metrics.items()}
        if rows is not None:
            self.remember_rows(rows.to(device), config)
        return self

    @property
    def whole(self) -> Self:
        """All tokens of a batch split over sequence-parallel ranks; without a split, the batch."""
        if self._split is None:
            return self
        assert isinstance(self._split.whole, type(self))
        return self._split.whole

    def join_split(self, split: Split) -> None:
        """Be this rank's part of ``split``."""
        self._split = split
        self.cu_seq_lens = None  # bounds of the whole pack do not describe a part of it
        split.remember(self)

    def take_calibrated(self) -> None:
        """Take this rank's part of what calibration made of the whole; one rank reports its metrics."""
        if self._split is not None:
            self._split.fill(self)
            found = self.whole.built_metrics
            self.keep_metrics(found if self._split.first else {name: m.empty() for name, m in found.items()})

    def sp_split(self, sp_mesh: DeviceMesh, order: Order = "contiguous") -> Self:
        super().sp_split(sp_mesh, order)
        if self._split is not None:
            self.join_split(self._split)
        return self

    def sp_parts(self, sp_mesh: DeviceMesh, order: Order = "contiguous", length: int | None = None) -> Self:
        super().sp_parts(sp_mesh, order, length)
        if self._split is not None:
            self.join_split(self._split)
        return self

    def check(self) -> None:
        super().check()
        labels = self.shifted_labels
        if self.cu_seq_lens is not None:
            if labels.ndim == 2 and labels.shape[0] != 1:
                raise ShapeError(
                    "cu_seq_lens describes one packed row: shifted_labels must be [T] or [1, T]; "
                    f"got {tuple(labels.shape)}"
                )
            if not self.cu_seq_lens.is_cuda:
                check_cu_seq_lens(self.cu_seq_lens, labels.numel())

    def chunk(self, chunk_size: int) -> list[Self]:
        """Pieces of at most ``chunk_size`` tokens along the last token axis; ``cu_seq_lens`` is clipped to each."""
        if chunk_size <= 0:
            raise OptionError(f"chunk_size must be positive; got {chunk_size}")
        length = self.shifted_labels.shape[-1]
        pieces = []
        for start in range(0, max(length, 1), chunk_size):
            stop = min(start + chunk_size, length)
            piece = self.map_tokens(lambda x, _, a=start, n=stop - start: x.narrow(self.token_axis, a, n))  # type: ignore[misc]
            if self.cu_seq_lens is not None:
                piece.cu_seq_lens = (self.cu_seq_lens - start).clamp(0, stop - start)
            piece._torn = self._torn or self._split is not None
            piece._cut = self._cut or piece._torn or stop - start < length
            piece._piece = Piece(self, start, stop, length)
            pieces.append(piece)
        pieces[0].keep_metrics(self._metrics)
        return pieces

    @classmethod
    def cat(cls, chunks: Sequence[Self]) -> Self:
        """Pieces joined along the last token axis. A field must be present in all or in none of them.

        All pieces of a batch, in order, make sequences that ``chunk`` cut whole again; some of them stay ``cut``.
        """
        if not chunks:
            raise OptionError("chunks must not be empty")
        first, joined = chunks[0], dict[str, Any]()
        for name in dict.fromkeys(n for c in chunks for n in c.per_token()):
            parts = [getattr(c, name) for c in chunks]
            if any(p is None for p in parts):
                raise MissingFieldError(f"{name} is None in some of the chunks to cat and a tensor in others")
            joined[name] = torch.cat(parts, dim=first.token_axis)
        if any(c.cu_seq_lens is not None for c in chunks):
            bounds: list[Tensor] = []
            offset = 0
            for c in chunks:
                if c.cu_seq_lens is None:
                    raise MissingFieldError("cu_seq_lens is None in some of the chunks to cat and a tensor in others")
                bounds.append(c.cu_seq_lens[1 if bounds else 0 :] + offset)
                offset += c.shifted_labels.shape[-1]
            joined["cu_seq_lens"] = torch.cat(bounds)
        whole = first.replaced(joined)
        origin = _all_pieces_of([c._piece for c in chunks])
        whole._cut = any(c.cut for c in chunks) if origin is None else origin.cut
        whole._torn = any(c.torn for c in chunks) if origin is None else origin.torn
        if origin is not None and origin.split is not None:
            whole._split = origin.split.of(origin.whole)  # has yet to see these tensors, which may have changed
        if origin is not None and origin.cu_seq_lens is not None:
            whole.cu_seq_lens = origin.cu_seq_lens.to(whole.shifted_labels.device)
        whole.keep_metrics(merge_metrics([c.built_metrics for c in chunks]))
        splits = [c.split for c in chunks if c.split is not None]
        if splits:
            if len(splits) < len(chunks):
                raise OptionError("some of the chunks to cat are split over sequence-parallel ranks and others are not")
            split = joined_split(cls.cat([c.whole for c in chunks]), splits)
            whole.join_split(split)
            split.fill(whole)
        return whole

    def flat(self, dtype: torch.dtype) -> Self:
        """A copy with per-token tensors as ``[T]`` (or ``[T, K]``), floats in ``dtype``, detached."""

        def flatten(x: Tensor, mark: PerToken) -> Tensor:
            x = x.detach().flatten(0, self.token_axis)
            return x.to(dtype) if x.dtype.is_floating_point else x

        not_read = {name: None for name, (_, mark) in self.per_token().items() if mark.head_only}
        return self.replaced(not_read).map_tokens(flatten)


def _all_pieces_of(parts: Sequence[Piece | None]) -> BaseLossKwargs | None:
    """The batch that these are all pieces of, in order; ``None`` where they are not."""
    found = [part for part in parts if part is not None]
    if len(found) < len(parts) or any(part.whole is not found[0].whole for part in found):
        return None
    ends = [0, *(part.stop for part in found)]
    return found[0].whole if [part.start for part in found] == ends[:-1] and ends[-1] == found[0].length else None


def require(loss_kwargs: BaseLossKwargs, name: str, remedy: str) -> Tensor:
    """Field ``name`` of the kwargs, or a ``MissingFieldError`` that says what to do."""
    value = getattr(loss_kwargs, name)
    if value is None:
        raise MissingFieldError(f"{name} is None in {type(loss_kwargs).__name__}; {remedy}")
    assert isinstance(value, Tensor)
    return value
