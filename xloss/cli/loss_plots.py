"""The picture of ``xloss losses show --plot``. Matplotlib is imported when it is drawn."""

from __future__ import annotations

from pathlib import Path
from textwrap import fill

from xloss.cli.errors import CannotRun
from xloss.cli.plots import BLUE, GREY, ORANGE, QUIET, STYLE
from xloss.losses.curves import Curve


def draw(folder: Path, name: str, formula: str, curve: Curve) -> Path:
    """Write ``NAME.png``, a slash in the name as a dash: the loss, and under it its gradient. Returns the file."""
    try:
        import matplotlib as mpl
        from matplotlib.figure import Figure
    except ImportError as error:
        raise CannotRun(f"--plot needs matplotlib ({error}); pip install 'xloss[plots]'") from error
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CannotRun(f"--out {folder}: {error.strerror}. Give a folder that can be written.") from error
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(7.0, 6.4), layout="constrained")
        panels = figure.subplots(2, 1, sharex=True)
        for axes, lines in zip(panels, (curve.losses, curve.grads), strict=True):
            axes.axhline(0, color=GREY, linewidth=0.8)
            if curve.mark is not None:
                axes.axvline(curve.mark, color=GREY, linewidth=0.8, linestyle="--")
            for (label, y), colour in zip(lines, (BLUE, ORANGE), strict=False):
                axes.plot(curve.x.tolist(), y.tolist(), color=colour, linewidth=2, label=label)
            if len(lines) > 1:
                axes.legend()
        figure.suptitle(name, x=0.01, ha="left", fontsize=14, fontweight="bold")
        panels[0].set_title(formula, fontsize=9, fontweight="normal", wrap=True)
        panels[0].set(ylabel="loss")
        panels[1].set(xlabel=curve.x_label, ylabel=curve.grad_label)
        figure.supxlabel(fill(curve.setting, 100), x=0.01, ha="left", fontsize=8, color=QUIET)
        path = folder / f"{name.replace('/', '-')}.png"
        figure.savefig(path)
    return path
