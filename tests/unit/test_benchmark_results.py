"""Contract: the benchmark keeps its rows, makes its page from them alone, and names what is wrong with a call."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console

from benchmarks import largest, plots, tables
from benchmarks.__main__ import app
from benchmarks.cases import Case, Shape
from benchmarks.environment import describe, slug
from benchmarks.losses import STANDARD
from benchmarks.memory import Job, Peak
from benchmarks.options import RunOptions
from benchmarks.report import generate
from benchmarks.results import Row, read, row_of, time_columns, write
from benchmarks.suite import chosen, standard
from benchmarks.timing import OUT_OF_TIME, Deadline

TINY = Shape(48, 16, 61)
ENVIRONMENT = {
    **describe("cpu", "c0ffee"),
    "device": "Some CPU",
    "device_slug": "some-cpu",
    "date": "2026-01-02T03:04:05Z",
}


# ---------------------------------------------------------------- results and the page


def some_rows() -> list[Row]:
    case = Case("grpo", TINY, "float32", "cpu")
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


@pytest.mark.parametrize("limit", [None, 1000, 0])
def test_largest_batch(limit: int | None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Rows of a bisection, in the table and on the page; a failure that is not one of memory is red."""

    def measured(job: Job) -> Peak:
        tokens = job.case.shape.num_tokens
        if limit is None:
            return Peak(None, reason="out of luck")
        fits = tokens <= limit or job.provider != "eager"
        return Peak(tokens << 20, "one-pass") if fits else Peak(None, out_of_memory=True)

    monkeypatch.setattr(largest, "measure_apart", measured)
    names = ("eager", "xloss-one-pass", "quack")
    suite = replace(standard("cpu", quick=True), largest=(TINY, 2048, names))
    rows = largest.run_largest(suite, "cpu", lambda note: None, Deadline())
    eager, ours, gone = rows
    if limit is None:
        assert (eager.state, eager.reason) == ("red", "eager at 128 tokens: out of luck")
        assert (ours.state, ours.ours) == ("red", True)
        return
    if limit:
        assert (eager.num_tokens, eager.peak_extra_bytes, eager.plan) == (896, 896 << 20, "one-pass")
    else:
        assert (eager.state, eager.reason) == ("absent", "128 tokens do not fit")
    assert (ours.num_tokens, ours.plan, ours.ours) == (2048, "all that was tried", True)
    assert (gone.state, gone.reason) == ("absent", "has no GRPO")
    late = largest.run_largest(suite, "cpu", lambda note: None, Deadline.after(1.0))
    assert {row.reason for row in late} == {OUT_OF_TIME, "has no GRPO"}
    write(tmp_path, ENVIRONMENT, [*some_rows(), *rows])
    text = generate(tmp_path, tmp_path / "page.md")
    assert "| **xloss chunk one-pass** | 2,048 | 2,048 | all that was tried |" in text
    console = Console(width=80, record=True, file=io.StringIO())
    tables.print_largest(console, rows)
    assert "2,048" in console.export_text(clear=False) and "Largest batch" in console.export_text()


def test_time_limits() -> None:
    assert RunOptions().seconds("cuda") == 480 and RunOptions().seconds("cpu") is None
    assert RunOptions(losses=("ce",)).seconds("cuda") is None
    assert RunOptions(minutes=2.0).seconds("cpu") == 120 and not RunOptions(minutes=2.0).narrowed


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
    assert {loss for g in cpu.groups for loss in g.losses} == set(STANDARD)
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


def test_losses_beside_the_standard_ones_are_measured_when_named() -> None:
    cpu, shape = standard("cpu", quick=False), Shape(64, 8, 32)
    assert [g.losses for g in chosen(cpu, losses=["sapo"]).groups] == [("sapo",)]
    assert chosen(cpu, losses=["sapo"]).groups[0].shape == Shape(2048, 512, 32000)
    assert [g.losses for g in chosen(cpu, losses=["ce", "sapo"], shapes=[shape]).groups] == [("ce", "sapo")]
    assert [g.losses for g in chosen(cpu, shapes=[shape]).groups] == [STANDARD]
