"""``xloss demo --parallel``, small.

Contract: a run splits its sequences, and gives one curve on 1, 2 and 4 processes and from checkpoints of other numbers
of them; it leaves JSON and a plot and no checkpoint; a curve that strays, or is not a number, fails the verdict, and so
does a lost process; a global batch is the same whoever asks; an option that means nothing here is refused.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests import budgets
from xloss import CELossConfig, CELossContext, CELossContextInputItem
from xloss.cli import app
from xloss.cli.errors import CannotRun
from xloss.cli.options import DemoOptions
from xloss.cli.parallel import demo, plot
from xloss.cli.parallel.model import Block, SplitLM
from xloss.cli.parallel.result import LIMIT, ParallelResult, judge, to_json
from xloss.cli.parallel.training import IGNORE, Curve, Job, global_batch, layout
from xloss.cli.spawn import RankFailed

pytestmark = pytest.mark.distributed
SMALL = ["--steps", "4", "--vocab-size", "256", "--hidden-size", "8", "--text", argparse.__file__, "--device", "cpu"]


def run(arguments: list[str]) -> int:
    with pytest.raises(SystemExit) as stop:
        app.meta(["demo", "--parallel", "fsdp2", *arguments])
    assert isinstance(stop.value.code, int)
    return stop.value.code


def test_demo_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    code = run([*SMALL, "--out", str(out), "--json"])
    printed = capsys.readouterr().out
    result = json.loads(printed)
    assert code == 0, result["verdict"]
    assert printed == (out / "parallel.json").read_text()
    runs = [(c["processes"], c["data_ranks"], c["sequence_ranks"], c["start"], c["saved_by"]) for c in result["curves"]]
    assert runs == [
        (1, 1, 1, 0, 0),
        (1, 1, 1, 2, 1),
        (2, 1, 2, 0, 0),
        (2, 1, 2, 2, 2),
        (2, 1, 2, 2, 1),
        (4, 2, 2, 0, 0),
        (4, 2, 2, 2, 4),
        (4, 2, 2, 2, 2),
    ]
    assert [len(c["values"]) for c in result["curves"]] == [4, 2, 4, 2, 2, 4, 2, 2]
    assert all(c["difference"] <= budgets.FIGURE_F32_CHAIN for c in result["curves"])
    assert (out / "parallel.png").read_bytes().startswith(b"\x89PNG")
    assert sorted(p.name for p in out.iterdir()) == ["parallel.json", "parallel.png"]


@pytest.fixture
def good() -> ParallelResult:
    values = (8.0, 7.0, 6.0, 5.0)
    curves = (
        Curve(1, 1, 1, values, 1.0),
        Curve(2, 1, 2, (8.0, 7.0, 6.0, 5.000001), 1.0),
        Curve(4, 2, 2, values, 1.0),
        Curve(4, 2, 2, (6.0, 5.0), 1.0, 2, 2),
    )
    return ParallelResult({"xloss": "0"}, Job(4, 256, 8, 0), "cpu", {"source": "x"}, curves, {"4 processes": 1.0})


def test_verdict_passes_one_curve(good: ParallelResult) -> None:
    assert judge(good).line == "PASS one curve from 1, 2, 4 processes, within 2.0e-07; resumed, within 0.0e+00"


@pytest.mark.parametrize("value", [5.0 * (1 + 2 * LIMIT), float("nan")])
@pytest.mark.parametrize("at", [1, 3])
def test_verdict_names_the_run_that_strays(good: ParallelResult, at: int, value: float) -> None:
    curves = list(good.curves)
    curves[at] = replace(curves[at], values=(*curves[at].values[:-1], value))
    verdict = judge(replace(good, curves=tuple(curves)))
    assert not verdict.passed
    assert verdict.line.startswith("FAIL 2 processes: " if at == 1 else "FAIL 4 processes, resumed from 2: ")
    assert json.loads(to_json(good, verdict, {}))["verdict"]["failures"] == list(verdict.failures)


def test_verdict_fails_a_loss_that_does_not_fall(good: ParallelResult) -> None:
    flat = replace(good, curves=(Curve(1, 1, 1, (8.0, 8.0), 1.0),))
    assert judge(flat).line == "FAIL the loss did not fall: 8.0000 -> 8.0000"


def test_lost_process_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lose(*args: Any, **kwargs: Any) -> Any:
        raise RankFailed(1, "was killed by SIGKILL")

    monkeypatch.setattr(demo, "run_ranks", lose)
    assert run([*SMALL, "--out", str(tmp_path)]) == 1
    assert capsys.readouterr().out == "FAIL rank 1 was killed by SIGKILL\n"


def test_no_matplotlib_no_plot(good: ParallelResult, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    drawn = plot.draw(tmp_path, good)
    assert drawn["files"] == [] and "xloss[plots]" in drawn["reason"]


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ({"tokens": 512}, "--tokens"),
        ({"steps": 1}, "--steps 1"),
        ({"hidden_size": 10}, "--hidden-size 10"),
        ({"device": "cuda"}, "--device cuda"),
    ],
)
def test_what_means_nothing_is_refused(given: dict[str, Any], names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(CannotRun, match=names):
        demo.choose(DemoOptions(parallel="fsdp2", **given))


def test_worlds_under_torchrun(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert demo.choose(DemoOptions(parallel="fsdp2", device="cpu"))[2] == [3, 1, 2, 4]
    monkeypatch.setenv("WORLD_SIZE", "64")
    with pytest.raises(CannotRun, match="64 processes"):
        demo.choose(DemoOptions(parallel="fsdp2", device="cpu"))


def test_batches_are_uneven_and_those_of_the_step() -> None:
    job, text = Job(4, 256, 8, 0), torch.arange(10_000) % 256
    ids, labels = global_batch(text, job, 3)
    again = global_batch(text, job, 3)
    assert torch.equal(ids, again[0]) and torch.equal(labels, again[1])
    assert not torch.equal(ids, global_batch(text, job, 2)[0])
    counted = labels != IGNORE
    assert len(counted.sum(1).unique()) > 4 and bool(counted[:, -1].all())
    assert torch.equal(labels[:, :-1][counted[:, :-1]], ids[:, 1:][counted[:, :-1]])


def test_a_token_sees_what_is_before_it_and_nothing_after() -> None:
    torch.manual_seed(0)
    block, hidden = Block(8), torch.randn(1, 6, 8, requires_grad=True)
    out = block(hidden, torch.arange(6), None)
    (grad,) = torch.autograd.grad(out[0, 3].sum(), hidden)
    assert grad[0, :4].abs().sum(1).gt(0).all() and not grad[0, 4:].any()


@pytest.mark.parametrize(("processes", "ranks"), [(1, (1, 1)), (2, (1, 2)), (3, (3, 1)), (4, (2, 2)), (6, (3, 2))])
def test_layout(processes: int, ranks: tuple[int, int]) -> None:
    assert layout(processes) == ranks


def test_first_loss_is_that_of_knowing_nothing() -> None:
    """All logits are near 0 at the start."""
    torch.manual_seed(0)
    labels, cfg = torch.randint(0, 256, (2, 6)), CELossConfig()
    (kwargs,) = CELossContext.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
    loss = SplitLM(256, 8, 6)(labels, torch.arange(6), CELossContext(cfg, kwargs), None)
    assert loss.item() == pytest.approx(5.545, abs=budgets.FIGURE_DRAWN)
