"""Runs layouts: references and single processes here, the others on the ranks of a world."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

import torch

from xloss.cli.errors import CannotRun
from xloss.cli.spawn import Rank, RankFailed, World, launched, run_ranks
from xloss.cli.verify import alone, data_parallel, refused, sequence_parallel, vocab_parallel
from xloss.cli.verify.cases import LossCase, find_cases
from xloss.cli.verify.compare import Errors, compare
from xloss.cli.verify.layouts import LAYOUTS, ONE, Layout, Site, in_float64, one_process
from xloss.cli.verify.own import own_case
from xloss.cli.verify.problem import Shape, build_batch
from xloss.cli.verify.step import Outcome, take_steps
from xloss.errors import XlossError

ROOMS = (alone, data_parallel, sequence_parallel, vocab_parallel, refused)  # importing them fills the registry
Tick = Callable[[str], None]


@dataclass(frozen=True)
class Task:
    """What to verify; names only, so that every process makes its own objects of it."""

    shape: Shape
    layouts: tuple[str, ...]
    losses: tuple[str, ...]
    own: str | None
    folder: str

    def cases(self) -> list[LossCase]:
        """The losses."""
        cases = find_cases(self.losses) + ([] if self.own is None else [own_case(self.own)])
        if self.shape.softcap is None:
            return cases
        return [replace(case, config=case.configured(softcap=self.shape.softcap)) for case in cases]

    def site(self, rank: Rank = ONE) -> Site:
        """Where layouts are set up in this process."""
        return Site(self.shape, build_batch(self.shape), rank)


@dataclass(frozen=True)
class Seen:
    """One variant of one layout with one loss, on one rank: its errors, or the xloss error that refused it."""

    layout: str
    loss: str
    variant: str
    errors: Errors | None
    own: float = 0.0  # the one process's own error against float64
    micro_batches: int = 1
    refusal: str = ""


class References:
    """Results of one process, kept in files that all ranks read."""

    def __init__(self, task: Task) -> None:
        self.folder = Path(task.folder)

    def file(self, case: LossCase, layout: Layout, exact: bool) -> Path:
        """Where one loss's result stands, for all layouts with the same model and dtype."""
        how = "float64" if exact else str(layout.compute)
        return self.folder / f"{case.name.replace('/', '_')}-{layout.kind}-{how}.pt"

    def make(self, site: Site, layouts: Sequence[Layout], cases: Sequence[LossCase], tick: Tick) -> None:
        """Run the one process for everything that these layouts are compared with."""
        for case in cases:
            for layout in layouts:
                for exact in (False, True):
                    file = self.file(case, layout, exact)
                    if layout.takes(case) and not file.exists():
                        kind = layout.kind
                        setup = in_float64(site, kind) if exact else one_process(site, kind, layout.compute)
                        outcomes = take_steps(setup, case, site.batch)
                        _check_gradient(outcomes, case)
                        torch.save(outcomes, file)
            tick(case.name)

    def read(self, case: LossCase, layout: Layout, exact: bool) -> list[Outcome]:
        """What ``make`` saved."""
        found: list[Outcome] = torch.load(self.file(case, layout, exact), weights_only=False, mmap=True)
        return found


def _check_gradient(outcomes: Sequence[Outcome], case: LossCase) -> None:
    """Zeros agree with zeros, whatever a layout does."""
    if not any(grad is not None and bool(grad.any()) for outcome in outcomes for grad in outcome.grads.values()):
        raise CannotRun(f"the gradient of {case.name} is 0 on the made-up batch, so there is nothing to compare")


def run_layout(layout: Layout, cases: Sequence[LossCase], site: Site, references: References) -> list[Seen]:
    """Every loss through every variant of a layout, in this process."""
    found: list[Seen] = []
    cases = _one_of_each(cases) if layout.refused else cases
    for variant, setup in layout.variants(site):
        for case in cases:
            if not layout.takes(case):
                continue
            one, exact = references.read(case, layout, False), references.read(case, layout, True)
            try:
                outcomes = take_steps(setup, case, site.batch)
            except XlossError as error:
                if not layout.refused:
                    raise
                found.append(Seen(layout.name, case.name, variant, None, refusal=str(error)))
                continue
            errors, own = compare(outcomes, one, exact), compare(one, exact, exact).worst
            found.append(Seen(layout.name, case.name, variant, errors, own, len(setup.cut)))
    return found


def _one_of_each(cases: Sequence[LossCase]) -> list[LossCase]:
    """The first that couples tokens and the first that does not: refusals do not look at the formula."""
    return [next(same) for _, same in groupby(sorted(cases, key=LossCase.coupled), key=LossCase.coupled)]


def work(rank: Rank, task: Task) -> list[Seen]:
    """What each rank does. Tells ``(layout, None)`` as one begins, on rank 0, and ``(layout, seen)`` as it ends."""
    logging.getLogger("torch.distributed.tensor._redistribute").setLevel(logging.ERROR)  # gradients are joined slowly
    references, cases, site = References(task), task.cases(), task.site(rank)
    found: list[Seen] = []
    for name in task.layouts:
        if rank.rank == 0:
            rank.tell((name, None))
        seen = run_layout(LAYOUTS[name], cases, site, references)
        rank.tell((name, seen))
        found += seen
    return found


def run_all(task: Task, world: World, prepared: Tick, tick: Tick) -> tuple[list[Seen], dict[str, str]]:
    """Every layout of the task that can run: what all ranks saw, and by layout the error that ended one.

    ``prepared`` is called with each loss while references are made, ``tick`` with each layout as it begins.
    """
    site, references, cases = task.site(Rank(0, 1, torch.device(world.device))), References(task), task.cases()
    layouts = [LAYOUTS[name] for name in task.layouts if not LAYOUTS[name].skipped(world.nproc, cases)]
    seen: list[Seen] = []
    ended: dict[str, str] = {}
    try:
        references.make(site, layouts, cases, prepared)
    except Exception as error:
        return seen, dict.fromkeys(task.layouts, f"one process raised {type(error).__name__}: {error}")
    for layout in layouts:
        if layout.ranks == 0:
            tick(layout.name)
            try:
                seen += run_layout(layout, cases, site, references)
            except Exception as error:
                ended[layout.name] = f"raised {type(error).__name__}: {error}"
    todo = tuple(layout.name for layout in layouts if layout.ranks)
    while todo:
        todo = _run_on_ranks(replace(task, layouts=todo), world, tick, seen, ended)
    return seen, ended


def _run_on_ranks(task: Task, world: World, tick: Tick, seen: list[Seen], ended: dict[str, str]) -> tuple[str, ...]:
    """Layouts on the ranks of one world, into ``seen`` and ``ended``; those left to a new world where it broke."""
    begun: list[str] = []
    told: list[Seen] = []

    def hear(event: tuple[str, list[Seen] | None]) -> None:
        name, what = event
        if what is None:
            begun.append(name)
            tick(name)
        else:
            told.extend(what)

    try:
        for of_rank in run_ranks(work, task, world=world, hear=hear):
            seen += of_rank
        return ()
    except RankFailed as failure:
        seen += told
        done = task.layouts.index(begun[-1]) if begun else 0
        left = task.layouts[done + 1 :] if begun and not launched() else ()
        for name in task.layouts[done:]:
            if name not in left:
                ended[name] = str(failure)
        return left
