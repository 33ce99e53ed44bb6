"""The most tokens whose GRPO step fits in memory, by bisection."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.cases import NUM_SEQUENCES, Case
from benchmarks.memory import Job, Peak, largest, measure_apart, measure_here
from benchmarks.providers import PROVIDERS
from benchmarks.results import Row, row_of
from benchmarks.suite import Suite
from benchmarks.timing import OUT_OF_TIME, Deadline

SMALLEST = NUM_SEQUENCES * 16  # tokens: the step of the bisection
_ENOUGH_S = 30.0  # a provider's bisection takes seconds; without so many it is not begun


@dataclass(frozen=True)
class Search:
    """Tokens that fit (0: none), and the largest step that was run among those. ``reached``: all that was asked for."""

    num_tokens: int
    peak: Peak | None
    reached: bool


def search(case: Case, name: str, most: int, limit_bytes: int | None = None) -> Search:
    """To 3 %. Raises ``RuntimeError`` where a step fails for another reason than memory."""
    done: dict[int, Peak] = {}

    def fits(tokens: int) -> bool:
        sized = replace(case, shape=replace(case.shape, num_tokens=tokens))
        job = Job(sized, name, torch.get_num_threads(), limit_bytes=limit_bytes)
        peak = measure_apart(job) if case.device == "cpu" else measure_here(job)
        if peak.peak_bytes is None and not peak.out_of_memory:
            raise RuntimeError(f"{name} at {tokens} tokens: {peak.reason}")
        done[tokens] = peak
        return peak.peak_bytes is not None

    found = largest(fits, most - most % NUM_SEQUENCES, SMALLEST)
    return Search(found, done.get(found), found + SMALLEST > most)


def run_largest(suite: Suite, device: str, tick: Callable[[str], None], deadline: Deadline) -> list[Row]:
    """A row for each provider; ``num_tokens`` is what fits."""
    assert suite.largest is not None
    shape, most, names = suite.largest
    rows = []
    for name in names:
        tick(name)
        provider, case = PROVIDERS[name], Case("grpo", shape, suite.groups[0].dtype, device)
        state, reason = "absent", provider.absent(case) or (OUT_OF_TIME if deadline.left < _ENOUGH_S else None)
        found = None
        try:
            found = None if reason else search(case, name, most)
        except RuntimeError as error:
            state, reason = "red", str(error)
        if found is not None and found.peak is not None:
            sized = replace(case, shape=replace(shape, num_tokens=found.num_tokens))
            plan = "all that was tried" if found.reached else found.peak.plan
            values = {"plan": plan, "peak_extra_bytes": found.peak.peak_bytes}
        else:
            sized, values = case, {"state": state, "reason": reason or f"{SMALLEST} tokens do not fit"}
        rows.append(row_of("largest", sized, name, provider.title, provider.ours, **values))
    return rows
