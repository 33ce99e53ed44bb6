"""Pictures of a run: time over the bare GEMMs, and peak memory. Matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.losses import LOSSES
from benchmarks.results import Row
from benchmarks.tables import by_loss, by_shape
from xloss.cli.plots import BLUE, GREY, INK, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MIB = 1 << 20
_COLUMNS = 2


def draw(path: Path, rows: Sequence[Row], device: str) -> list[Path]:
    """``<path>-time.png`` and ``<path>-memory.png``, those there are rows for. Nothing without matplotlib."""
    try:
        import matplotlib as mpl
    except ImportError:
        return []
    found = []
    with mpl.rc_context(STYLE):
        for name, make in (("time", _time), ("memory", _memory)):
            figure = make(rows, device)
            if figure is not None:
                found.append(path.with_name(f"{path.name}-{name}.png"))
                figure.savefig(found[-1], dpi=110)
    return found


def _panels(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """One panel a shape and loss, the one with the most bars first."""
    found = []
    for (shape, dtype), group in by_shape(rows).items():
        for loss, some in by_loss(group).items():
            found.append((f"{LOSSES[loss].title}, {shape.replace('x', ' x ')}, {dtype}", some))
    return sorted(found, key=lambda panel: -len(panel[1]))


def _figure(panels: Sequence[tuple[str, list[Row]]], title: str) -> tuple[Any, list[Axes]]:
    """A figure with room for every panel; bars are equally thick in all."""
    from matplotlib.figure import Figure

    columns = min(_COLUMNS, len(panels))
    lines = -(-len(panels) // columns)
    most = [max(len(p[1]) for p in panels[i * columns : (i + 1) * columns]) for i in range(lines)]
    heights = [0.75 + 0.25 * bars for bars in most]
    figure = Figure(figsize=(6.6 * columns, 0.6 + sum(heights)), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, height_ratios=heights).ravel().tolist()
    for i, ax in enumerate(axes):
        ax.set_ylim(most[i // columns] - 0.4, -0.6)
        ax.set_visible(i < len(panels))
    figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
    return figure, axes


def _time(rows: Sequence[Row], device: str) -> Any:
    timed = [
        r for r in rows if r.kind == "time" and r.state == "ok" and r.ratio_to_gemm is not None and r.provider != "gemm"
    ]
    panels = _panels(timed)
    if not panels:
        return None
    figure, axes = _figure(panels, f"Time over the bare matrix products, {device}")
    for ax, (title, some) in zip(axes, panels, strict=False):
        _bars(ax, title, some, [r.ratio_to_gemm or 0.0 for r in some], "{:.2f}")
        ax.axvline(1.0, color=INK, linestyle="--", linewidth=1)
    return figure


def _memory(rows: Sequence[Row], device: str) -> Any:
    apart = [r for r in rows if r.kind == "memory" and r.peak_extra_bytes]
    measured = apart or [r for r in rows if r.kind == "time" and r.state == "ok" and r.peak_extra_bytes]
    panels = _panels(measured)
    if not panels:
        return None
    figure, axes = _figure(panels, f"Peak memory above the inputs, MiB, {device}")
    for ax, (title, some) in zip(axes, panels, strict=False):
        _bars(ax, title, some, [(r.peak_extra_bytes or 0) / MIB for r in some], "{:,.0f}")
    return figure


def _bars(ax: Axes, title: str, rows: Sequence[Row], values: Sequence[float], form: str) -> None:
    """One bar a row. A bar far beyond the others is cut at the edge, its value said inside."""
    names = [f"{r.title}, {r.variant}" if r.variant else r.title for r in rows]
    usual = max([v for r, v in zip(rows, values, strict=True) if r.ours or r.provider == "eager"] or values)
    edge = 1.15 * min(max(values), 2.5 * usual)
    at = range(len(rows))
    bars = ax.barh(at, [min(v, edge) for v in values], height=0.74, color=[BLUE if r.ours else GREY for r in rows])
    for bar, value in zip(bars, values, strict=True):
        cut = value > edge
        ax.annotate(
            form.format(value) + (" »" if cut else ""),
            (min(value, edge), bar.get_y() + bar.get_height() / 2),
            xytext=(-3 if cut else 3, 0),
            textcoords="offset points",
            ha="right" if cut else "left",
            va="center",
            fontsize=8,
        )
    ax.set_xlim(0, edge)
    ax.set_yticks(at, names, fontsize=8)
    ax.tick_params(axis="y", length=0)
    ax.set_title(title, fontsize=10)
