"""Time: all providers of a shape in one process, one run each in turn; every round starts elsewhere and turns round.

A neighbour that slows the machine down slows all of them; ratios are taken within a round, so that such drift cancels.
"""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

Key = TypeVar("Key", bound=Hashable)
Run = Callable[[], Any]
_AHEAD_CYCLES = 2_000_000  # about 1 ms on a GPU: launches queue up behind it, so that the CPU's own time does not count

OUT_OF_TIME = "no time was left for it (--minutes)"
LEAST_ROUNDS = 3  # a median of fewer says little


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


@dataclass(frozen=True)
class Deadline:
    """A time to be done by, in seconds of the wall clock; infinite where there is none."""

    end: float = math.inf

    @classmethod
    def after(cls, seconds: float | None) -> Deadline:
        return cls(math.inf if seconds is None else time.perf_counter() + seconds)

    @property
    def left(self) -> float:
        """Seconds."""
        return self.end - time.perf_counter()

    def share(self, part: float) -> Deadline:
        """A deadline after ``part`` (0 to 1) of what is left."""
        return Deadline(self.end if math.isinf(self.end) else time.perf_counter() + part * max(self.left, 0.0))


def fit_rounds(seconds: Mapping[Key, float], most: int, left: float) -> dict[Key, int]:
    """Rounds of each run, ``seconds`` long each, so that all end in ``left`` seconds: ``most`` where that fits.

    Else those that take longest in all get fewer, down to ``LEAST_ROUNDS``; then the slowest get none.
    """
    rounds = dict.fromkeys(seconds, most)

    def cost(key: Key) -> float:
        return rounds[key] * seconds[key]

    total = sum(map(cost, rounds))
    while total > left and any(rounds.values()):
        many = [key for key in rounds if rounds[key] > LEAST_ROUNDS]
        key = max(many, key=cost) if many else max((k for k in rounds if rounds[k]), key=lambda k: seconds[k])
        fewer = 1 if many else rounds[key]
        rounds[key] -= fewer
        total -= fewer * seconds[key]
    return rounds


def interleave(
    runs: Mapping[Key, Run],
    rounds: int | Mapping[Key, int],
    clock: Callable[[Run], float],
    tick: Callable[[Key], None] = lambda key: None,
) -> tuple[dict[Key, list[float]], dict[Key, Exception]]:
    """Times of every run, one a round, and what those raised that failed (they are left out from then on).

    ``rounds`` of its own for each run: it takes part in the first so many.
    """
    of_each = dict.fromkeys(runs, rounds) if isinstance(rounds, int) else rounds
    order = list(runs)
    times: dict[Key, list[float]] = {key: [] for key in order}
    failed: dict[Key, Exception] = {}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        for i in range(max(of_each.values(), default=0)):
            turn = i % max(len(order), 1)
            circle = order[turn:] + order[:turn]
            for key in reversed(circle) if i % 2 else circle:
                if key in failed or i >= of_each[key]:
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
    """Median of ``times[i] / base[i]`` over the rounds both took part in."""
    return statistics.median(a / b for a, b in zip(times, base, strict=False))
