"""Every way to lay out one optimizer step that ``xloss verify`` knows: a registry, a function each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from xloss.cli.spawn import Rank
from xloss.cli.verify.cases import LossCase
from xloss.cli.verify.problem import PLAIN, ComputedIn, GlobalBatch, Kind, Shape, SmallLM, build_model
from xloss.cli.verify.step import Cut, Setup

ONE = Rank(0, 1, torch.device("cpu"))


@dataclass(frozen=True)
class Site:
    """Where a layout is set up: the problem, and the process."""

    shape: Shape
    batch: GlobalBatch
    rank: Rank

    def model(self, kind: Kind = PLAIN, dtype: torch.dtype | None = None, cls: type[SmallLM] = SmallLM) -> SmallLM:
        """The bare model."""
        return build_model(self.shape, self.rank.device, dtype, kind, cls)

    def chunk_size(self, parts: int) -> int:
        """Tokens a chunk that make about ``parts`` chunks of the whole batch."""
        return max(1, len(self.batch.ids) // parts)


Variants = Iterator[tuple[str, Setup]]


@dataclass(frozen=True)
class Layout:
    """One row of the table.

    Args:
        name: as ``--layouts`` takes it.
        what: one line about it.
        variants: ``Site`` to named setups, all of which must be right.
        ranks: fewest processes; 0: one process alone, without a group.
        multiple: the number of processes is a multiple of it.
        kind: of the model, also of the one process it is compared with.
        compute: dtype in which weights and activations are computed, where it is not theirs.
        hint: where to look in a loss of one's own that fails here.
        takes: whether it runs a loss.
        counts: numbers that a wrong factor may come from, beside ranks and micro-batches.
        refused: whether it must be refused, or else be right.
    """

    name: str
    what: str
    variants: Callable[[Site], Variants]
    ranks: int = 0
    multiple: int = 1
    kind: Kind = PLAIN
    compute: torch.dtype | None = None
    hint: str = ""
    takes: Callable[[LossCase], bool] = lambda case: True
    counts: tuple[tuple[str, int], ...] = ()
    refused: bool = False

    def skipped(self, world: int, cases: Sequence[LossCase]) -> str:
        """Why it cannot run on ``world`` processes, or with none of these losses; empty if it can."""
        if world < self.ranks:
            return f"needs {self.ranks} processes"
        if world % self.multiple:
            return f"needs a multiple of {self.multiple} processes"
        return "" if any(self.takes(case) for case in cases) else "is not for any of these losses"


LAYOUTS: dict[str, Layout] = {}


def layout(name: str, what: str, **facts: Any) -> Callable[[Callable[[Site], Variants]], Callable[[Site], Variants]]:
    """Put a function from a ``Site`` to named setups into the table."""

    def register(variants: Callable[[Site], Variants]) -> Callable[[Site], Variants]:
        LAYOUTS[name] = Layout(name, what, variants, **facts)
        return variants

    return register


# -- cuts --------------------------------------------------------------------------------------------------------------


def sequences_of(pairs: list[int]) -> tuple[int, ...]:
    """Both sequences of each pair."""
    return tuple(i for pair in pairs for i in (2 * pair, 2 * pair + 1))


def cut_pairs(pairs: list[int], count: int) -> Cut:
    """``count`` uneven micro-batches: the first holds a single pair."""
    if count == 1:
        return (sequences_of(pairs),)
    rest = pairs[1:]
    return (sequences_of(pairs[:1]), *(sequences_of(rest[i :: count - 1]) for i in range(count - 1)))


def dealt(site: Site, ways: int, way: int, micro_batches: int) -> Cut:
    """Micro-batches of data-parallel rank ``way`` of ``ways``."""
    return cut_pairs(list(range(site.batch.num_pairs))[way::ways], micro_batches)


def whole(site: Site) -> Cut:
    """Everything as one micro-batch."""
    return (sequences_of(list(range(site.batch.num_pairs))),)


def one_process(site: Site, kind: Kind, compute: torch.dtype | None) -> Setup:
    """What a layout is compared with: one process that holds the whole batch."""
    model = site.model(kind)
    return Setup(model if compute is None else ComputedIn(model, compute), whole(site))


def in_float64(site: Site, kind: Kind) -> Setup:
    """The same in float64, with all logits and plain autograd where they fit."""
    logits = len(site.batch.ids) * site.shape.vocab_size * 8
    return Setup(site.model(kind, torch.float64), whole(site), options={"mode": "eager"} if logits <= 1 << 29 else {})
