"""``xloss info``: versions, devices, and which modes can run here."""

from __future__ import annotations

import json as json_format
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any, Literal, get_args

import torch
from cyclopts import Parameter
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from xloss import XlossError, __version__, linear_logprobs
from xloss.cli.memory import available_bytes

Mode = Literal["eager", "chunk", "fused"]


def info(*, json: Annotated[bool, Parameter(negative="")] = False) -> int:
    """Report versions, devices, and which modes can run here and why not the others.

    Parameters
    ----------
    json
        Print JSON.
    """
    report = {**environment(), "modes": modes()}
    if json:
        print(json_format.dumps(report, indent=2))
        return 0
    console = Console()
    table = Table(box=None, show_header=False, pad_edge=False)
    for key, value in report.items():
        if key != "modes":
            name, shown = key.replace("_", " "), ", ".join(value) if isinstance(value, list) else str(value)
            table.add_row(f"[bold]{name.replace('gib', '(GiB)')}[/]", shown)
    console.print(table)
    table = Table("mode", "runs", "why not", box=box.SIMPLE_HEAD, pad_edge=False)
    for mode, state in report["modes"].items():
        table.add_row(mode, "yes" if state["runs"] else "no", escape(state["reason"]))
    console.print(table)
    console.print("mode='auto' takes fused where it runs, else chunk.", highlight=False)
    return 0


def environment() -> dict[str, Any]:
    """What decides how xloss runs: versions, system, processors, devices, memory."""
    free = available_bytes("cpu")
    return {
        "xloss": __version__,
        "torch": torch.__version__,
        "triton": _version("triton"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
        "memory_free_gib": None if free is None else round(free / 2**30, 1),
        "devices": devices(),
    }


def busy_machine() -> list[str]:
    """A sentence if others keep this machine's processors busy: times measured on it say little."""
    load, processors = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if load < 0.8 * processors:  # the one-minute load still holds an install that just ended
        return []
    return [
        f"this machine is busy (load {load:.1f} on {processors} processors): the times below are not to be trusted."
    ]


def devices() -> list[str]:
    """Names of what tensors can live on."""
    names = ["cpu"]
    for i in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(i)
        names.append(f"cuda:{i} {properties.name} ({properties.total_memory / 2**30:.0f} GiB)")
    return names


def modes() -> dict[str, dict[str, Any]]:
    """Each mode tried on two tokens: whether it runs, and the engine's own words where it does not."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    hidden, weight = torch.ones(2, 16, device=device), torch.ones(16, 16, device=device)
    labels = torch.tensor([0, 15], device=device)
    found: dict[str, dict[str, Any]] = {}
    for mode in get_args(Mode):
        try:
            linear_logprobs(hidden, weight, labels, mode=mode)
            found[mode] = {"runs": True, "reason": ""}
        except (XlossError, ImportError) as error:
            found[mode] = {"runs": False, "reason": str(error)}
    return found


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed (Linux only)" if sys.platform != "linux" else "not installed"
