"""``xloss losses``: what xloss can compute, under the names the field knows."""

from __future__ import annotations

import json as json_format
import os
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from rich import box
from rich.console import Console
from rich.table import Table

from xloss.cli import loss_plots
from xloss.cli.errors import CannotRun
from xloss.cli.options import Flag
from xloss.errors import XlossError, unknown_name
from xloss.losses.catalog import SYMBOLS, LossEntry, catalog, entry_at, entry_of
from xloss.losses.curves import Curve, at_shown
from xloss.losses.presets import Preset, presets

FamilyName = Literal["supervised", "policy", "preference", "distillation", "value"]
losses = App(name="losses", help="List all losses and presets, or show one: formula, parameters, source, plan, curve.")


@dataclass(frozen=True)
class Shown:
    """A name and what stands behind it: a loss, drawn with the numbers of the preset if it is one."""

    name: str
    entry: LossEntry
    preset: Preset | None = None

    def as_dict(self) -> dict[str, Any]:
        """What ``--json`` prints."""
        found = {key: value for key, value in vars(self.entry).items() if key not in ("parameters", "curve")}
        found["parameters"] = [asdict(parameter) for parameter in self.entry.parameters]
        return found | {"preset": None if self.preset is None else _preset_dict(self.preset)}


@losses.default
def list_all(
    *words: Annotated[str, Parameter(show=False)],
    family: FamilyName | None = None,
    framework: str | None = None,
    json: Flag = False,
) -> int:
    """List every loss and every preset.

    Parameters
    ----------
    family
        Only losses and presets of this family.
    framework
        Only the presets of this framework: trl, verl, nemo, tinker, xtuner, ...
    json
        Print JSON.
    """
    if words:
        raise CannotRun(unknown_name("command of xloss losses", words[0], ["show"]) + " Of one loss: show NAME.")
    entries = [e for e in catalog().values() if framework is None and family in (None, e.family)]
    named = [(preset, entry_of(preset.example())) for preset in presets().values()]
    frameworks = sorted({preset.framework for preset, _ in named} - {""})
    if framework is not None and framework not in frameworks:
        raise CannotRun(unknown_name("--framework", framework, frameworks))
    named = [(p, e) for p, e in named if framework in (None, p.framework) and family in (None, e.family)]
    if json:
        shown = [_preset_dict(preset) | {"loss": entry.name, "family": entry.family} for preset, entry in named]
        found = {"losses": [Shown(e.name, e).as_dict() for e in entries], "presets": shown}
        sys.stdout.write(json_format.dumps(found, indent=2) + "\n")
        return 0
    console = Console(highlight=False, markup=False)
    width = max((len(e.name) for e in entries), default=0)
    for group in dict.fromkeys(e.family for e in entries):
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, expand=True)
        table.add_column(group, no_wrap=True, min_width=width)
        table.add_column("plan", no_wrap=True)
        table.add_column("what it is", ratio=1)
        for e in entries:
            if e.family == group:
                table.add_row(e.name, e.plan.split(":")[0], e.summary)
        console.print(table)
    if family is None and framework is None:
        _print_names(console, [preset for preset, _ in named])
    elif named:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("preset", no_wrap=True)
        table.add_column("loss")
        table.add_column("what it is; what it stands for", overflow="fold")
        for preset, entry in named:
            table.add_row(preset.name, entry.name, f"{preset.summary}; {preset.source}")
        console.print(table)
    console.print("xloss losses show NAME prints one; --plot draws it.")
    return 0


@losses.command
def show(
    name: str,
    /,
    *,
    plot: Flag = False,
    out: Path = Path("xloss-losses"),
    json: Flag = False,
) -> int:
    """Print formula, parameters, source and plan of a loss or preset, and its loss and gradient at some points.

    Parameters
    ----------
    name
        A loss or preset that `xloss losses` lists, or the dotted import path of a loss of your own.
    plot
        Draw the loss and its gradient: of a policy loss against the ratio, for advantages +1 and -1.
    out
        Folder for the picture.
    json
        Print JSON.
    """
    shown = _find(name)
    curve = shown.entry.curve()
    picture = loss_plots.draw(out, name, shown.entry.formula, curve) if plot and isinstance(curve, Curve) else None
    if json:
        drawn = {"no_curve": curve} if isinstance(curve, str) else {"curve": _curve_dict(at_shown(curve))}
        found = shown.as_dict() | drawn | {"picture": None if picture is None else str(picture)}
        sys.stdout.write(json_format.dumps(found, indent=2) + "\n")
        return 0
    console = Console(highlight=False, markup=False)
    _print_facts(console, shown)
    if isinstance(curve, str):
        console.print(f"No curve: {curve}.")
    else:
        _print_curve(console, at_shown(curve))
    if picture is not None:
        console.print(f"Written to {picture}")
    return 0


def _find(name: str) -> Shown:
    known, named = catalog(), presets()
    if name in named:
        return Shown(name, entry_of(named[name].example()), named[name])
    if name in known:
        return Shown(name, known[name])
    if "." not in name:
        raise CannotRun(unknown_name("loss or preset", name, [*known, *named], "xloss losses"))
    sys.path.insert(0, os.getcwd())  # as `python -m` does
    try:
        return Shown(name, entry_at(name))
    except XlossError as error:
        raise CannotRun(str(error)) from error
    finally:
        sys.path.remove(os.getcwd())


def _print_names(console: Console, named: list[Preset]) -> None:
    table = Table("presets", "", box=box.SIMPLE_HEAD, pad_edge=False)
    for framework in dict.fromkeys(preset.framework for preset in named):
        names = [preset.name for preset in named if preset.framework == framework]
        table.add_row(framework or "methods", ", ".join(names))
    console.print(table)


def _print_facts(console: Console, shown: Shown) -> None:
    entry, preset = shown.entry, shown.preset
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    table.add_row("name", shown.name)
    if preset is not None:
        table.add_row("preset", f"{preset.summary}; {preset.source}")
    table.add_row("loss", f"{entry.name} ({entry.family}): {entry.summary}")
    table.add_row("formula", entry.formula or "not given: state it in the class variable `formula`")
    table.add_row("where", SYMBOLS[entry.family])
    table.add_row("source", entry.source or "not given: state it in the class variable `source`")
    table.add_row("plan", entry.plan)
    table.add_row("use", entry.use if preset is None else _call(preset))
    users = [p.name for p in presets().values() if p is not preset and entry_of(p.example()).name == entry.name]
    if users:
        table.add_row("presets", ", ".join(users))
    console.print(table)
    if preset is not None and (preset.fields or preset.required):
        settings = Table("set by the preset", "value", box=box.SIMPLE_HEAD, pad_edge=False)
        for name, value in _flat(preset.fields):
            settings.add_row(name, repr(value))
        for name in preset.required:
            settings.add_row(name, "required")
        console.print(settings)
    if entry.parameters:
        parameters = Table("parameter", "default", "accepts", box=box.SIMPLE_HEAD, pad_edge=False)
        for parameter in entry.parameters:
            parameters.add_row(parameter.name, parameter.default, parameter.accepts)
        console.print(parameters)


def _print_curve(console: Console, curve: Curve) -> None:
    table = Table(curve.x_label, box=box.SIMPLE_HEAD, pad_edge=False)
    columns = [*_named("loss", curve.losses), *_named("gradient", curve.grads)]
    for label, _ in columns:
        table.add_column(label, justify="right")
    for i, x in enumerate(curve.x.tolist()):
        table.add_row(f"{x:.5g}", *(_number(float(y[i])) for _, y in columns))
    console.print(table)
    console.print(f"gradient: {curve.grad_label}; {curve.setting}".removesuffix("; "))


def _number(y: float) -> str:
    return "0" if abs(y) < 1e-12 else f"{y:.4g}"


def _named(kind: str, lines: Any) -> list[tuple[str, Any]]:
    return [(kind if len(lines) == 1 else f"{kind}, {label}", y) for label, y in lines]


def _curve_dict(curve: Curve) -> dict[str, Any]:
    return {
        "x_label": curve.x_label,
        "grad_label": curve.grad_label,
        "setting": curve.setting,
        "x": curve.x.tolist(),
        "losses": {label: y.tolist() for label, y in curve.losses},
        "grads": {label: y.tolist() for label, y in curve.grads},
    }


def _call(preset: Preset) -> str:
    return f"preset({', '.join([repr(preset.name), *(f'{name}=...' for name in preset.required)])})"


def _flat(fields: Any, prefix: str = "") -> list[tuple[str, Any]]:
    rows: list[tuple[str, Any]] = []
    for name, value in fields.items():
        rows += _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else [(prefix + name, value)]
    return rows


def _preset_dict(preset: Preset) -> dict[str, Any]:
    return {
        "name": preset.name,
        "config": preset.config.__name__,
        "fields": dict(preset.fields),
        "required": list(preset.required),
        "summary": preset.summary,
        "source": preset.source,
    }
