"""``python -m benchmarks`` runs the suite; ``report`` makes docs/performance.md; ``largest``: the most that fits."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, NoReturn

import torch
from cyclopts import App, CycloptsPanel, Parameter, validators
from rich.console import Console

import xloss
from benchmarks import plots, tables
from benchmarks.accuracy import TABLE_DTYPES, TABLE_PROVIDERS
from benchmarks.cases import Case, Shape
from benchmarks.environment import ROOT, describe
from benchmarks.largest import run_largest, search
from benchmarks.options import Device, DtypeName, ProviderName, RunOptions, resolve
from benchmarks.providers import PROVIDERS
from benchmarks.report import generate
from benchmarks.results import RESULTS, Row, to_json, write
from benchmarks.run import num_ticks, run_accuracy, run_group, run_memory
from benchmarks.suite import Suite
from benchmarks.timing import Deadline
from xloss.cli.progress import Bars

GIB = 1 << 30
_SHAPES_SHARE = 0.85  # of a limited run's time; the rest is for the largest batch, errors by dtype and plots

app = App(
    name="python -m benchmarks",
    help="Measure xloss against bare GEMMs and its peers.",
    help_format="markdown",
    version=xloss.__version__,
)


def _refuse(message: str) -> NoReturn:
    """Say what is wrong with the call, as cyclopts does for a misspelt option, and leave with its exit status."""
    Console(stderr=True).print(CycloptsPanel(message))
    raise SystemExit(2)


@app.default
def run(*, options: RunOptions = RunOptions()) -> int:  # noqa: B008 (frozen)
    """Gate every provider against float64, then measure time, peak memory and error side by side.

    Writes JSON and plots. Exit status 0 if xloss passed every gate, 1 if not.
    """
    try:
        device = resolve(options.device)
        suite = options.suite(device)
    except ValueError as error:
        _refuse(str(error))
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    environment, rows, began = describe(device, options.commit), [], time.perf_counter()
    console = Console(stderr=options.json)
    if not console.is_terminal:
        console = Console(stderr=options.json, width=100)  # a file has no width to fit
    console.print(_greeting(environment), style="bold", highlight=False)
    deadline = Deadline.after(options.seconds(device))
    with Bars() as bars:
        for new in _measure(suite, device, bars, deadline, asked_for=bool(options.providers)):
            rows += new
            path = write(
                options.folder, environment, rows
            )  # after each part: a run that is cut short leaves what it has
    drawn = plots.draw(path.with_suffix(""), rows, environment["device"])
    if options.json:
        sys.stdout.write(to_json(environment, rows))
    else:
        _print(console, rows)
    console.print(f"{time.perf_counter() - began:.0f} s. Written: {_shown(path, *drawn)}", highlight=False)
    return 1 if any(row.ours and row.state == "red" for row in rows) else 0


def _measure(suite: Suite, device: str, bars: Bars, deadline: Deadline, *, asked_for: bool) -> Iterator[list[Row]]:
    """Parts of a run one after the other, so that each can be kept at once. Each shape has its share of the time."""
    work = [group.work(device, asked_for=asked_for) for group in suite.groups]
    for i, group in enumerate(suite.groups):
        part = _SHAPES_SHARE * work[i] / sum(work[i:])
        with bars.stage(str(group.shape), num_ticks(group, device, asked_for=asked_for)) as tick:
            yield run_group(group, suite.gate, device, tick, asked_for=asked_for, deadline=deadline, part=part)
    if suite.memory is not None:
        with bars.stage("memory, apart", len(suite.memory[1])) as tick:
            yield run_memory(suite, device, tick)
    if suite.largest is not None:
        with bars.stage("largest batch", len(suite.largest[2])) as tick:
            yield run_largest(suite, device, tick, deadline)
    if suite.accuracy is not None:
        with bars.stage("errors by dtype", len(TABLE_DTYPES) * len(TABLE_PROVIDERS)) as tick:
            yield run_accuracy(suite, device, tick)


def _greeting(environment: dict[str, object]) -> str:
    return (
        f"{environment['device']}; torch {environment['torch']}, xloss {environment['xloss']}, "
        f"commit {environment['commit']}"
    )


def _print(console: Console, rows: list[Row]) -> None:
    tables.print_time(console, [row for row in rows if row.kind == "time"])
    tables.print_memory(console, [row for row in rows if row.kind == "memory"])
    tables.print_largest(console, [row for row in rows if row.kind == "largest"])
    tables.print_accuracy(console, [row for row in rows if row.kind == "accuracy"])
    console.print(tables.LEGEND, style="dim", highlight=False)


def _shown(*paths: Path) -> str:
    """Paths as seen from here, where they are below."""
    here = Path.cwd()
    return ", ".join(str(p.relative_to(here)) if p.is_relative_to(here) else str(p) for p in paths)


@app.command
def report(
    *,
    results: Annotated[Path, Parameter(validator=validators.Path(file_okay=False))] = RESULTS,
    page: Path = ROOT / "docs" / "performance.md",
) -> int:
    """Make docs/performance.md from all results: the newest of each device in full, older ones in a line each.

    Parameters
    ----------
    results
        Folder of results.
    page
        The page to write.
    """
    try:
        text = generate(results, page)
    except ValueError as error:
        _refuse(str(error))
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(text, encoding="utf-8")
    Console().print(f"Written: {_shown(page)}", highlight=False)
    return 0


@app.command(name="largest")
def find_largest(
    *,
    providers: Annotated[tuple[ProviderName, ...], Parameter(consume_multiple=True, negative="")] = (
        "eager",
        "xloss-one-pass",
        "xloss-fused-one-pass",
    ),
    shape: str = "1024x4096x151936",
    most: Annotated[int, Parameter(validator=validators.Number(gte=128))] = 1 << 20,
    limit_gib: Annotated[float | None, Parameter(validator=validators.Number(gt=0))] = None,
    dtype: DtypeName | None = None,
    device: Device = "auto",
) -> int:
    """The largest number of tokens whose GRPO step fits in memory, to 3 %, by bisection.

    Parameters
    ----------
    providers
        What to try.
    shape
        TxHxV; its T is not used.
    most
        Tokens not to go beyond.
    limit_gib
        Memory to stay within above the inputs, GiB; needed on CPU, where running out ends the process.
    dtype
        dtype of hidden states and head; bfloat16 on CUDA, float32 on CPU.
    device
        Where to run.
    """
    try:
        where, base = resolve(device), Shape.parse(shape)
    except ValueError as error:
        _refuse(str(error))
    if limit_gib is None and where == "cpu":
        _refuse("--limit-gib is needed on CPU: without a limit the system would end the process.")
    limit = None if limit_gib is None else int(limit_gib * GIB)
    console = Console()
    case = Case("grpo", base, dtype or ("float32" if where == "cpu" else "bfloat16"), where)
    for name in providers:
        if reason := PROVIDERS[name].absent(case):
            console.print(f"{name}: absent: {reason}", style="dim", highlight=False, markup=False)
            continue
        try:
            found = search(case, name, most, limit)
        except RuntimeError as error:
            _refuse(str(error))
        peak = None if found.peak is None else found.peak.peak_bytes
        held = "" if peak is None else f", peak {peak / GIB:.2f} GiB above the inputs"
        most_said = " (the most asked for)" if found.reached else ""
        console.print(f"{name}: {found.num_tokens:,} tokens{held}{most_said}", highlight=False)
    return 0


if __name__ == "__main__":
    app()
