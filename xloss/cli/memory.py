"""How much memory there is, and how much one step takes at its peak."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch

MIB = 1 << 20


def available_bytes(device: str) -> int | None:
    """Bytes that can still be allocated on ``device`` without swapping, or ``None`` where the system does not say."""
    if device.startswith("cuda"):
        return int(torch.cuda.mem_get_info(device)[0])
    limits = [free for free in (_system_free(), _cgroup_free()) if free is not None]
    return min(limits, default=None)


def _system_free() -> int | None:
    with suppress(OSError, KeyError, ValueError):
        return _fields("/proc/meminfo")["MemAvailable"]
    with suppress(AttributeError, OSError, ValueError):  # macOS does not tell what is free: half of all
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    return None


def _cgroup_free() -> int | None:
    """What a container may still take (control groups, version 2 and 1)."""
    for limit, used in (
        ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
        ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
    ):
        with suppress(OSError, ValueError):  # "max" is no number: no limit
            return max(0, int(Path(limit).read_text()) - int(Path(used).read_text()))
    return None


def _fields(path: str) -> dict[str, int]:
    """Bytes by name from a file of lines ``Name:  123 kB``."""
    rows = (line.split() for line in Path(path).read_text().splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) == 3 and row[2] == "kB"}


def start_peak(device: str) -> Callable[[], int | None]:
    """Start measuring; the function returned gives the peak since now, in bytes above what is held now.

    CUDA: the allocator's own counters. Linux: the kernel's resident high-water mark, reset here, so that nothing
    before counts. Elsewhere: growth of ``ru_maxrss``, right in a fresh process only. ``None`` where there is neither.
    """
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        return lambda: int(torch.cuda.max_memory_allocated(device)) - held
    with suppress(OSError, KeyError, ValueError):
        Path("/proc/self/clear_refs").write_text("5")  # proc(5): resets VmHWM to the present size
        resident = _fields("/proc/self/status")["VmRSS"]
        return lambda: _fields("/proc/self/status")["VmHWM"] - resident
    before = _max_rss()
    return lambda: None if before is None else (_max_rss() or before) - before


def _max_rss() -> int | None:
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
