"""Contract: the benchmark refuses a speedup to a wrong provider, keeps its rows, and makes its page from them alone.

Nothing here is about speed: tiny shapes, one thread, any machine.
"""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from benchmarks import plots, tables
from benchmarks.__main__ import app
from benchmarks.accuracy import GATE_SHAPE, Errors, compare, gate, judge, reference, slice_errors
from benchmarks.cases import Batch, Case, Shape, make_batch, plain_logprobs, vary
from benchmarks.environment import describe, slug
from benchmarks.losses import LOSSES
from benchmarks.memory import Job, largest, measure_apart, peak_of
from benchmarks.providers import PROVIDERS
from benchmarks.providers.base import Prepared, Provider, Result
from benchmarks.report import generate
from benchmarks.results import Row, read, row_of, time_columns, write
from benchmarks.run import run_group
from benchmarks.suite import Group, chosen, standard
from benchmarks.timing import interleave, paired_ratio, time_once

TINY = Shape(48, 16, 61)
ENVIRONMENT = {
    **describe("cpu", "c0ffee"),
    "device": "Some CPU",
    "device_slug": "some-cpu",
    "date": "2026-01-02T03:04:05Z",
}


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


def test_interleaving_rotates_and_survives_a_failure() -> None:
    seen: list[str] = []

    def run(name: str) -> Any:
        def body() -> None:
            seen.append(name)
            if name == "b" and seen.count("b") == 2:
                raise MemoryError("gone")

        return body

    times, failed = interleave({n: run(n) for n in "abc"}, 3, lambda body: time_once(body, "cpu"))
    assert "".join(seen) == "abc" + "bca" + "ca"
    assert set(times) == {"a", "c"} and len(times["a"]) == 3
    assert set(failed) == {"b"}
    assert paired_ratio([2.0, 40.0, 6.0], [1.0, 20.0, 2.0]) == 2.0


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


# ---------------------------------------------------------------- results and the page


def some_rows() -> list[Row]:
    case = case_of()
    fast = {**time_columns([3.0, 1.0, 2.0]), "ratio_to_gemm": 1.07, "ratio_to_eager": 0.5, "peak_extra_bytes": 3 << 20}
    return [
        row_of(
            "time",
            case,
            "eager",
            "eager",
            False,
            **time_columns([4.0, 4.0, 4.0]),
            ratio_to_gemm=2.0,
            ratio_to_eager=1.0,
        ),
        row_of("time", case, "xloss-one-pass", "xloss chunk one-pass", True, grad_hidden_error=1e-7, **fast),
        row_of("time", case, "quack", "QuACK", False, state="absent", reason="not installed"),
        row_of("time", case, "cce", "cut-cross-entropy", False, state="red", reason="d_hidden is off by 2"),
        row_of("memory", case, "eager", "eager", False, peak_extra_bytes=40 << 20),
        row_of("memory", case, "xloss-one-pass", "xloss chunk one-pass", True, peak_extra_bytes=2 << 20),
        row_of(
            "accuracy", case, "xloss-one-pass", "xloss chunk one-pass", True, grad_weight_error=2e-7, logprob_error=1e-6
        ),
    ]


def test_rows_survive_a_file_and_hold_everything(tmp_path: Path) -> None:
    path = write(tmp_path, ENVIRONMENT, some_rows())
    assert path == tmp_path / "some-cpu" / "2026-01-02-c0ffee.json"
    assert read(path).rows == some_rows()
    for line in json.loads(path.read_text()):
        assert {"device", "driver", "threads", "torch", "triton", "xloss", "peers", "commit", "date"} <= set(line)
    (tmp_path / "some-cpu" / "x.json").write_text("{}")
    with pytest.raises(ValueError, match=r"x\.json is not a result"):
        read(tmp_path / "some-cpu" / "x.json")


def test_page_shows_the_newest_in_full_and_keeps_the_older(tmp_path: Path) -> None:
    results, page = tmp_path / "results", tmp_path / "docs" / "performance.md"
    older = {**ENVIRONMENT, "date": "2025-05-05T00:00:00Z", "commit": "0ldc0de"}
    write(results, older, some_rows())
    path = write(results, ENVIRONMENT, some_rows())
    drawn = plots.draw(path.with_suffix(""), some_rows(), "Some CPU")
    assert [p.name for p in drawn] == ["2026-01-02-c0ffee-time.png", "2026-01-02-c0ffee-memory.png"]
    app(["report", "--results", str(results), "--page", str(page)], result_action="return_value")
    text = page.read_text()
    assert "| **xloss chunk one-pass** | 2.000 (1.000 to 3.000) | 1.07 | 0.50 | - | 3 | 1e-7 |  |" in text
    assert "| QuACK | **absent** | - | - | - | - | - | not installed |" in text
    assert "| cut-cross-entropy | **red** | - | - | - | - | - | d_hidden is off by 2 |" in text
    assert "| **xloss chunk one-pass** | 2 | 20.0x |  |" in text
    assert "![time](../results/some-cpu/2026-01-02-c0ffee-time.png)" in text
    assert text.count("## Some CPU") == 1
    assert "| 2025-05-05 | `0ldc0de` | 48x16x61 | grpo | xloss chunk one-pass | 2.000 | 1.07 |" in text
    assert generate(results, page) == text, "the same results make the same page"


def test_page_without_results_says_so(tmp_path: Path) -> None:
    assert "No results are kept" in generate(tmp_path, tmp_path / "performance.md")


# ---------------------------------------------------------------- the command line


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--provider", "eager"], "--providers"),
        (["--losses", "grop"], "grpo"),
        (["--providers", "xlos"], "xloss-one-pass"),
        (["--shapes", "12x3"], "TxHxV"),
        (["--shapes", "9x3x4"], "multiple of 8"),
        (["reprot"], "reprot"),
        (["largest", "--device", "cpu"], "--limit-gib"),
    ],
)
def test_a_typo_is_named_and_the_exit_status_is_2(
    words: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        app(words)
    assert caught.value.code == 2
    out = capsys.readouterr()
    assert said in out.out + out.err


def test_a_run_from_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--device", "cpu", "--shapes", str(TINY), "--losses", "grpo", "logprob", "--providers", "eager"]
    words += ["xloss-one-pass", "xloss-forward", "--rounds", "2", "--out", str(tmp_path), "--commit", "abc", "--json"]
    assert app(words, result_action="return_value") == 0
    rows = json.loads(capsys.readouterr().out)
    assert [r["provider"] for r in rows if r["loss"] == "logprob"] == ["gemm", "eager", "xloss-forward"]
    assert rows[0]["commit"] == "abc"
    assert len(list(tmp_path.glob("*/*-abc.json"))) == 1


def test_standard_sets_are_complete() -> None:
    cpu, cuda = standard("cpu", quick=False), standard("cuda", quick=False)
    assert {loss for g in cpu.groups for loss in g.losses} == set(LOSSES)
    assert cpu.groups[0].shape == Shape(2048, 512, 32000) and cpu.memory is not None
    assert cpu.memory[0] == Shape(4096, 256, 65536)
    assert {str(g.shape) for g in cuda.groups} >= {"8192x4096x128256", "32768x4096x151936", "8192x2304x256000"}
    assert all(g.rounds >= 7 for g in (*cpu.groups, *cuda.groups))
    variants = {
        case.variant for case, name in cpu.groups[0].entries("cpu", asked_for=False) if name == "xloss-one-pass"
    }
    assert variants == {"", "30% ignored", "50% ignored", "70% ignored", "50% advantage 0", "frozen head"}
    assert chosen(cpu, losses=["ce"]).groups[0].shape == Shape(1024, 512, 32000)
    assert slug("NVIDIA H200") == "nvidia-h200"
