"""Runs a suite: gate, then warm-up with peak memory and a check of some rows at full size, then interleaved rounds."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from benchmarks.accuracy import Errors, Verdict, error_table, gate, judge, reference, slice_errors
from benchmarks.cases import Batch, Case, Shape, make_batch, vary
from benchmarks.memory import Job, is_out_of_memory, measure_apart, peak_of
from benchmarks.providers import PROVIDERS
from benchmarks.providers.base import Prepared, first_line
from benchmarks.results import Row, row_of, time_columns
from benchmarks.suite import Group, Suite, device_type
from benchmarks.timing import OUT_OF_TIME, Deadline, fit_rounds, interleave, paired_ratio, time_once

Tick = Callable[[str], None]
_YARDSTICKS = ("gemm", "eager")  # warmed up first, with xloss: rows without them say nothing
_WARM_SHARE = 0.6  # of a shape's time, at most, to compile and warm up; the rest is for rounds
_WARM_S = {"cpu": 0.0, "cuda": 0.3}  # of running a provider before it is timed, its first run not counted


@dataclass
class Entry:
    """One row on its way: a case and a provider, and what is known about them so far."""

    case: Case
    name: str
    verdict: Verdict = field(default_factory=lambda: Verdict("ok"))
    ready: Prepared | None = None
    peak_bytes: int | None = None
    seconds: float = 0.0  # of one step, roughly
    times: list[float] = field(default_factory=list)

    @property
    def key(self) -> tuple[Case, str]:
        return self.case, self.name

    @property
    def runs(self) -> bool:
        return self.verdict.state == "ok"

    def fail(self, error: Exception) -> None:
        """Out of the race, with the reason. A peer that is not there, or whose step does not fit, is not wrong."""
        too_large = is_out_of_memory(error)
        reason = "out of memory" if too_large else f"{type(error).__name__}: {first_line(error)}"
        excused = isinstance(error, ImportError) or (too_large and not PROVIDERS[self.name].ours)
        self.ready = None
        self.verdict = Verdict("absent" if excused else "red", self.verdict.errors, reason)

    def leave_out(self, reason: str) -> None:
        """Absent, with the reason."""
        self.ready = None
        self.verdict = Verdict("absent", self.verdict.errors, reason)


def run_group(
    group: Group,
    gate_shape: Shape,
    device: str,
    tick: Tick,
    *,
    asked_for: bool = False,
    deadline: Deadline = Deadline(),  # noqa: B008 (frozen)
    part: float = 1.0,
) -> list[Row]:
    """All rows of one shape, in ``part`` of the time that is left after the gates.

    Where that is short slow runs get fewer rounds, and those that none is left for are absent.
    """
    gc.collect()
    gc.freeze()  # what was there before need not be looked through between runs
    try:
        return _run_group(group, gate_shape, device, tick, asked_for, (deadline, part))
    finally:
        gc.unfreeze()


def _run_group(
    group: Group, gate_shape: Shape, device: str, tick: Tick, asked_for: bool, time_left: tuple[Deadline, float]
) -> list[Row]:
    entries = [Entry(case, name) for case, name in group.entries(device, asked_for=asked_for)]
    _gate(entries, gate_shape, group.dtype, tick)
    base = make_batch(Case("grpo", group.shape, group.dtype, device))
    deadline = time_left[0].share(time_left[1])
    prepared_by = deadline.share(_WARM_SHARE)
    for entry in sorted(_once_per_floor(entries), key=lambda e: not (PROVIDERS[e.name].ours or e.name in _YARDSTICKS)):
        if entry.runs and prepared_by.left <= 0:
            entry.leave_out(OUT_OF_TIME)
        _warm_up(entry, vary(base, entry.case), tick)
    ready = {e.key: e for e in entries if e.ready is not None}
    rounds = fit_rounds({key: e.seconds for key, e in ready.items()}, group.rounds, deadline.left)
    for key in [key for key, count in rounds.items() if not count]:
        ready.pop(key).leave_out(OUT_OF_TIME)
    runs = {key: e.ready.run for key, e in ready.items() if e.ready is not None}
    clock = partial(time_once, device=device)
    times, failed = interleave(runs, rounds, clock, lambda key: tick(f"{key[0].loss_name} {key[1]}"))
    for entry in entries:
        entry.times = times.get(entry.key, [])
        if entry.key in failed:
            entry.fail(failed[entry.key])
    return _rows(entries)


def num_ticks(group: Group, device: str, *, asked_for: bool = False) -> int:
    """At most how often ``run_group`` ticks: once for each gate, each warm-up and each timed run."""
    return len(group.entries(device, asked_for=asked_for)) * (2 + group.rounds)


def _once_per_floor(entries: list[Entry]) -> list[Entry]:
    """Entries to be run: the bare GEMMs are the same for every loss of a kind, so the first one stands for them."""
    kinds, found = set(), []
    for entry in entries:
        if entry.name == "gemm":
            if entry.case.loss.forward_only in kinds:
                continue
            kinds.add(entry.case.loss.forward_only)
        found.append(entry)
    return found


def _gate(entries: list[Entry], shape: Shape, dtype: str, tick: Tick) -> None:
    """Every provider against float64 on a small shape, in three chunks where it lets us choose."""
    cached: dict[Case, tuple[Batch, Any]] = {}
    for entry in entries:
        if entry.name == "gemm":
            continue
        small = replace(entry.case, shape=shape, chunk_size=shape.num_tokens // 3 + 1, logits_budget=None)
        if small not in cached:
            batch = vary(make_batch(replace(small, dtype=dtype), hard=True), small)
            cached[small] = batch, reference(small, batch)
        entry.verdict = gate(PROVIDERS[entry.name], small, *cached[small])
        tick(f"gate: {entry.case.loss_name} {entry.name}")


def _warm_up(entry: Entry, batch: Batch, tick: Tick) -> None:
    """The first run at full size: peak memory, and some rows of the result against float64."""
    if not entry.runs:
        return
    case, is_floor = entry.case, entry.name == "gemm"
    tick(f"warm-up: {case.loss_name} {entry.name}")
    try:
        entry.ready = PROVIDERS[entry.name].prepare(case, batch)
        if device_type(case.device) == "cuda":
            entry.ready.run()  # compiling and tuning are not what a step takes
        began = time.perf_counter()
        result, peak = peak_of(entry.ready.run, case.device)
        entry.seconds = time.perf_counter() - began
        if not is_floor:
            entry.peak_bytes = peak
            found = judge(slice_errors(case, batch, result), case)
            entry.verdict = replace(found, errors=_worst(entry.verdict.errors, found.errors))
            entry.ready = entry.ready if found.state == "ok" else None
        del result
        began, runs = time.perf_counter(), 0
        while entry.ready is not None and time.perf_counter() - began < _WARM_S[device_type(case.device)]:
            entry.ready.run()
            torch.cuda.synchronize(case.device)
            runs += 1
            entry.seconds = (time.perf_counter() - began) / runs
    except Exception as error:
        entry.fail(error)


def _worst(a: Errors, b: Errors) -> Errors:
    """The larger of each error."""

    def pick(x: float | None, y: float | None) -> float | None:
        return max((v for v in (x, y) if v is not None), default=None)

    names = ("d_hidden", "d_weight", "logprob", "entropy", "loss")
    return Errors(**{name: pick(getattr(a, name), getattr(b, name)) for name in names})


def _rows(entries: list[Entry]) -> list[Row]:
    floors = {e.case.loss.forward_only: e for e in entries if e.name == "gemm" and e.times}
    by_key = {e.key: e for e in entries}
    rows = []
    for entry in entries:
        case, provider = entry.case, PROVIDERS[entry.name]
        plain = by_key.get((case.plain, entry.name)) if case.variant else None
        if plain is not None and "absent" == entry.verdict.state == plain.verdict.state:
            continue  # said once, by the plain case
        floor = floors.get(case.loss.forward_only)
        own = floor if entry.name == "gemm" and floor is not None else entry
        columns = time_columns(own.times)
        median = columns.get("median_ms")
        e = entry.verdict.errors
        rows.append(
            row_of(
                "time",
                case,
                entry.name,
                provider.title,
                provider.ours,
                state=own.verdict.state,
                reason=own.verdict.reason,
                plan=own.ready.plan if own.ready else "",
                chunk_rows=own.ready.chunk_rows if own.ready else None,
                useful_tflops=case.useful_flops / median / 1e9 if median and not case.variant else None,
                ratio_to_gemm=_ratio(own, floor),
                ratio_to_eager=None if case.variant else _ratio(own, by_key.get((case, "eager"))),
                ratio_to_plain=_ratio(own, plain),
                peak_extra_bytes=own.peak_bytes,
                grad_hidden_error=e.d_hidden,
                grad_weight_error=e.d_weight,
                logprob_error=e.logprob,
                **columns,
            )
        )
    return rows


def _ratio(entry: Entry, base: Entry | None) -> float | None:
    if base is None or not entry.times or not base.times:
        return None
    return paired_ratio(entry.times, base.times)


def run_memory(suite: Suite, device: str, tick: Tick) -> list[Row]:
    """GRPO's peak memory, each provider in a process of its own."""
    assert suite.memory is not None
    shape, names = suite.memory
    case, rows = Case("grpo", shape, "float32", device), []
    for name in names:
        tick(name)
        provider = PROVIDERS[name]
        peak = measure_apart(Job(case, name, torch.get_num_threads()))
        state = "ok" if peak.peak_bytes is not None else "absent"
        values = {"state": state, "reason": peak.reason, "plan": peak.plan, "peak_extra_bytes": peak.peak_bytes}
        rows.append(row_of("memory", case, name, provider.title, provider.ours, **values))
    return rows


def run_accuracy(suite: Suite, device: str, tick: Tick) -> list[Row]:
    """Errors of every mode and dtype against float64."""
    assert suite.accuracy is not None
    rows = []
    for name, dtype, verdict in error_table(device, suite.accuracy, tick):
        provider, e = PROVIDERS[name], verdict.errors
        case = Case("grpo", suite.accuracy, dtype, device)
        errors = {"grad_hidden_error": e.d_hidden, "grad_weight_error": e.d_weight, "logprob_error": e.logprob}
        state = {"state": verdict.state, "reason": verdict.reason}
        rows.append(row_of("accuracy", case, name, provider.title, provider.ours, **state, **errors))
    return rows
