"""Runs what ``xloss verify`` was asked for, and prints what came of it."""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Sequence

import torch
from rich.console import Console

from xloss.cli.errors import CannotRun
from xloss.cli.info import environment
from xloss.cli.progress import Bars
from xloss.cli.spawn import World, launched_rank, launched_world
from xloss.cli.verify.cases import STANDARD
from xloss.cli.verify.layouts import LAYOUTS, Layout
from xloss.cli.verify.options import VerifyOptions
from xloss.cli.verify.problem import Shape
from xloss.cli.verify.report import Report, print_table, to_json
from xloss.cli.verify.verdict import row_of, skipped_row
from xloss.cli.verify.world import Task, run_all
from xloss.errors import unknown_name

PROCESSES = 2  # where nobody says how many


def verify(options: VerifyOptions) -> int:
    """Run, print, and return the exit status."""
    world = choose_world(options)
    report = make_report(options, world, Console(stderr=True, quiet=launched_rank() > 0))
    if launched_rank() == 0:
        if options.json:
            sys.stdout.write(to_json(report))
        else:
            print_table(Console(highlight=False, markup=False), report)
    return 0 if report.passed else 1


def make_report(options: VerifyOptions, world: World, progress: Console) -> Report:
    """Everything but the printing."""
    layouts = chosen_layouts(_split(options.layouts))
    shape = shape_of(options, world)
    with tempfile.TemporaryDirectory(prefix="xloss-verify-") as folder, Bars(progress) as bars:
        losses = _split(options.losses) or (STANDARD if options.loss is None else ())
        task = Task(shape, tuple(x.name for x in layouts), losses, options.loss, folder)
        cases = task.cases()
        can = [layout for layout in layouts if not layout.skipped(world.nproc, cases)]
        with bars.stage("One process", len(cases)) as prepared, bars.stage("Layouts", len(can)) as tick:
            seen, ended = run_all(task, world, prepared, tick)
    rows = []
    for layout in layouts:
        reason = layout.skipped(world.nproc, cases)
        own = [s for s in seen if s.layout == layout.name]
        ran = row_of(layout, own, shape.dtype, world.nproc, ended.get(layout.name, ""))
        rows.append(skipped_row(layout, reason) if reason else ran)
    return Report(
        environment=environment(),
        world={"ranks": world.nproc, "backend": world.backend, "device": world.device},
        shape={
            "hidden_size": shape.hidden_size,
            "vocab_size": shape.vocab_size,
            "tokens": shape.tokens,
            "dtype": options.dtype,
            "bias": shape.bias,
            "softcap": shape.softcap,
            "seed": shape.seed,
        },
        losses=tuple(case.name for case in cases),
        own=options.loss,
        rows=tuple(rows),
        seconds=bars.seconds,
    )


def chosen_layouts(names: Sequence[str]) -> list[Layout]:
    """Layouts by name, all where none is given, those to be refused last. Raises CannotRun for a wrong one."""
    for name in names:
        if name not in LAYOUTS and name != "all":
            raise CannotRun(unknown_name("--layouts", name, ["all", *LAYOUTS]))
    chosen = [x for x in LAYOUTS.values() if not names or "all" in names or x.name in names]
    return sorted(chosen, key=lambda layout: layout.refused)


def _split(words: Sequence[str]) -> tuple[str, ...]:
    """``a b`` and ``a,b`` are the same."""
    return tuple(name for word in words for name in word.split(",") if name)


def choose_world(options: VerifyOptions) -> World:
    """Processes and device. Raises CannotRun where there are not enough GPUs."""
    nproc = launched_world() or options.nproc or PROCESSES
    if options.nproc not in (None, nproc):
        raise CannotRun(f"--nproc {options.nproc}: torchrun started {nproc} processes; leave --nproc out.")
    gpus = torch.cuda.device_count()
    if options.device == "cuda" and gpus < nproc:
        raise CannotRun(f"--device cuda: {nproc} processes need a GPU each, and there are {gpus}. Give --nproc or cpu.")
    device = "cuda" if options.device != "cpu" and gpus >= nproc else "cpu"
    return World(nproc, "cuda" if device == "cuda" else "cpu", options.timeout)


def shape_of(options: VerifyOptions, world: World) -> Shape:
    """The problem asked for, with enough prompts for every process."""
    return Shape(
        hidden_size=options.hidden_size,
        vocab_size=options.vocab_size,
        tokens=options.tokens,
        dtype=getattr(torch, options.dtype),
        bias=options.bias,
        softcap=options.softcap,
        num_sequences=max(16, 8 * world.nproc),
        seed=options.seed,
    )
