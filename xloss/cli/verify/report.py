"""The table of ``xloss verify`` on the terminal, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from xloss.cli.verify.verdict import Row

MOST_NAMED = 10  # losses, above the table
MOST_TOLD = 3  # failures of a layout, on the terminal


@dataclass(frozen=True)
class Report:
    """Everything that ``--json`` prints."""

    environment: dict[str, Any]
    world: dict[str, Any]
    shape: dict[str, Any]
    losses: tuple[str, ...]
    own: str | None
    rows: tuple[Row, ...]
    seconds: dict[str, float]

    @property
    def passed(self) -> bool:
        """Whether no layout failed, and at least one ran."""
        return not self.failed and any(row.verdict == "PASS" for row in self.rows)

    @property
    def failed(self) -> list[Row]:
        """The layouts that are wrong."""
        return [row for row in self.rows if row.verdict == "FAIL"]

    @property
    def skipped(self) -> list[Row]:
        """The layouts that could not run; their ``note`` says why."""
        return [row for row in self.rows if row.verdict == "skipped"]

    @property
    def line(self) -> str:
        """What the command ends with."""
        ran = [row for row in self.rows if row not in self.skipped]
        rest = f"; {len(self.skipped)} skipped" if self.skipped else ""
        if not ran:
            return f"FAIL no layout could run{rest}"
        if self.failed:
            return f"FAIL {len(self.failed)} of {len(ran)} layouts: {', '.join(r.layout for r in self.failed)}{rest}"
        exact = min((row.allowed for row in ran if row.allowed is not None), default=None)
        figures = [row.gradient for row in ran if row.gradient is not None and row.allowed == exact]
        worst = f", gradients equal to one process's to {max(figures):.0e}" if figures else ""
        return f"PASS {_count(len(ran), 'layout')}, {_count(len(self.losses), 'loss', 'es')}{worst}{rest}"


def to_json(report: Report) -> str:
    """The whole report."""
    verdict = {"passed": report.passed, "line": report.line, "failed": [row.layout for row in report.failed]}
    return json.dumps({**asdict(report), "verdict": verdict}, indent=2) + "\n"


def print_table(console: Console, report: Report) -> None:
    """The report on the terminal, right at 80 columns."""
    world, shape = report.world, report.shape
    console.print(
        f"{_count(world['ranks'], 'process', 'es')} ({world['backend']}, {world['device']}); "
        f"{shape['tokens']} tokens, V={shape['vocab_size']}, H={shape['hidden_size']}, {shape['dtype']}. "
        f"{_named(report.losses)}."
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column, justify in (
        ("layout", "left"),
        ("ranks", "right"),
        ("losses", "left"),
        ("gradient", "right"),
        ("float64", "right"),
        ("values", "right"),
        ("verdict", "left"),
    ):
        table.add_column(column, justify=justify, no_wrap=column != "verdict")  # type: ignore[arg-type]
    for row in report.rows:
        table.add_row(*cells(row, report.losses), style=STYLES.get(row.verdict, ""))
    console.print(table)
    console.print(
        "gradient: the worst parameter's |g - g1| / |g1| against one process; float64: against float64; values: "
        "the same of loss, log-probs and metrics."
    )
    for reason in dict.fromkeys(row.note for row in report.skipped):
        names = ", ".join(row.layout for row in report.skipped if row.note == reason)
        console.print(f"Skipped: {names}: {reason}.")
    for failures, rows in _alike(report.failed):
        what = f": {rows[0].what}" if len(rows) == 1 else ""
        console.print(Text.assemble(("FAIL ", "bold red"), (", ".join(row.layout for row in rows), "bold"), what))
        for failure in _shortened(failures):
            console.print(Padding(failure, (0, 0, 0, 2)))
        if report.own and rows[0].hint:
            console.print(Padding(f"Look at: {rows[0].hint}", (0, 0, 0, 2)))
    console.print(report.line, style="bold green" if report.passed else "bold red", soft_wrap=True)


STYLES = {"FAIL": "bold red", "skipped": "dim"}


def cells(row: Row, losses: Sequence[str]) -> tuple[str, ...]:
    """Of one row of the table."""
    if row.verdict == "skipped":
        return (row.layout, "", "", "", "", "", "skipped")
    ran = (
        "all"
        if len(row.losses) == len(losses)
        else ", ".join(row.losses)
        if len(row.losses) < 3
        else str(len(row.losses))
    )
    errors = (_figure(row.gradient), _figure(row.gradient64), _figure(row.values))
    return (row.layout, str(row.ranks), ran, *errors, row.note or row.verdict)


def _named(losses: Sequence[str]) -> str:
    return f"Losses: {', '.join(losses)}" if len(losses) <= MOST_NAMED else f"{len(losses)} losses (--json names them)"


def _figure(error: float | None) -> str:
    return "-" if error is None else "0" if error == 0 else f"{error:.1e}"


def _alike(rows: Sequence[Row]) -> list[tuple[tuple[str, ...], list[Row]]]:
    """Rows that fail in the same words, together."""
    found: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        found.setdefault(row.failures, []).append(row)
    return list(found.items())


def _shortened(failures: Sequence[str]) -> list[str]:
    more = len(failures) - MOST_TOLD
    return [*failures[:MOST_TOLD], *([f"and {more} more (--json has all)"] if more > 0 else [])]


def _count(number: int, noun: str, plural: str = "s") -> str:
    return f"{number} {noun}{plural * (number != 1)}"
