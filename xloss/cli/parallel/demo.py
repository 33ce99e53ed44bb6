"""``xloss demo --parallel``: the same training on 1, 2 and 4 processes, or on those that torchrun started."""

from __future__ import annotations

import json
import shutil
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from torch import Tensor

from xloss.cli.corpus import load_corpus
from xloss.cli.demo_verdict import Verdict
from xloss.cli.errors import CannotRun
from xloss.cli.info import environment
from xloss.cli.options import DemoOptions
from xloss.cli.parallel import plot
from xloss.cli.parallel.model import NUM_HEADS
from xloss.cli.parallel.result import ParallelResult, judge, print_table, to_json
from xloss.cli.parallel.training import Curve, Job, layout, train_ranks
from xloss.cli.progress import Bars
from xloss.cli.spawn import RankFailed, World, launched, launched_rank, launched_world, run_ranks

WORLDS = (1, 2, 4)
USUAL = {"steps": 40, "vocab_size": 4096, "hidden_size": 64}
QUICK = {"steps": 8, "vocab_size": 1024, "hidden_size": 32}


def parallel_demo(options: DemoOptions) -> int:
    """Train, compare, report on the first rank. Exit status 0 if all curves are one, 1 if not."""
    job, device, worlds = choose(options)
    first = launched_rank() == 0
    try:
        options.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotRun(f"--out {options.out}: {error.strerror}. Give a folder that can be written.") from error
    with Bars(Console(stderr=True, quiet=not first)) as bars:
        with bars.stage("Reading text", None) as tick:
            corpus = load_corpus(options.text, job.vocab_size, options.seed, tick)
        text, _ = corpus.split()
        try:
            curves = train_worlds(job, text, worlds, device, options.out / "checkpoints", bars)
        except RankFailed as error:
            return _failed(options, str(error)) if first else 1
        if not first:
            return 0
        result = ParallelResult(
            environment=environment(),
            job=job,
            device=device,
            text={"source": corpus.source, "num_files": corpus.num_files, "num_tokens": len(corpus.ids)},
            curves=tuple(curves),
            seconds=bars.seconds,
        )
        with bars.stage("Drawing", 1):
            drawn = plot.draw(options.out, result)
    return _report(options, result, drawn)


def choose(options: DemoOptions) -> tuple[Job, Literal["cpu", "cuda"], list[int]]:
    """What to train, where, and on how many processes one after the other.

    Raises:
        CannotRun: an option that has no meaning here, or a size that does not go.
    """
    if options.tokens is not None:
        raise CannotRun("--tokens is the size of the policy steps, which --parallel leaves out; --steps is heeded.")
    sizes = {name: getattr(options, name) or size for name, size in (QUICK if options.quick else USUAL).items()}
    if sizes["steps"] < 2:
        raise CannotRun(f"--steps {sizes['steps']}: --parallel resumes half way and needs 2 or more.")
    if sizes["hidden_size"] % NUM_HEADS:
        raise CannotRun(f"--hidden-size {sizes['hidden_size']} is not a multiple of {NUM_HEADS}, the attention heads.")
    job = Job(seed=options.seed, **sizes)
    given, devices = launched_world(), torch.cuda.device_count()
    enough = devices >= (1 if launched() else max(WORLDS))
    if options.device == "cuda" and not enough:
        raise CannotRun(f"--device cuda: {max(WORLDS)} processes need a device each, and there are {devices}.")
    device: Literal["cpu", "cuda"] = "cuda" if options.device != "cpu" and enough else "cpu"
    if given is not None and layout(given)[0] > job.num_sequences:
        raise CannotRun(f"{given} processes: the batch has {job.num_sequences} sequences, too few for so many.")
    others = [n for n in WORLDS if n != given and (device == "cpu" or n <= devices)]
    return job, device, others if given is None else [given, *others]


def train_worlds(
    job: Job, text: Tensor, worlds: list[int], device: Literal["cpu", "cuda"], folder: Path, bars: Bars
) -> list[Curve]:
    """The curves of every number of processes; each resumes its own checkpoint and that of the number before.

    Under torchrun the first number is that of the processes there are; the first of them spawns the others.
    """
    curves: list[Curve] = []
    before: tuple[str, int] | None = None
    for i, processes in enumerate(worlds):
        joins = launched() and i == 0
        if launched_rank() and not joins:
            break
        own = str(folder / str(processes))
        total = job.steps + (job.steps - job.saved_at) * (2 if before else 1)
        world = World(processes, device)
        with bars.stage(f"{processes} process{'es' if processes > 1 else ''}", total) as tick:
            curves += run_ranks(train_ranks, job, text, own, before, world=world, hear=tick, join=joins)[0]
        before = own, processes
    if launched_rank() == 0:
        shutil.rmtree(folder)
    return curves


def _report(options: DemoOptions, result: ParallelResult, drawn: dict[str, object]) -> int:
    verdict = judge(result)
    text = to_json(result, verdict, drawn)
    (options.out / "parallel.json").write_text(text, "utf-8")
    if options.json:
        sys.stdout.write(text)
        return 0 if verdict.passed else 1
    console = Console()
    print_table(console, result)
    if drawn["reason"]:
        console.print(f"No plot: {drawn['reason']}", highlight=False, markup=False)
    written = ", ".join(["parallel.json", *(["parallel.png"] if drawn["files"] else [])])
    console.print(f"Written to {options.out}: {written}", highlight=False, markup=False)
    style = "bold green" if verdict.passed else "bold red"
    console.print(verdict.line, style=style, soft_wrap=True, highlight=False, markup=False)
    return 0 if verdict.passed else 1


def _failed(options: DemoOptions, reason: str) -> int:
    verdict = Verdict(False, f"FAIL {reason}", (reason,))
    print(json.dumps({"verdict": asdict(verdict)}) if options.json else verdict.line)
    return 1
