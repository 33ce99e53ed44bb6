"""Rows as rich tables for a terminal of 80 columns and more. A red row gets no ratio."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.losses import LOSSES
from benchmarks.results import Row

MIB = 1 << 20


def ms(value: float | None) -> str:
    """Milliseconds with about four digits."""
    return (
        "-" if value is None else f"{value:.0f}" if value >= 1000 else f"{value:.1f}" if value >= 10 else f"{value:.3f}"
    )


def ratio(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def mib(value: int | None) -> str:
    return "-" if value is None else f"{value / MIB:,.0f}"


def error(value: float | None) -> str:
    if value is None:
        return "-"
    return "0" if value == 0 else f"{value:.0e}".replace("e-0", "e-")


def worst_error(row: Row) -> float | None:
    """Of the gradients, or in nats of forward-only log-probs."""
    return row.gradient_error if row.gradient_error is not None else row.logprob_error


def name_of(row: Row) -> str:
    """The provider, or its variant as a line below it."""
    return f"  {row.variant}" if row.variant else row.title


def by_loss(rows: Iterable[Row]) -> dict[str, list[Row]]:
    """Rows of each loss, in order."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.loss, []).append(row)
    return found


def by_shape(rows: Iterable[Row]) -> dict[tuple[str, str], list[Row]]:
    """Rows of each shape and dtype, in order."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in rows:
        found.setdefault((str(row.shape), row.dtype), []).append(row)
    return found


def print_time(console: Console, rows: Sequence[Row]) -> None:
    """One table a shape, one section a loss; what is absent or red is said below it."""
    for (shape, dtype), group in by_shape(rows).items():
        for loss, some in by_loss(group).items():
            heading = f"[bold]{LOSSES[loss].title}[/], T x H x V = {shape.replace('x', ' x ')}, {dtype}"
            console.print(heading, highlight=False)
            console.print(_time_table(some))
            console.print()
    print_missing(console, rows)


def _time_table(rows: Sequence[Row]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("provider", no_wrap=True, min_width=24)
    for name in ("ms", "spread", "/GEMMs", "/eager", "/full", "MiB", "error"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        if row.state == "absent":
            continue
        name = escape(name_of(row))
        if row.state == "red":
            table.add_row(f"[bold red]{name}[/]", "[bold red]RED[/]", *["-"] * 5, error(worst_error(row)))
            continue
        assert row.median_ms is not None and row.min_ms is not None and row.max_ms is not None
        cells = [ms(row.median_ms), f"{(row.max_ms - row.min_ms) / row.median_ms:.0%}"]
        cells += [ratio(x) for x in (row.ratio_to_gemm, row.ratio_to_eager, row.ratio_to_plain)]
        cells += [mib(row.peak_extra_bytes), error(worst_error(row))]
        table.add_row(f"[bold cyan]{name}[/]" if row.ours else name, *cells)
    return table


def print_missing(console: Console, rows: Sequence[Row]) -> None:
    """Once for each provider and reason: what is absent, and for which losses where not for all; what is red."""
    found: dict[tuple[str, str, str], list[str]] = {}
    for row in rows:
        if row.state != "ok":
            found.setdefault((row.state, row.title, row.reason), []).append(f"{row.loss} {row.variant}".strip())
    for (state, title, reason), where in found.items():
        style, cases = ("bold red", f" ({', '.join(dict.fromkeys(where))})") if state == "red" else ("dim", "")
        console.print(f"{state:<7}{title}{cases}: {reason}", style=style, highlight=False, markup=False)
    if found:
        console.print()


def print_memory(console: Console, rows: Sequence[Row]) -> None:
    """Peak memory, each provider in a process of its own."""
    if not rows:
        return
    shape, dtype = str(rows[0].shape).replace("x", " x "), rows[0].dtype
    console.print(
        f"[bold]Peak memory of a GRPO step[/], T x H x V = {shape}, {dtype}, above the inputs", highlight=False
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("provider", "MiB", "eager's over it", "plan"):
        table.add_column(name, justify="left" if name in ("provider", "plan") else "right")
    base = next((r.peak_extra_bytes for r in rows if r.provider == "eager"), None)
    for row in rows:
        peak = row.peak_extra_bytes
        times = f"{base / peak:.1f}x" if base and peak else "-"
        name = f"[bold cyan]{escape(row.title)}[/]" if row.ours else escape(row.title)
        table.add_row(name, mib(peak), times, escape(row.plan or row.reason))
    console.print(table)
    console.print()


def print_largest(console: Console, rows: Sequence[Row]) -> None:
    """The largest batch that fits, by provider."""
    if not rows:
        return
    head = f"H x V = {rows[0].hidden_size} x {rows[0].vocab_size}, {rows[0].dtype}"
    console.print(f"[bold]Largest batch of a GRPO step that fits[/], {head}, to 3 %", highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)
    for name in ("provider", "tokens", "MiB", "plan"):
        table.add_column(name, justify="left" if name in ("provider", "plan") else "right")
    for row in rows:
        name = f"[bold cyan]{escape(row.title)}[/]" if row.ours else escape(row.title)
        tokens = f"{row.num_tokens:,}" if row.state == "ok" else "-"
        table.add_row(name, tokens, mib(row.peak_extra_bytes), escape(row.plan or row.reason))
    console.print(table)
    console.print()


def print_accuracy(console: Console, rows: Sequence[Row]) -> None:
    """Errors by provider and dtype: dH, dW, log-probs."""
    if not rows:
        return
    shape = str(rows[0].shape).replace("x", " x ")
    console.print(
        f"[bold]Errors against float64[/], GRPO in three chunks, T x H x V = {shape}: max |error| / max |value|"
        " of dH and dW; log-probs in nats",
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("provider", min_width=20)
    dtypes = list(dict.fromkeys(row.dtype for row in rows))
    for dtype in dtypes:
        table.add_column(f"{dtype}\n{'dH':>4} {'dW':>4} {'logp':>4}", justify="right", no_wrap=True)
    cells: dict[str, dict[str, str]] = {}
    for row in rows:
        if row.state != "absent":
            parts = (row.grad_hidden_error, row.grad_weight_error, row.logprob_error)
            text = " ".join(f"{error(x):>4}" for x in parts)
            cells.setdefault(row.title, {})[row.dtype] = f"[red]{text}[/]" if row.state == "red" else text
    for title, found in cells.items():
        table.add_row(escape(title), *(found.get(dtype, "-") for dtype in dtypes))
    console.print(table)
    console.print()


LEGEND = (
    "ms: median of the rounds; spread: (max - min) / median. /GEMMs, /eager, /full: time over the bare matrix products "
    "of the plain case, over eager, over the same provider on the plain case (medians of ratios within a round). MiB: "
    "peak above the inputs, gradients included. error: gradients against float64, or nats."
)
