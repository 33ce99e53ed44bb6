"""``xloss demo`` and ``xloss info``, small.

Contract: a whole run ends with a verdict that its figures bear out, leaves JSON, Markdown and plots, and with --json
prints JSON alone; the float64 reference is autograd's answer; peak memory is what was allocated; figures that are
wrong, or not numbers, fail the verdict; without matplotlib all but the plots is there.
"""

from __future__ import annotations

import argparse
import gc
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import budgets
from xloss.cli import app, float64, plots
from xloss.cli.calibration import Cut
from xloss.cli.demo_steps import LOSSES, Step
from xloss.cli.demo_verdict import DemoResult, judge
from xloss.cli.memory import MIB, start_peak
from xloss.cli.options import Sizes
from xloss.cli.rollouts import Rollouts
from xloss.cli.tiny_lm import Training


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        app.meta(arguments)
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    small = ["--device", "cpu", "--tokens", "512", "--vocab-size", "8192", "--hidden-size", "16", "--steps", "4"]
    code = run(["demo", *small, "--text", argparse.__file__, "--out", str(out), "--json"])
    printed = capsys.readouterr().out
    assert printed == (out / "demo.json").read_text()
    result = json.loads(printed)
    assert code == 0, result["verdict"]
    assert result["verdict"]["line"].startswith("PASS ")
    assert {(s["loss_name"], s["run"]) for s in result["steps"]} == {(n, r) for n in LOSSES for r in ("eager", "xloss")}
    assert all(step["grad_error"] < 5e-6 for step in result["steps"])
    assert [cut["num_micro_batches"] for cut in result["calibration"]] == [1, 2, 8]
    assert result["calibration"][2]["naive_grad_drift"] > 1e-2
    assert len(result["training"]["curve"]) == 4
    assert result["verdict"]["line"] in (out / "demo.md").read_text()
    for name in result["plots"]["files"]:
        assert (out / name).read_bytes().startswith(b"\x89PNG")


def test_info_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["info", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["torch"] == torch.__version__
    assert report["modes"]["eager"]["runs"]
    assert report["modes"]["chunk"]["runs"]
    assert report["modes"]["fused"]["runs"] or report["modes"]["fused"]["reason"]


def test_info_at_80_columns(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert run(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    assert any(line.split()[:2] == ["chunk", "yes"] for line in lines)


def test_float64_reference_is_autograd() -> None:
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    labels = torch.randint(7, (10,), generator=generator)
    hidden, weight = draw(10, 5).requires_grad_(), draw(7, 5).requires_grad_()
    logprobs = (hidden @ weight.T).log_softmax(-1).gather(1, labels[:, None])[:, 0]
    old, ref = logprobs.detach() + 0.5 * draw(10), logprobs.detach() + draw(10)
    batch = Rollouts(hidden.detach(), weight.detach(), labels, draw(10), old, ref, 1, 0.0)
    words = torch.tensor([6, 0, 3])
    found = float64.references(batch, [float64.grpo, float64.cispo, float64.grpo_kl], words, block=4)
    for formula, answer in zip((float64.grpo, float64.cispo, float64.grpo_kl), found, strict=True):
        loss = formula(logprobs, batch, slice(None)).mean()
        d_hidden, d_weight = torch.autograd.grad(loss, (hidden, weight), retain_graph=True)
        assert answer.loss == pytest.approx(loss.item(), rel=budgets.FIGURE_SAME)
        assert float64.relative(answer.d_hidden, d_hidden) < 1e-12
        assert float64.relative(answer.d_words, d_weight[words]) < 1e-12


@pytest.mark.skipif(sys.platform != "linux", reason="reads the kernel's high-water mark")
def test_peak_is_what_was_allocated() -> None:
    # Linux counts resident pages per core and adds them up in batches: megabytes off on a machine of many cores, so
    # the allocation is far above that; and garbage freed meanwhile would count against it.
    gc.collect()
    peak = start_peak("cpu")
    torch.ones(768 * MIB // 4)
    after = peak()
    assert after is not None
    assert 700 * MIB < after < 840 * MIB


@pytest.fixture
def good() -> DemoResult:
    def step(name: str, eager: bool) -> Step:
        run, peak = ("eager", 3000.0) if eager else ("xloss", 100.0)
        return Step(name, run, 0.5, 0.5, 7e-7, peak, 1000.0, {}, "plan")

    return DemoResult(
        environment={"xloss": "0"},
        sizes=Sizes("cpu", 4096, 2, 65536, 128),
        notes=("--tokens 8192 -> 4096: little memory",),
        text={"source": "x", "num_files": 1, "num_chars": 1, "num_tokens": 1, "num_types": 1},
        training=Training(2, 512, (11.0, 9.0), 11.0, 8.0, 11.1, 1.0),
        batch={"num_tokens": 4096, "ratio_min": 0.5, "ratio_max": 2, "clip_frac_low": 0.1, "clip_frac_high": 0.1},
        steps=tuple(step(name, eager) for name in LOSSES for eager in (True, False)),
        calibration=(Cut("8 x 1", 8, 6.0, 6.5, 0.1, 0.0, 0.3, 1e-7),),
        seconds={"Training": 1.0},
    )


def test_verdict_passes_good_figures(good: DemoResult) -> None:
    assert judge(good).line.startswith("PASS 30x less memory, ")


@pytest.mark.parametrize(
    "change",
    [
        {"grad_error": 1e-4},
        {"grad_error": float("nan")},
        {"loss": 0.6},
        {"loss": float("nan")},
        {"peak_mib": 3001.0},
    ],
    ids=str,
)
def test_verdict_fails_a_bad_step(good: DemoResult, change: dict[str, Any]) -> None:
    steps = (*good.steps[:-1], replace(good.steps[-1], **change))
    verdict = judge(replace(good, steps=steps))
    assert not verdict.passed
    assert verdict.line.startswith("FAIL GRPO + KL")
    assert len(verdict.failures) == 1


def test_verdict_fails_a_drift_and_a_flat_loss(good: DemoResult) -> None:
    cuts = (replace(good.calibration[0], xloss_grad_drift=float("nan")),)
    flat = replace(good.training, held_out_after=11.0)
    assert len(judge(replace(good, calibration=cuts, training=flat)).failures) == 2


def test_peaks_that_cannot_be_read_do_not_fail(good: DemoResult) -> None:
    steps = tuple(replace(step, peak_mib=None) for step in good.steps)
    verdict = judge(replace(good, steps=steps))
    assert verdict.passed
    assert "not measured" in verdict.line


def test_no_matplotlib_no_plots(good: DemoResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    drawn = plots.draw(tmp_path, good)
    assert drawn["files"] == []
    assert "xloss[plots]" in drawn["reason"]


def test_imports_are_lean() -> None:
    code = (
        "import sys, xloss; assert not {'cyclopts', 'rich', 'matplotlib'} & set(sys.modules)\n"
        "import xloss.cli; assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
