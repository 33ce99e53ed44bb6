"""Contract: the benchmark refuses a speedup to a wrong provider, and measures what it says.

Nothing here is about speed: tiny shapes, one thread, any machine.
"""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import tables
from benchmarks.accuracy import GATE_SHAPE, Errors, compare, gate, judge, reference, slice_errors
from benchmarks.cases import Batch, Case, Shape, make_batch, plain_logprobs, vary
from benchmarks.losses import LOSSES
from benchmarks.memory import Job, largest, measure_apart, peak_of
from benchmarks.providers import PROVIDERS
from benchmarks.providers.base import Prepared, Provider, Result
from benchmarks.run import Entry, _warm_up, run_group
from benchmarks.suite import Group
from benchmarks.timing import LEAST_ROUNDS, OUT_OF_TIME, Deadline, fit_rounds, interleave, paired_ratio, time_once

TINY = Shape(48, 16, 61)


def case_of(loss: str = "grpo", dtype: str = "float32", **changes: Any) -> Case:
    return Case(loss, TINY, dtype, "cpu", chunk_size=17, **changes)


def made(case: Case) -> Batch:
    return vary(make_batch(case, hard=True), case)


def wrong(how: str) -> Provider:
    """Eager with one planted fault."""

    def prepare(case: Case, batch: Batch) -> Prepared:
        right = PROVIDERS["eager"].prepare(case, batch).run

        def run() -> Result:
            r = right()
            assert r.d_hidden is not None and r.d_weight is not None
            if how == "raises":
                raise RuntimeError("out of luck")
            faults = {
                "last row of dW lost": replace(
                    r, d_weight=r.d_weight.index_fill(0, torch.tensor([TINY.vocab_size - 1]), 0)
                ),
                "sign": replace(r, d_hidden=-r.d_hidden),
                "nan": replace(r, d_weight=r.d_weight.index_fill(0, torch.tensor([3]), float("nan"))),
                "no dW": replace(r, d_weight=None),
                "loss": replace(r, loss=None if r.loss is None else r.loss * 1.1),
                "bf16 inside": replace(r, d_weight=r.d_weight.bfloat16().float()),
            }
            return faults[how]

        return Prepared(run)

    return Provider("wrong", prepare)


# ---------------------------------------------------------------- the gate


@pytest.mark.parametrize("how", ["last row of dW lost", "sign", "nan", "no dW", "loss", "bf16 inside", "raises"])
def test_gate_is_red_on_a_wrong_provider(how: str) -> None:
    case = case_of()
    batch = made(case)
    verdict = gate(wrong(how), case, batch, reference(case, batch))
    assert verdict.state == "red"
    assert verdict.reason


@pytest.mark.parametrize("loss", list(LOSSES))
@pytest.mark.parametrize("variant", [{}, {"ignored": 0.5}, {"zero_advantage": 0.5}, {"frozen_head": True}])
def test_gate_passes_everything_that_runs_here(loss: str, variant: dict[str, Any]) -> None:
    case = case_of(loss, **variant)
    batch = made(case)
    want = reference(case, batch)
    ran = 0
    for name, provider in PROVIDERS.items():
        fit = provider.applies(case) and provider.absent(case) is None and "cpu" in provider.default_on
        if name == "gemm" or not fit or (variant and not provider.ours):
            continue
        verdict = gate(provider, case, batch, want)
        assert verdict.state == "ok", (name, verdict)
        result = provider.prepare(case, batch).run()
        assert judge(slice_errors(case, batch, result), case).state == "ok", name
        ran += 1
    assert ran >= (1 if variant else 2)


def test_rows_at_full_size_are_checked_too() -> None:
    case = case_of()
    batch = make_batch(case)
    result = PROVIDERS["eager"].prepare(case, batch).run()
    assert result.d_hidden is not None
    last = torch.zeros_like(result.d_hidden[:1])
    broken = replace(result, d_hidden=torch.cat([result.d_hidden[:-1], last]))
    assert judge(slice_errors(case, batch, broken), case).state == "red"


def test_a_missing_peer_is_absent_with_the_reason() -> None:
    case = case_of()
    batch = made(case)
    absent = Provider("gone", PROVIDERS["eager"].prepare, absent=lambda case: "not installed")
    assert gate(absent, case, batch, reference(case, batch)) == replace(
        gate(absent, case, batch, reference(case, batch)), state="absent", reason="not installed"
    )
    assert PROVIDERS["quack"].absent(case) == "has no GRPO"
    assert PROVIDERS["liger-flce"].absent(case_of("ce")) == "needs CUDA"


@pytest.mark.parametrize("hard", [True, False])
def test_log_ratios_keep_away_from_the_clip_bounds(hard: bool) -> None:
    batch = make_batch(Case("grpo", GATE_SHAPE["cpu"], "float32", "cpu"), hard=hard)
    ratio = (plain_logprobs(batch.hidden, batch.weight, batch.tokens.labels)[0] - batch.tokens.old).exp()
    for bound in (0.8, 1.2, 1.28):
        assert float((ratio.log() - torch.tensor(bound).log()).abs().min()) > 0.03
    assert float(ratio.min()) < 0.8 < 1.28 < float(ratio.max()), "and some tokens are off on either side"
    clipped = ((ratio > 1.2) & (batch.tokens.advantages > 0)) | ((ratio < 0.8) & (batch.tokens.advantages < 0))
    assert clipped.float().mean() > 0.2 if hard else 0 < clipped.float().mean() < 0.06


def test_compare_measures_errors_by_the_largest_entry() -> None:
    case = case_of()
    batch = made(case)
    want = reference(case, batch)
    assert want.d_hidden is not None
    off = want.d_hidden.clone()
    off[0, 0] += 0.5 * want.d_hidden.abs().max()
    found = compare(Result(want.loss, off, want.d_weight), want)
    assert found.d_hidden == pytest.approx(0.5)
    assert found.d_weight == 0
    assert Errors().gradient is None


# ---------------------------------------------------------------- a run


def test_a_red_provider_is_neither_timed_nor_given_a_ratio(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PROVIDERS, "quack", wrong("sign"))
    group = Group(
        TINY, "float32", ("grpo",), ("gemm", "eager", "quack", "xloss-one-pass"), variants=("grpo",), rounds=3
    )
    rows = run_group(group, TINY, "cpu", lambda note: None, asked_for=True)
    by_name = {(row.provider, row.variant): row for row in rows}
    red = by_name["quack", ""]
    assert (red.state, red.median_ms, red.ratio_to_gemm) == ("red", None, None)
    ours = by_name["xloss-one-pass", ""]
    assert ours.state == "ok" and ours.ratio_to_gemm and ours.ratio_to_eager and len(ours.rounds_ms) == 3
    assert by_name["xloss-one-pass", "50% ignored"].ratio_to_plain
    assert by_name["gemm", ""].ratio_to_gemm == 1.0
    console = Console(width=80, record=True, file=io.StringIO())
    tables.print_time(console, rows)
    (line,) = [x for x in console.export_text().splitlines() if x.startswith("wrong")]
    assert "RED" in line and "1." not in line.replace(tables.error(red.gradient_error), "")
    assert max(map(len, console.export_text(clear=False).splitlines() or [""])) <= 80


def test_interleaving_changes_the_order_and_survives_a_failure() -> None:
    seen: list[str] = []

    def run(name: str) -> Any:
        def body() -> None:
            seen.append(name)
            if name == "b" and seen.count("b") == 2:
                raise MemoryError("gone")

        return body

    times, failed = interleave({n: run(n) for n in "abc"}, 3, lambda body: time_once(body, "cpu"))
    assert "".join(seen) == "abc" + "acb" + "ca"
    assert set(times) == {"a", "c"} and len(times["a"]) == 3
    assert set(failed) == {"b"}
    assert paired_ratio([2.0, 40.0, 6.0], [1.0, 20.0, 2.0]) == 2.0


def test_rounds_of_its_own() -> None:
    seen: list[str] = []
    runs = {name: lambda name=name: seen.append(name) for name in "ab"}
    times, _ = interleave(runs, {"a": 3, "b": 1}, lambda body: time_once(body, "cpu"))
    assert (seen.count("a"), seen.count("b"), len(times["b"])) == (3, 1, 1)
    assert paired_ratio([2.0, 9.0, 9.0], [1.0]) == 2.0, "rounds that both took part in"


def test_rounds_that_fit_the_time_left() -> None:
    seconds = {"fast": 1.0, "slow": 10.0, "slower": 20.0}
    assert fit_rounds(seconds, 15, 1e9) == dict.fromkeys(seconds, 15)
    assert fit_rounds(seconds, 15, math.inf) == dict.fromkeys(seconds, 15)
    some = fit_rounds(seconds, 15, 150.0)
    assert some["fast"] == 15 and sum(n * seconds[k] for k, n in some.items()) <= 150
    assert min(some.values()) >= LEAST_ROUNDS, "slow ones give way first"
    assert fit_rounds(seconds, 15, 40.0) == {"fast": LEAST_ROUNDS, "slow": LEAST_ROUNDS, "slower": 0}
    assert fit_rounds(seconds, 15, 0.0) == dict.fromkeys(seconds, 0)


@pytest.mark.parametrize("seconds", [None, 0.0])
def test_a_deadline_leaves_rows_that_say_so(seconds: float | None) -> None:
    group = Group(TINY, "float32", ("grpo",), ("gemm", "eager", "xtuner-loop", "xloss-one-pass"), rounds=3)
    rows = run_group(group, TINY, "cpu", lambda note: None, asked_for=True, deadline=Deadline.after(seconds))
    assert len(rows) == 4
    for row in rows:
        assert (row.state, row.reason) == (("ok", "") if seconds is None else ("absent", OUT_OF_TIME))


def test_a_peer_that_runs_out_of_memory_is_absent_and_xloss_is_red(monkeypatch: pytest.MonkeyPatch) -> None:
    def prepare(case: Case, batch: Batch) -> Prepared:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 70.00 GiB.")

    names = ("quack", "xloss-two-pass")
    for name in names:
        monkeypatch.setitem(PROVIDERS, name, replace(PROVIDERS["eager"], prepare=prepare, ours=name != "quack"))
    entries = [Entry(case_of(), name) for name in names]
    for entry in entries:
        _warm_up(entry, made(case_of()), lambda note: None)
    assert [(e.verdict.state, e.verdict.reason) for e in entries] == [
        ("absent", "out of memory"),
        ("red", "out of memory"),
    ]


def test_memory_in_this_process_and_apart() -> None:
    held: list[torch.Tensor] = []

    def step() -> Result:
        held.append(torch.ones(16 << 20))  # 64 MiB
        return Result()

    _, peak = peak_of(step, "cpu")
    assert peak is None or 60 << 20 < peak < 90 << 20
    apart = measure_apart(Job(Case("grpo", TINY, "float32", "cpu"), "xloss-one-pass", 1))
    assert apart.reason == "" and "one-pass" in apart.plan


@pytest.mark.parametrize("most", [0, 127, 128, 1000, 1 << 20])
@pytest.mark.parametrize("true_limit", [0, 128, 5000, 300_000, 1 << 30])
def test_bisection_finds_the_largest(most: int, true_limit: int) -> None:
    tried: list[int] = []

    def fits(tokens: int) -> bool:
        tried.append(tokens)
        return tokens <= true_limit

    found, best = largest(fits, most), min(most, true_limit) // 128 * 128
    assert found <= best <= found * 33 / 32 + 128
    assert all(0 < t <= most for t in tried) and len(tried) <= 24
