"""Peak memory: of a run in this process, or of one in a process of its own; and the largest T that still fits.

Bytes are those held at the peak above what was held before the step: the inputs do not count, the gradients do.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import NUM_SEQUENCES, Case, Shape, make_batch, vary
from benchmarks.environment import ROOT
from benchmarks.providers import PROVIDERS
from benchmarks.providers.base import Result, Step, first_line
from xloss.cli.memory import start_peak

_WARM_SHAPE = Shape(64, 32, 512)
_TIMEOUT_S = 600.0


def settle(device: str) -> None:
    """Give freed memory back, so that the next peak starts from what is really held."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()
        return
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)  # glibc keeps small freed blocks


def peak_of(run: Step, device: str) -> tuple[Result, int | None]:
    """A run's result and its peak in bytes above what was held before; ``None`` where the system does not tell."""
    settle(device)
    peak = start_peak(device)
    result = run()
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)
    return result, peak()


@dataclass(frozen=True)
class Job:
    """A step to be measured apart. ``limit_bytes`` bounds what may be allocated above what is held before the step."""

    case: Case
    provider: str
    threads: int
    light: bool = True
    limit_bytes: int | None = None


@dataclass(frozen=True)
class Peak:
    """What came of it: ``peak_bytes``, or the ``reason`` there is none; ``out_of_memory`` if that was it."""

    peak_bytes: int | None
    plan: str = ""
    reason: str = ""
    out_of_memory: bool = False


def measure_apart(job: Job) -> Peak:
    """Run a step in a fresh process, so that nothing else's memory is counted and nothing of it stays."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "benchmarks.memory"],
            input=json.dumps(asdict(job)),
            capture_output=True,
            text=True,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": path},
            timeout=_TIMEOUT_S,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return Peak(None, reason=f"no result within {_TIMEOUT_S:.0f} s")
    if done.returncode == 0:
        return Peak(**json.loads(done.stdout.splitlines()[-1]))
    killed = done.returncode < 0  # a signal: the kernel's out-of-memory killer, most likely
    last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return Peak(None, reason=f"signal {-done.returncode}" if killed else last[:160], out_of_memory=killed)


def measure_here(job: Job) -> Peak:
    """The same in this process."""
    torch.set_num_threads(job.threads)
    provider, case = PROVIDERS[job.provider], job.case
    if reason := provider.absent(case):
        return Peak(None, reason=reason)
    small = replace(case, shape=_WARM_SHAPE, chunk_size=None, logits_budget=None)
    try:
        provider.prepare(small, vary(make_batch(small), small)).run()  # libraries and their buffers are in place now
        ready = provider.prepare(case, vary(make_batch(case, light=job.light), case))
        settle(case.device)
        with _limited(case.device, job.limit_bytes):
            return Peak(peak_of(ready.run, case.device)[1], ready.plan)
    except Exception as error:
        return Peak(None, reason=f"{type(error).__name__}: {first_line(error)}", out_of_memory=is_out_of_memory(error))


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error says that memory ran out: torch says it in several ways."""
    text = str(error).lower()
    known = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return known or "can't allocate memory" in text or "out of memory" in text


class _limited:
    """While the block runs, only ``limit`` more bytes can be allocated on ``device``."""

    def __init__(self, device: str, limit: int | None) -> None:
        self.device, self.limit = device, limit

    def __enter__(self) -> None:
        if self.limit is None:
            return
        if self.device.startswith("cuda"):
            total = torch.cuda.get_device_properties(self.device).total_memory
            held = torch.cuda.memory_reserved(self.device)
            torch.cuda.set_per_process_memory_fraction(min(1.0, (held + self.limit) / total), self.device)
            return
        import resource

        pages = int(Path("/proc/self/statm").read_text().split()[0])
        self._before = resource.getrlimit(resource.RLIMIT_AS)
        resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + self.limit, self._before[1]))

    def __exit__(self, *_: object) -> None:
        if self.limit is None:
            return
        if self.device.startswith("cuda"):
            torch.cuda.set_per_process_memory_fraction(1.0, self.device)
            return
        import resource

        resource.setrlimit(resource.RLIMIT_AS, self._before)


def largest(fits: Callable[[int], bool], most: int, step: int = NUM_SEQUENCES * 16) -> int:
    """Largest multiple of ``step`` up to ``most`` for which ``fits`` holds, by doubling and bisection; 0 if none does.

    ``fits`` is taken to be true up to some size and false beyond.
    """
    top = most // step
    low, high = 0, 1
    while high <= top and fits(high * step):
        low, high = high, 2 * high
    high = min(high, top + 1)
    while high - low > max(1, low // 32):  # to 3 %
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle * step) else (low, middle)
    return low * step


def _job(data: dict[str, Any]) -> Job:
    case = data.pop("case")
    return Job(Case(**{**case, "shape": Shape(**case["shape"])}), **data)


if __name__ == "__main__":
    print(json.dumps(asdict(measure_here(_job(json.loads(sys.stdin.read()))))))
