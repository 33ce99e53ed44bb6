"""Sequences of different lengths, one after another in one row without padding, and results taken apart again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from xloss.errors import DtypeError, MissingFieldError, OptionError, ShapeError
from xloss.tinker.types import tensor_of, tokens_of

IGNORE = -100


@dataclass(frozen=True)
class Row:
    """One sequence as tensors. ``inputs``: without ``target_tokens``."""

    tokens: Tensor
    targets: Tensor
    inputs: dict[str, Tensor]


def read_datum(datum: Any, index: int) -> Row:
    """A datum as tensors; targets ``[N]`` or ``[N, K]``. Raises where one has another length than the tokens."""
    at = f"data[{index}]"
    if not hasattr(datum, "model_input") or not hasattr(datum, "loss_fn_inputs"):
        raise OptionError(f"{at} must be a Datum, with model_input and loss_fn_inputs; got {type(datum).__name__}")
    tokens = tokens_of(datum.model_input)
    inputs = {name: tensor_of(f"{at} {name}", value) for name, value in datum.loss_fn_inputs.items()}
    if "target_tokens" not in inputs:
        raise MissingFieldError(f"{at} has no target_tokens; got {', '.join(sorted(inputs)) or 'no inputs'}")
    targets = inputs.pop("target_tokens")
    if targets.ndim not in (1, 2) or targets.shape[0] != tokens.shape[0]:
        raise ShapeError(
            f"{at} target_tokens must be [N] or [N, K] with N = {tokens.shape[0]}, one row for each token of "
            f"model_input; got {tuple(targets.shape)}"
        )
    if targets.dtype.is_floating_point:
        raise DtypeError(f"{at} target_tokens must be integer; got {targets.dtype}")
    return Row(tokens, targets, inputs)


@dataclass(frozen=True)
class Pack:
    """Several sequences as the model takes them.

    Args:
        tokens: ``[1, T]``. position_ids: ``[1, T]``, from 0 in each sequence. cu_seq_lens: ``[N + 1]``.
        targets: ``[1, T]``, or ``[1, T, K]`` where a sequence has several a token; ``IGNORE`` fills up to K.
        rows: the sequences as they were read.
    """

    tokens: Tensor
    position_ids: Tensor
    cu_seq_lens: Tensor
    targets: Tensor
    rows: list[Row]

    @classmethod
    def of(cls, sequences: Sequence[Row], device: torch.device) -> Pack:
        """These sequences in this order."""
        lengths = [s.tokens.shape[0] for s in sequences]
        bounds = torch.tensor([0, *lengths]).cumsum(0)
        position_ids = torch.cat([torch.arange(n) for n in lengths])
        targets = widened([s.targets for s in sequences], IGNORE)
        tokens = torch.cat([s.tokens for s in sequences])
        return cls(
            tokens[None].to(device),
            position_ids[None].to(device),
            bounds.to(device),
            targets[None].to(device),
            list(sequences),
        )

    @property
    def lengths(self) -> list[int]:
        """Tokens of each sequence."""
        return [s.tokens.shape[0] for s in self.rows]

    def apart(self, values: Tensor) -> list[Tensor]:
        """``[1, T]`` or ``[1, T, K]`` by sequence, each in the shape of its own targets."""
        parts = values[0].split(self.lengths)
        return [_like(part, s.targets) for part, s in zip(parts, self.rows, strict=True)]

    def together(self, parts: Sequence[Tensor]) -> Tensor:
        """What ``apart`` took apart: values of each sequence as one ``[1, T]`` or ``[1, T, K]``, 0 where it filled."""
        if self.targets.ndim == 3:
            parts = [part if part.ndim == 2 else part[:, None] for part in parts]
            parts = [_wide(part, self.targets.shape[2], 0.0) for part in parts]
        return torch.cat(list(parts))[None]


def _like(part: Tensor, targets: Tensor) -> Tensor:
    if part.ndim == 1 or targets.ndim == 2:
        return part if part.ndim == 1 else part[:, : targets.shape[1]]
    return part[:, 0]


def widened(parts: Sequence[Tensor], fill: float) -> Tensor:
    """``[N]`` and ``[N, K]`` joined along N: ``[T]`` where all are ``[N]``, else ``[T, K]`` filled up with ``fill``."""
    if all(part.ndim == 1 for part in parts):
        return torch.cat(list(parts))
    rows = [part if part.ndim == 2 else part[:, None] for part in parts]
    width = max(part.shape[1] for part in rows)
    return torch.cat([_wide(part, width, fill) for part in rows])


def _wide(part: Tensor, width: int, fill: float) -> Tensor:
    return torch.nn.functional.pad(part, (0, width - part.shape[1]), value=fill)


def packs_of(data: Sequence[Any], max_pack_tokens: int | None, device: torch.device) -> list[Pack]:
    """Data as packs, in order, each of at most ``max_pack_tokens`` (one longer sequence is a pack of its own).

    Raises ``OptionError`` where there is no data.
    """
    if isinstance(data, str | bytes) or not isinstance(data, Sequence):
        raise OptionError(f"data must be a list of Datum; got {type(data).__name__}")
    if not data:
        raise OptionError("data is empty; give at least one Datum")
    packs: list[list[Row]] = [[]]
    size = 0
    for index, datum in enumerate(data):
        sequence = read_datum(datum, index)
        length = sequence.tokens.shape[0]
        if packs[-1] and max_pack_tokens is not None and size + length > max_pack_tokens:
            packs.append([])
            size = 0
        packs[-1].append(sequence)
        size += length
    return [Pack.of(sequences, device) for sequences in packs]
