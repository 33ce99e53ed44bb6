"""Pydantic bases: strict models that name a misspelt field, and batches whose tensors know how they pad and split."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss import distributed, shapes
from xloss.errors import MissingFieldError, OptionError, ShapeError, unknown_name
from xloss.head.options import LiveRows
from xloss.metrics import Metric, merge_metrics
from xloss.packing import check_cu_seq_lens


class StrictModel(BaseModel):
    """A model that refuses unknown fields and suggests the one that was probably meant."""

    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True)

    @model_validator(mode="before")
    @classmethod
    def _name_unknown_fields(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    raise ValueError(unknown_name(f"field of {cls.__name__}", str(key), list(cls.model_fields)))
        return data


@dataclass(frozen=True, eq=False)  # typing caches Annotated by equality, and 0 == 0.0
class PerToken:
    """Marks a tensor field with one value per token, shaped like ``shifted_labels``.

    ``pad`` fills positions added when a sequence is split over ranks; a float one asks for a floating dtype.
    ``weight=True``: the loss of a token is multiplied by this, so tokens for which every such field is 0 are left out
    of the head altogether. ``trailing=True``: one more axis follows the token axes (``[.., T, K]``).
    ``head_only=True``: the head reads it where it stands, however large; ``token_loss`` finds ``None``.
    """

    pad: float = 0.0
    weight: bool = False
    trailing: bool = False
    head_only: bool = False


@dataclass(frozen=True)
class PerBatch:
    """Marks a tensor field that is not per token, whatever its shape."""


@dataclass(frozen=True, eq=False)
class Piece:
    """Tokens ``start:stop`` of a batch of ``length`` that ``chunk`` cut; ``whole`` is the same in all its pieces."""

    whole: BaseLossKwargs
    start: int
    stop: int
    length: int


class TokenBatch(StrictModel):
    """Tensors of one micro-batch. ``to``, ``chunk``, ``cat``, ``sp_split`` follow from the fields' ``PerToken`` marks.

    A tensor field without a ``PerToken`` or ``PerBatch`` mark that has the shape of ``shifted_labels`` counts as
    ``PerToken(pad=0)``; anything else is not per token.

    Args:
        shifted_labels: ``[T]``, ``[1, T]`` packed or ``[B, S]`` padded, int; at t stands the token predicted there.
        temperature: one per token, positive at those with a label, or ``None``.
    """

    shifted_labels: Annotated[Tensor, PerToken(pad=-100)]
    temperature: Annotated[Tensor | None, PerToken(pad=1.0)] = None

    def per_token(self) -> dict[str, tuple[Tensor, PerToken]]:
        """The per-token tensors present, with their marks."""
        found = {}
        for name, info in type(self).model_fields.items():
            value = getattr(self, name)
            if not isinstance(value, Tensor):
                continue
            mark = next((m for m in info.metadata if isinstance(m, PerToken | PerBatch)), None)
            if mark is None and value.shape == self.shifted_labels.shape and value.ndim > 0:
                mark = PerToken(pad=0)
            if isinstance(mark, PerToken):
                found[name] = (value, mark)
        return found

    def check(self) -> None:
        """Raise unless every marked tensor has the shape and device of ``shifted_labels``."""
        labels = self.shifted_labels
        if labels.ndim not in (1, 2):
            raise ShapeError(f"shifted_labels must be [T], [1, T] or [B, S]; got {tuple(labels.shape)}")
        for name, (value, mark) in self.per_token().items():
            floating = isinstance(mark.pad, float)
            shapes.check_per_token(name, value, labels, floating=floating, trailing=mark.trailing)

    @property
    def token_axis(self) -> int:
        """The axis of tokens in a sequence, of every per-token tensor."""
        return self.shifted_labels.ndim - 1

    def replaced(self, values: dict[str, Any]) -> Self:
        """A copy with some fields replaced, unchecked."""
        fields = {name: getattr(self, name) for name in type(self).model_fields}
        return type(self).model_construct(**(fields | values))

    def map_tokens(self, fn: Callable[[Tensor, PerToken], Tensor]) -> Self:
        """A copy with ``fn`` applied to every per-token tensor."""
        return self.replaced({name: fn(value, mark) for name, (value, mark) in self.per_token().items()})

    def to(self, device: torch.device | str) -> Self:
        """Move every tensor to ``device``, in place."""
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        return self

    def sp_split(self, sp_mesh: DeviceMesh) -> Self:
        """Keep this rank's part of every per-token tensor, in place; pads to equal parts."""
        if sp_mesh.size() > 1:
            for name, (value, mark) in self.per_token().items():
                setattr(self, name, distributed.sp_split(value, sp_mesh, mark.pad, axis=self.token_axis))
        return self


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
    _piece: Piece | None = PrivateAttr(default=None)
    _metrics: dict[str, Metric] = PrivateAttr(default_factory=dict)

    @property
    def cut(self) -> bool:
        """Whether this is a piece made by ``chunk``, in which sequences may stand in part."""
        return self._cut

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

    def sp_split(self, sp_mesh: DeviceMesh) -> Self:
        if sp_mesh.size() > 1:
            self.cu_seq_lens = None  # bounds of the whole pack do not describe a part of it
            self._cut = True
        return super().sp_split(sp_mesh)

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
            piece._cut = self._cut or stop - start < length
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
        first, joined = chunks[0], {}
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
        if origin is not None and origin.cu_seq_lens is not None:
            whole.cu_seq_lens = origin.cu_seq_lens.to(whole.shifted_labels.device)
        whole.keep_metrics(merge_metrics([c.built_metrics for c in chunks]))
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
