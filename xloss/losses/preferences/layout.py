"""Which sequences of a micro-batch are compared, found where the batch is built."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from xloss.errors import MissingFieldError, OptionError, ShapeError
from xloss.packing import Segments

Layout = Literal["alternating", "halves"]
Sides = tuple[Tensor, Tensor]
"""Numbers of the chosen (desirable) and of the rejected sequences, int64. Of pairs: as many, in the same order."""


def find_pairs(
    sequences: Segments, pair_ids: Tensor | None, preferred: Tensor | None, layout: Layout, keep_empty: bool
) -> Sides:
    """Pairs by ``pair_ids`` and ``preferred`` ``[N]``, or without them by ``layout``.

    Unless ``keep_empty``, a pair with a sequence that has no valid token is left out.
    Raises ``OptionError`` where a pair is not one chosen and one rejected sequence of this micro-batch.
    """
    count = sequences.count
    if pair_ids is not None:
        if preferred is None:
            raise MissingFieldError("pair_ids needs preferred, which sequence of each pair was chosen")
        pairs = _by_id(_flags(pair_ids, "pair_ids", count), _flags(preferred, "preferred", count))
    elif preferred is not None:
        raise OptionError(
            f"preferred without pair_ids says nothing of a paired loss in layout={layout!r}; give pair_ids too, or "
            "leave it out"
        )
    elif count % 2:
        raise OptionError(
            f"layout={layout!r} needs an even number of sequences in every micro-batch, both of each pair; "
            f"got {count}. Give pair_ids and preferred, with a negative id for a sequence that is in no pair"
        )
    else:
        half = count // 2
        pairs = [(2 * i, 2 * i + 1) if layout == "alternating" else (i, half + i) for i in range(half)]
    lengths = _lengths(sequences)
    kept = [pair for pair in pairs if keep_empty or (lengths[pair[0]] and lengths[pair[1]])]
    found = torch.tensor(kept, dtype=torch.int64, device=sequences.ids.device).reshape(-1, 2)
    return found[:, 0], found[:, 1]


def find_sides(sequences: Segments, preferred: Tensor | None, keep_empty: bool) -> Sides:
    """Desirable and undesirable sequences by ``preferred [N]``; without a valid token only if ``keep_empty``."""
    if preferred is None:
        raise MissingFieldError("an unpaired preference loss needs preferred, [N] bool: which sequences are desirable")
    flags, lengths = _flags(preferred, "preferred", sequences.count), _lengths(sequences)
    kept = [(n, flag) for n, flag in enumerate(flags) if keep_empty or lengths[n]]
    device = sequences.ids.device
    chosen, rejected = (
        torch.tensor([n for n, flag in kept if bool(flag) is side], dtype=torch.int64, device=device)
        for side in (True, False)
    )
    return chosen, rejected


def tail_tokens(sequences: Segments, cu_seq_lens: Tensor, sides: Sides) -> Tensor:
    """``[T]`` bool: valid tokens beyond the length of the shorter sequence of their pair (LD-DPO)."""
    lengths = sequences.lengths(sequences.valid.float()).to(torch.int64)
    shared = lengths.clone()
    shortest = torch.minimum(lengths[sides[0]], lengths[sides[1]])
    for side in sides:
        shared[side] = shortest
    seen = sequences.valid.cumsum(0)
    before = torch.cat([seen.new_zeros(1), seen])[cu_seq_lens[:-1].to(torch.int64)]
    rank = seen - before[sequences.ids]  # of valid tokens: 1, 2, ... in each sequence
    return sequences.valid & (rank > shared[sequences.ids])


def _by_id(ids: list[int], preferred: list[int]) -> list[tuple[int, int]]:
    found: dict[int, tuple[list[int], list[int]]] = {}
    for number, (pair, chosen) in enumerate(zip(ids, preferred, strict=True)):
        if pair >= 0:
            found.setdefault(pair, ([], []))[0 if chosen else 1].append(number)
    for pair, (chosen_ones, rejected_ones) in found.items():
        if len(chosen_ones) != 1 or len(rejected_ones) != 1:
            raise OptionError(
                f"pair {pair} of pair_ids has {len(chosen_ones)} preferred and {len(rejected_ones)} other sequences in "
                "this micro-batch; a pair is one of each, both in one micro-batch"
            )
    return [(chosen_ones[0], rejected_ones[0]) for chosen_ones, rejected_ones in found.values()]


def _flags(tensor: Tensor, name: str, count: int) -> list[int]:
    if tensor.shape != (count,) or tensor.dtype.is_floating_point:
        raise ShapeError(
            f"{name} must be [N] = ({count},), one integer or bool per sequence; got {tuple(tensor.shape)} of "
            f"{tensor.dtype}"
        )
    values: list[int] = tensor.tolist()
    return values


def _lengths(sequences: Segments) -> list[float]:
    lengths: list[float] = sequences.lengths(sequences.valid.float()).tolist()
    return lengths
