"""The demo's pictures. Matplotlib is imported here and only here, when a picture is drawn."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xloss.cli.calibration import Cut
from xloss.cli.demo_steps import Step
from xloss.cli.demo_verdict import DemoResult, memory_ratio, pairs, speedup
from xloss.cli.tiny_lm import Training

if TYPE_CHECKING:
    from matplotlib.axes import Axes

GREY, BLUE, ORANGE, INK, QUIET = "#aab2bd", "#2563eb", "#e8833a", "#1f2937", "#6b7280"
STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 12,
    "axes.edgecolor": "#9ca3af",
    "axes.labelcolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "legend.frameon": False,
    "savefig.dpi": 150,
    "figure.facecolor": "white",
}


def draw(folder: Path, result: DemoResult) -> dict[str, Any]:
    """Write the PNG files. Returns ``{"files": names, "reason": why there are none, or None}``."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
        from matplotlib.layout_engine import ConstrainedLayoutEngine
    except ImportError as error:
        return {"files": [], "reason": f"matplotlib is missing ({error}); pip install 'xloss[plots]'"}
    panels: list[Callable[[Axes], None]] = [
        lambda axes: _loss(axes, result.training),
        lambda axes: _memory(axes, result.steps),
        lambda axes: _time(axes, result.steps),
        lambda axes: _calibration(axes, result.calibration),
    ]
    pictures = {  # name: size in inches, rows x columns, panels
        "summary.png": ((11.0, 8.0), (2, 2), panels),
        "loss.png": ((7.0, 4.2), (1, 1), panels[:1]),
        "memory_time.png": ((10.0, 4.2), (1, 2), panels[1:3]),
        "calibration.png": ((7.0, 4.2), (1, 1), panels[3:]),
    }
    with mpl.rc_context(STYLE):
        for name, (size, shape, parts) in pictures.items():
            top = 0.9 if name == "summary.png" else 1.0
            layout = ConstrainedLayoutEngine(w_pad=0.12, h_pad=0.12, wspace=0.04, hspace=0.06, rect=(0, 0, 1, top))
            figure = Figure(figsize=size, layout=layout)
            for axes, panel in zip(figure.subplots(*shape, squeeze=False).flat, parts, strict=True):
                panel(axes)
            if top < 1:
                title, subtitle = _headline(result)
                figure.text(0.012, 0.975, title, va="top", fontsize=15, fontweight="bold")
                figure.text(0.012, 0.935, subtitle, va="top", fontsize=10.5, color=QUIET)
            figure.savefig(folder / name)
    return {"files": list(pictures), "reason": None}


def _headline(result: DemoResult) -> tuple[str, str]:
    ratio = memory_ratio(result.steps)
    memory = "" if ratio is None else f"{ratio:.0f}x less memory, "
    worst = max(ours.grad_error for _, ours in pairs(result.steps))
    sizes = result.sizes
    return (
        f"xloss: {memory}{speedup(result.steps):.1f}x the speed, the same gradients",
        f"Policy steps: {sizes.tokens:,} tokens, vocabulary {sizes.vocab_size:,}, hidden size {sizes.hidden_size}, "
        f"float32, {sizes.device}. Gradients within {worst:.0e} of float64.",
    )


def _loss(axes: Axes, training: Training) -> None:
    steps = range(1, training.num_steps + 1)
    axes.axhline(training.uniform, color=GREY, linestyle="--", linewidth=1.2)
    axes.annotate(
        f"knowing nothing: log V = {training.uniform:.2f}",
        (1, training.uniform),
        xycoords=("axes fraction", "data"),
        xytext=(0, 4),
        textcoords="offset points",
        ha="right",
        color=QUIET,
    )
    axes.plot(steps, training.curve, color=BLUE, linewidth=1.2, alpha=0.35, label="training batch")
    axes.plot(steps, _running_mean(training.curve), color=BLUE, linewidth=2.4, label="mean of the last 5")
    ends = ((0, training.held_out_before), (training.num_steps, training.held_out_after))
    axes.plot([x for x, _ in ends], [y for _, y in ends], "o", color=INK, markersize=5.5, label="unseen text")
    axes.annotate(
        f"{training.held_out_after:.2f}", ends[1], xytext=(8, 0), textcoords="offset points", va="center", weight="bold"
    )
    axes.set_xlim(-0.03 * training.num_steps, 1.12 * training.num_steps)
    axes.set(title="Cross-entropy of the tiny model", xlabel="training step", ylabel="loss (nats per token)")
    axes.set_ylim(0, training.uniform * 1.12)
    axes.legend(loc="lower left")


def _running_mean(values: tuple[float, ...], width: int = 5) -> list[float]:
    recent = [values[max(0, i + 1 - width) : i + 1] for i in range(len(values))]
    return [sum(part) / len(part) for part in recent]


def _memory(axes: Axes, steps: tuple[Step, ...]) -> None:
    ratio = memory_ratio(steps)
    title = "Peak memory of one policy step" + ("" if ratio is None else f": {ratio:.0f}x less")
    values = [(eager.peak_mib, ours.peak_mib) for eager, ours in pairs(steps)]
    if ratio is None:
        axes.text(0.5, 0.5, "not measured on this system", ha="center", transform=axes.transAxes)
    _bars(axes, [s.loss_name for s, _ in pairs(steps)], [(a or 0, b or 0) for a, b in values], "{:,.0f}")
    axes.set(title=title, ylabel="MiB above the inputs")


def _time(axes: Axes, steps: tuple[Step, ...]) -> None:
    values = [(eager.time_ms / 1e3, ours.time_ms / 1e3) for eager, ours in pairs(steps)]
    _bars(axes, [s.loss_name for s, _ in pairs(steps)], values, "{:.2f}")
    axes.set(title=f"Time of one policy step: {speedup(steps):.1f}x the speed", ylabel="seconds, forward + backward")


def _calibration(axes: Axes, cuts: tuple[Cut, ...]) -> None:
    values = [(100 * cut.naive_grad_drift, 100 * cut.xloss_grad_drift) for cut in cuts]
    _bars(
        axes, [cut.name for cut in cuts], values, "{:.1f} %", names=("mean of means", "xloss"), colours=(ORANGE, BLUE)
    )
    axes.set(
        title="The same batch, cut differently",
        xlabel="micro-batches x sequences",
        ylabel="gradient, difference from uncut (%)",
    )


def _bars(
    axes: Axes,
    groups: list[str],
    values: list[tuple[float, float]],
    form: str,
    names: tuple[str, str] = ("eager", "xloss"),
    colours: tuple[str, str] = (GREY, BLUE),
) -> None:
    """Two bars a group, the value over each."""
    for side in (0, 1):
        at = [i + (side - 0.5) * 0.38 for i in range(len(groups))]
        heights = [pair[side] for pair in values]
        bars = axes.bar(at, heights, width=0.34, color=colours[side], label=names[side])
        axes.bar_label(bars, [form.format(height) for height in heights], padding=3, fontsize=9)
    axes.set_xticks(range(len(groups)), groups)
    axes.tick_params(axis="x", length=0)
    axes.yaxis.set_major_formatter(lambda value, _: f"{value:,.4g}" if value < 1000 else f"{value:,.0f}")
    axes.set_ylim(0, 1.25 * max((max(pair) for pair in values), default=1) or 1)
    axes.legend(loc="upper right", ncols=2)
