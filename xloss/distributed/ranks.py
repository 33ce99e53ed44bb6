"""The ranks whose data make the global batch, and sums over it: all of a step in one all-reduce."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from xloss.distributed.groups import Ranks, all_reduce_max, all_reduce_sum, default_device, world_size


class TokenRanks:
    """Which ranks' data add up to the global batch, and whether this rank's are counted.

    Args:
        ranks: those that hold distinct tokens; default all. Ranks that hold the same data (tensor parallelism) must
            not be in it together.
        counts: False where another rank counts this rank's tokens: of sequence-parallel ranks, that all see the whole
            of their sequences, the first does.
    """

    def __init__(self, ranks: Ranks = None, counts: bool = True) -> None:
        self.ranks = ranks
        self.counts = counts
        self._waiting: list[RankSum] = []

    def sum(self, parts: Sequence[Tensor]) -> RankSum:
        """Sum of all elements of ``parts`` over the ranks, 0-d; none is 0."""
        totals = [part.sum(dtype=_wide(part.device)) for part in parts]
        return self.add(torch.stack(totals).sum(0) if totals else torch.zeros(()))

    def add(self, values: Tensor) -> RankSum:
        """Sum of ``values``, of one shape on all ranks, over the ranks."""
        values = values.to(_wide(values.device))
        found = RankSum(self, values if self.counts else torch.zeros_like(values))
        self._waiting.append(found)
        return found

    def max(self, value: int) -> int:
        """Largest ``value``. Waits for the device."""
        return all_reduce_max(value, self.ranks)

    def gradient_factor(self, grad_reduce: str) -> float:
        """What weights are multiplied by so that gradients come out right after the training engine reduced them.

        ``mean`` (DDP, FSDP): the number of ranks. ``sum``: 1.
        """
        return float(world_size(self.ranks)) if grad_reduce == "mean" else 1.0

    def reduce(self) -> None:
        """Make every sum asked for so far known, in one all-reduce; without any, nothing."""
        waiting, self._waiting = self._waiting, []
        if not waiting:
            return
        devices = {found.local.device for found in waiting} - {torch.device("cpu")}
        device = devices.pop() if devices else default_device(self.ranks)
        flat = torch.cat([found.local.reshape(-1).to(device) for found in waiting])
        summed = all_reduce_sum(flat, self.ranks).split([found.local.numel() for found in waiting])
        for found, total in zip(waiting, summed, strict=True):
            found.total = total.reshape(found.local.shape)


class RankSum:
    """A sum over ranks, known once it is asked for: the first to ask makes all that wait known.

    Ask for none before all of the step are registered, so that one all-reduce does.
    """

    def __init__(self, ranks: TokenRanks, local: Tensor) -> None:
        self.local = local
        self.total: Tensor | None = None
        self._ranks = ranks

    def value(self) -> Tensor:
        """The sum, float64 (float32 on MPS, which has no other)."""
        if self.total is None:
            self._ranks.reduce()
        assert self.total is not None
        return self.total

    def divisor(self) -> Tensor:
        """The sum, float32, and 1 where it is 0, so that nothing divides by 0."""
        total = self.value().to(torch.float32)
        return torch.where(total == 0, torch.ones_like(total), total)


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64
