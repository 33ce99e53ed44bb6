"""The picture of ``xloss demo --parallel``. Matplotlib is imported when it is drawn."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloss.cli.parallel.result import LIMIT, ParallelResult, differences, largest, name_of, reference
from xloss.cli.plots import BLUE, GREY, INK, ORANGE, QUIET, STYLE

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FLOOR = 1e-9  # where equal values are drawn on a logarithmic axis
WIDTHS = (7.0, 3.5, 1.3)  # the first run lies under the others
COLOURS = (GREY, BLUE, INK)


def draw(folder: Path, result: ParallelResult) -> dict[str, Any]:
    """Write ``parallel.png``. Returns ``{"files": names, "reason": why there are none, or None}``."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        return {"files": [], "reason": f"matplotlib is missing ({error}); pip install 'xloss[plots]'"}
    with mpl.rc_context(STYLE):
        layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.05)
        figure = Figure(figsize=(11.0, 4.4), layout=layout)
        left, right = figure.subplots(1, 2)
        _curves(left, result)
        _differences(right, result)
        figure.savefig(folder / "parallel.png")
    return {"files": ["parallel.png"], "reason": None}


def _curves(axes: Axes, result: ParallelResult) -> None:
    whole = [c for c in result.curves if not c.start]
    for i, curve in enumerate(whole):
        style = min(i, len(WIDTHS) - 1)
        label = f"{name_of(curve)}: data {curve.data_ranks} x sequence {curve.sequence_ranks}"
        steps = range(1, len(curve.values) + 1)
        axes.plot(steps, curve.values, color=COLOURS[style], linewidth=WIDTHS[style], label=label)
    for curve in result.curves:
        if curve.start and curve.saved_by != curve.processes:
            steps = range(curve.start + 1, curve.start + len(curve.values) + 1)
            mark = "o" if curve.processes < 4 else "x"
            axes.plot(steps, curve.values, mark, color=ORANGE, markersize=4.5, mfc="none", label=name_of(curve))
    at = result.job.saved_at + 0.5
    axes.axvline(at, color=QUIET, linestyle=":", linewidth=1.2)
    where: Any = {"xycoords": ("data", "axes fraction"), "xytext": (-5, 6), "textcoords": "offset points"}
    axes.annotate("checkpoint", (at, 0), ha="right", color=QUIET, **where)
    axes.set(title="Loss of each step", xlabel="training step", ylabel="loss (nats per token)")
    axes.legend(loc="upper right", fontsize=9)


def _differences(axes: Axes, result: ParallelResult) -> None:
    whole = reference(result.curves)
    colours = dict(zip([c.processes for c in result.curves if not c.start], COLOURS, strict=False))
    for curve in result.curves:
        if curve is whole:
            continue
        values = [max(value, FLOOR) for value in differences(curve, whole)]
        steps = range(curve.start + 1, curve.start + len(values) + 1)
        style: Any = {"linestyle": "none", "marker": "x", "markersize": 4} if curve.start else {}
        colour = ORANGE if curve.start else colours.get(curve.processes, INK)
        axes.plot(steps, values, color=colour, linewidth=1.6, label=name_of(curve), **style)
    axes.axhline(LIMIT, color=QUIET, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"accepted: {LIMIT:.0e}",
        (1, LIMIT),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=QUIET,
    )
    axes.set_yscale("log")
    axes.set_ylim(FLOOR / 2, LIMIT * 10)
    off = largest(list(result.curves), whole)
    axes.set(
        title=f"Difference from one process: at most {off:.0e}",
        xlabel="training step",
        ylabel=f"relative ({FLOOR:.0e}: equal, or less)",
    )
