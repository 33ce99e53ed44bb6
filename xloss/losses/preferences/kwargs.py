"""The tensors of a micro-batch of preferences: sequences, which of them are compared, and the reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Self

import torch
from torch import Tensor

from xloss.errors import MissingFieldError, OptionError, UnsupportedError
from xloss.losses.model import BaseLossContextInputItem, BaseLossKwargs, PerBatch, PerToken, TokenBatch
from xloss.packing import Segments, rows_as_segments


class _PreferenceFields(TokenBatch):
    """Fields of the item and of the kwargs."""

    ref_logprobs: Annotated[Tensor | None, PerToken(pad=0.0)] = None
    ref_sequence_logprobs: Annotated[Tensor | None, PerBatch()] = None
    pair_ids: Annotated[Tensor | None, PerBatch()] = None
    preferred: Annotated[Tensor | None, PerBatch()] = None
    kl: Annotated[Tensor | None, PerBatch()] = None
    reward_shift: Annotated[Tensor | None, PerBatch()] = None


class PreferenceLossContextInputItem(_PreferenceFields, BaseLossContextInputItem):
    """Sequences of one micro-batch: packed in ``[1, T]`` with ``cu_seq_lens``, or the rows of ``[B, S]``; N in all.

    Args:
        ref_logprobs: of the frozen reference, per token.
        ref_sequence_logprobs: ``[N]``, the same summed over each sequence, in place of ``ref_logprobs``.
        pair_ids: ``[N]`` int, number of each sequence's pair; negative: in no pair. In place of the config's layout.
        preferred: ``[N]`` bool, chosen (or, for unpaired losses, desirable) sequences.
        kl: log-ratios of completions under prompts that are not theirs, any shape, without gradient, or their mean:
            KTO's reference point is the mean over the global batch, at least 0. Zeros for none.
        reward_shift: 0-d, BCO's delta: the running mean of ``beta log_ratio``.
    """


class PreferenceLossKwargs(_PreferenceFields, BaseLossKwargs):
    """The item's tensors, which sequences are compared, and global denominators.

    Args:
        chosen, rejected: ``[P]`` numbers of sequences; of pairs in the same order.
        tail: tokens beyond the length of the shorter sequence of their pair, with ``ld_alpha``.
        kl_point: ``kl`` reduced over the global batch, 0-d.
        loss_divisor: pairs (or sequences) of the global batch, divided by the gradient factor, 0-d.
        nll_divisor: the same for chosen sequences' likelihood: tokens, or pairs.
    """

    chosen: Annotated[Tensor | None, PerBatch()] = None
    rejected: Annotated[Tensor | None, PerBatch()] = None
    tail: Annotated[Tensor | None, PerToken(pad=0)] = None
    kl_point: Annotated[Tensor | None, PerBatch()] = None
    loss_divisor: Annotated[Tensor | None, PerBatch()] = None
    nll_divisor: Annotated[Tensor | None, PerBatch()] = None

    def bounds(self) -> Tensor:
        """``cu_seq_lens``, or the rows of a padded batch as such."""
        labels = self.shifted_labels
        if self.cu_seq_lens is not None:
            return self.cu_seq_lens
        if labels.ndim == 1 or labels.shape[0] == 1:
            raise MissingFieldError(
                f"shifted_labels of shape {tuple(labels.shape)} needs cu_seq_lens_list, the bounds of its sequences"
            )
        return rows_as_segments(labels.shape, labels.device)

    def sequences(self, ignore_idx: int) -> Segments:
        """The sequences, their valid tokens those with a label."""
        return Segments.of(self.bounds(), self.shifted_labels.reshape(-1) != ignore_idx)

    def chunk(self, chunk_size: int) -> list[Self]:
        raise UnsupportedError("preference losses need whole sequences: their kwargs cannot be cut at any token")

    @classmethod
    def cat(cls, chunks: Sequence[Self]) -> Self:
        """Packs joined to one, calibrated together before."""
        if any(part.split is not None for part in chunks):
            return super().cat(chunks)  # which joins the wholes here
        for part in chunks:
            if part.cu_seq_lens is None or part.chosen is None:
                raise UnsupportedError(
                    "cat of preference losses joins calibrated packs with cu_seq_lens; padded rows, or micro-batches "
                    "that were not calibrated, cannot be joined along the tokens"
                )
        joined = super().cat(chunks)
        counts = [part.bounds().numel() - 1 for part in chunks]
        starts = [sum(counts[:i]) for i in range(len(counts))]
        sides = {
            name: torch.cat([getattr(part, name) + start for part, start in zip(chunks, starts, strict=True)])
            for name in ("chosen", "rejected")
        }
        values = sides | {name: _joined(chunks, name) for name in ("ref_sequence_logprobs", "preferred", "kl")}
        if chunks[0].preferred is None or chunks[0].pair_ids is not None:  # pairs: numbered anew
            pair_ids, preferred = (torch.full((sum(counts),), -1, device=joined.shifted_labels.device) for _ in "ab")
            for number, side in enumerate((sides["rejected"], sides["chosen"])):
                pair_ids[side] = torch.arange(side.numel(), device=side.device)
                preferred[side] = number
            values |= {"pair_ids": pair_ids, "preferred": preferred == 1}
        if any(_differ(part.reward_shift, joined.reward_shift) for part in chunks):
            raise OptionError("reward_shift differs between the micro-batches to cat")
        return joined.replaced(values)


def _joined(chunks: Sequence[PreferenceLossKwargs], name: str) -> Tensor | None:
    parts = [getattr(part, name) for part in chunks]
    if all(part is None for part in parts):
        return None
    if any(part is None for part in parts):
        raise MissingFieldError(f"{name} is None in some of the micro-batches to cat and a tensor in others")
    return torch.cat([part.reshape(-1) for part in parts])


def _differ(a: Tensor | None, b: Tensor | None) -> bool:
    return a is not b and (a is None or b is None or not torch.equal(a, b))
