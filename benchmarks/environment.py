"""Where a figure was measured: device, driver, threads, versions, commit, date."""

from __future__ import annotations

import datetime
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import xloss

ROOT = Path(__file__).resolve().parents[1]
PEERS = ("liger-kernel", "cut-cross-entropy", "quack-kernels", "trl")


def describe(device: str, commit: str | None = None) -> dict[str, Any]:
    """What every row of a run shares. ``commit`` is written down where git cannot be asked."""
    name = device_name(device)
    return {
        "device": name,
        "device_slug": slug(name),
        "driver": _driver(device),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "torch": torch.__version__,
        "triton": _version("triton"),
        "xloss": xloss.__version__,
        "peers": {name: found for name in PEERS if (found := _version(name)) is not None},
        "commit": commit or git_commit(),
        "date": datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
    }


def device_name(device: str) -> str:
    """``NVIDIA H200``, or the processor's model with the threads torch uses."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_name(device)
    model = platform.processor() or platform.machine()
    try:
        found = re.search(r"^model name\s*:\s*(.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
        model = found[1].strip() if found else model
    except OSError:
        pass
    count = torch.get_num_threads()
    return f"{model}, {count} thread{'s' if count != 1 else ''}"


def slug(name: str) -> str:
    """Lower case words joined by dashes: a folder's name."""
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def git_commit() -> str:
    """Short hash of HEAD, with ``-dirty`` where code differs from it; ``uncommitted`` where there is none."""
    head = _output("git", "rev-parse", "--short=10", "HEAD")
    if not head:
        return "uncommitted"
    changed = _output("git", "status", "--porcelain", "--", "xloss", "kernels", "benchmarks", ":!benchmarks/results")
    return head + ("-dirty" if changed else "")


def _driver(device: str) -> str:
    if device.startswith("cuda"):
        found = _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
        return f"{(found or 'unknown').splitlines()[0]}, CUDA {torch.version.cuda}"
    blas = re.search(r"BLAS_INFO=(\w+)", torch.__config__.show())
    return f"BLAS {blas[1] if blas else 'unknown'}, {torch.backends.cpu.get_cpu_capability()}"


def _output(*command: str) -> str | None:
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True, timeout=30)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
