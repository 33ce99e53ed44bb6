"""Pydantic bases: strict models that name a misspelt field, and batches whose tensors know how they pad and split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Any, Self

import torch
from pydantic import BaseModel, ConfigDict, PrivateAttr, model_validator
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from xloss import shapes
from xloss.distributed import Order
from xloss.distributed.agree import Terms, together
from xloss.errors import OptionError, ShapeError, unknown_name
from xloss.losses.split import Split, split_batch, split_of_parts


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
    _split: Split | None = PrivateAttr(default=None)

    @property
    def split(self) -> Split | None:
        """How this batch was split over sequence-parallel ranks, and the whole."""
        return self._split

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
        same = None if self._split is None else self._split.unchanged(self)
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.to(device))
        if self._split is not None:
            self._split.to(device)
            self._split.remember(self, same)
        return self

    def sp_split(self, sp_mesh: DeviceMesh, order: Order = "contiguous") -> Self:
        """Keep this rank's part of every per-token tensor, in place; pads to equal parts.

        The whole is remembered (but for fields that only the head reads), so calibration and losses of whole sequences
        see it. Give whole sequences, labels already shifted; a field set later is this rank's part.

        Args:
            sp_mesh: ranks that share the sequences.
            order: ``contiguous``; ``head_tail``: each rank a part from the front and its mirror image from the back,
                as torch's ``context_parallel`` has it.

        Raises:
            OptionError: the batch is split already.
        """
        self._check_unsplit()
        if sp_mesh.size() > 1:
            self._split = split_batch(self, sp_mesh, order)
        return self

    def sp_parts(self, sp_mesh: DeviceMesh, order: Order = "contiguous", length: int | None = None) -> Self:
        """Say that the per-token tensors are this rank's parts already, as ``sp_split`` makes them; gathers the whole.

        Args:
            sp_mesh, order: as in ``sp_split``; all its ranks call it.
            length: tokens of the whole without padding; default: there is none.

        Raises:
            ShapeError: parts of such a whole are of another size. OptionError: the batch is split already, or ranks do
                not have the same fields, shapes and arguments. RankError: another rank raised.
        """

        def terms() -> Terms:
            shapes = {f"the part of {name}": str(list(value.shape)) for name, (value, _) in self.per_token().items()}
            return Terms({"order": order, "length": str(length), **shapes})

        with together("joining parts of sequences", terms, sp_mesh):
            self._check_unsplit()
            self.check()
        if sp_mesh.size() > 1:
            self._split = split_of_parts(self, sp_mesh, order, length)
        return self

    def _check_unsplit(self) -> None:
        if self._split is not None:
            raise OptionError("the batch is split over sequence-parallel ranks already; split it once")
