"""What the runs on several numbers of processes found, and whether they are one curve."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from xloss.cli.demo_verdict import Verdict
from xloss.cli.parallel.training import Curve, Job

LIMIT = 1e-4  # relative; float32 rounds otherwise for each cut of the batch, and training carries that on


@dataclass(frozen=True)
class ParallelResult:
    """Everything ``parallel.json`` holds, but the verdict and the plot."""

    environment: dict[str, Any]
    job: Job
    device: str
    text: dict[str, Any]
    curves: tuple[Curve, ...]
    seconds: dict[str, float]


def reference(curves: tuple[Curve, ...]) -> Curve:
    """The whole run on the fewest processes, one."""
    return min((c for c in curves if not c.start), key=lambda c: c.processes)


def differences(curve: Curve, whole: Curve) -> list[float]:
    """Of each step's loss from that of ``whole``, relative."""
    return [abs(a - b) / abs(b) for a, b in zip(curve.values, whole.values[curve.start :], strict=True)]


def largest(curves: list[Curve], whole: Curve) -> float:
    """Largest difference of any step of any of ``curves``; NaN stays."""
    found = [d for curve in curves for d in differences(curve, whole)]
    return math.nan if any(math.isnan(d) for d in found) else max(found, default=0.0)


def name_of(curve: Curve) -> str:
    """``4 processes``, or ``4 processes, resumed from 2``."""
    name = f"{curve.processes} process{'es' if curve.processes > 1 else ''}"
    return f"{name}, resumed from {curve.saved_by}" if curve.start else name


def judge(result: ParallelResult) -> Verdict:
    """PASS if every run has the curve of one process, and that curve falls."""
    whole = reference(result.curves)
    failures = []
    if not whole.values[-1] < whole.values[0]:  # NaN too
        failures.append(f"the loss did not fall: {whole.values[0]:.4f} -> {whole.values[-1]:.4f}")
    for curve in result.curves:
        off = largest([curve], whole)
        if not off <= LIMIT:
            failures.append(f"{name_of(curve)}: {off:.1e} away from the curve of {name_of(whole)}")
    if failures:
        return Verdict(False, "FAIL " + "; ".join(failures), tuple(failures))
    runs = [c for c in result.curves if not c.start]
    numbers = ", ".join(str(c.processes) for c in sorted(runs, key=lambda c: c.processes))
    resumed = largest([c for c in result.curves if c.start], whole)
    line = f"PASS one curve from {numbers} processes, within {largest(runs, whole):.1e}; resumed, within {resumed:.1e}"
    return Verdict(True, line, ())


def to_json(result: ParallelResult, verdict: Verdict, plots: dict[str, Any]) -> str:
    """``parallel.json``."""
    whole = reference(result.curves)
    curves = [asdict(c) | {"name": name_of(c), "difference": largest([c], whole)} for c in result.curves]
    content = asdict(result) | {"curves": curves, "limit": LIMIT, "plots": plots, "verdict": asdict(verdict)}
    return json.dumps(content, indent=2, default=str) + "\n"


def print_table(console: Console, result: ParallelResult) -> None:
    """One row a run, right at 80 columns."""
    job, whole = result.job, reference(result.curves)
    console.print(
        f"[bold]Training.[/] {job.steps} steps of {job.num_sequences} sequences of {job.length} tokens, "
        f"V={job.vocab_size:,}, H={job.hidden_size}, float32, {result.device}; the checkpoint is written after "
        f"{job.saved_at}. Difference: the largest of any step's loss from one process, relative.",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("processes", "data x seq", "resumed", "first loss", "last loss", "difference", "s"):
        table.add_column(column, justify="right", no_wrap=True)
    for c in result.curves:
        ranks, origin = f"{c.data_ranks} x {c.sequence_ranks}", str(c.saved_by) if c.start else ""
        losses = f"{c.values[0]:.5f}", f"{c.values[-1]:.5f}"
        table.add_row(str(c.processes), ranks, origin, *losses, f"{largest([c], whole):.1e}", f"{c.seconds:.1f}")
    console.print(table)
