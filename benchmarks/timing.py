"""Time: all providers of a shape in one process, one run each in turn; every round starts elsewhere and turns round.

A neighbour that slows the machine down slows all of them; ratios are taken within a round, so that such drift cancels.
"""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Run = Callable[[], Any]
_AHEAD_CYCLES = 2_000_000  # about 1 ms on a GPU: launches queue up behind it, so that the CPU's own time does not count


def time_once(run: Run, device: str) -> float:
    """Milliseconds of one run by CUDA events or the wall clock. What it returns is dropped after the clock stops."""
    if not device.startswith("cuda"):
        start = time.perf_counter()
        result = run()
        took = 1e3 * (time.perf_counter() - start)
        del result
        return took
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    torch.cuda._sleep(_AHEAD_CYCLES)
    begin.record()
    result = run()
    end.record()
    end.synchronize()
    del result
    return float(begin.elapsed_time(end))


def interleave(
    runs: Mapping[Key, Run],
    rounds: int,
    clock: Callable[[Run], float],
    tick: Callable[[Key], None] = lambda key: None,
) -> tuple[dict[Key, list[float]], dict[Key, Exception]]:
    """Times of every run, one a round, and what those raised that failed (they are left out from then on)."""
    order = list(runs)
    times: dict[Key, list[float]] = {key: [] for key in order}
    failed: dict[Key, Exception] = {}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(rounds):
            turn = i % max(len(order), 1)
            circle = order[turn:] + order[:turn]
            for key in reversed(circle) if i % 2 else circle:
                if key in failed:
                    continue
                try:
                    times[key].append(clock(runs[key]))
                except Exception as error:
                    failed[key] = error
                tick(key)
            gc.collect()
    finally:
        if collecting:
            gc.enable()
    return {key: found for key, found in times.items() if key not in failed}, failed


def paired_ratio(times: list[float], base: list[float]) -> float:
    """Median over rounds of ``times[i] / base[i]``."""
    return statistics.median(a / b for a, b in zip(times, base, strict=True))
