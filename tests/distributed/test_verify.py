"""``xloss verify`` over two processes (gloo).

Contract: right layouts pass, and exit status is 0; a bug planted in the calibration, the split of sequences or of the
vocabulary, or a refusal left out, fails with exit status 1 in the layouts that it breaks and in no other, and is told
in words; it runs the same in processes that torchrun started.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests import budgets
from tests.distributed.ranks import alone, run_processes
from xloss import CELossContext, TokenRanks
from xloss.cli import app
from xloss.distributed import ranks as rank_sums
from xloss.head import dispatch, partials, runner
from xloss.losses import build

pytestmark = pytest.mark.distributed
LAYOUTS = "packing micro-batches ddp-no-sync fsdp2-root"


def run(arguments: str) -> tuple[int, str]:
    """Exit status and stdout of a command."""
    out = io.StringIO()
    with contextlib.redirect_stdout(out), pytest.raises(SystemExit) as stop:
        app.meta(arguments.split())
    return int(stop.value.code or 0), out.getvalue()


def rows(report: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {row["layout"]: row for row in report["rows"]}


def test_right_layouts_pass() -> None:
    status, out = run(f"verify --nproc 2 --layouts {LAYOUTS} --losses ce gspo --json")
    report = json.loads(out)
    assert status == 0 and report["verdict"]["passed"]
    assert list(rows(report)) == ["packing", "micro-batches", "ddp-no-sync", "fsdp2-root"]
    for row in report["rows"]:
        assert (row["verdict"], row["losses"], row["failures"]) == ("PASS", ["ce", "gspo"], [])
        assert max(row["gradient"], row["values"]) <= row["allowed"] == budgets.F32_GRADIENT
    assert [row["ranks"] for row in report["rows"]] == [1, 1, 2, 2]


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        ("--nproc 1 --layouts uneven-ranks --losses ce", "needs 2 processes"),
        ("--nproc 5 --layouts dp-tp --losses ce", "needs a multiple of 2 processes"),
        ("--nproc 2 --layouts sp --losses dpo", "is not for any of these losses"),
    ],
)
def test_what_cannot_run_is_skipped_and_not_passed(arguments: str, why: str) -> None:
    status, out = run(f"verify {arguments} --json")
    (row,) = json.loads(out)["rows"]
    assert (row["verdict"], row["note"], status) == ("skipped", why, 1)


BREAKS_ON_A_RANK = """
import torch.distributed as dist
from xloss import CELossConfig, CELossContext


class Context(CELossContext):
    def token_loss(self, stats, loss_kwargs):
        if dist.is_initialized() and dist.get_rank() == 1:
            raise RuntimeError("not on this rank")
        return super().token_loss(stats, loss_kwargs)


class Config(CELossConfig):
    loss_ctx_cls = property(lambda self: Context)
"""


def test_a_rank_that_raises_fails_its_layout_and_no_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "breaks_on_a_rank.py").write_text(BREAKS_ON_A_RANK)
    monkeypatch.chdir(tmp_path)
    status, out = run("verify --loss breaks_on_a_rank:Config --layouts eager ddp fsdp2-root --json")
    found = {name: (row["verdict"], row["failures"]) for name, row in rows(json.loads(out)).items()}
    raised = ("FAIL", ["rank 1 raised RuntimeError: not on this rank"])
    assert (status, found) == (1, {"eager": ("PASS", []), "ddp": raised, "fsdp2-root": raised})


# -- planted bugs ------------------------------------------------------------------------------------------------------


def mean_of_means(cls: Any, kwargs_list: Any, loss_cfg: Any, cu_seq_lens_list: Any, ranks: Any) -> None:
    for kwargs in kwargs_list:
        valid = kwargs.shifted_labels != loss_cfg.ignore_idx
        kwargs.loss_weight = valid / valid.sum().clamp(min=1) / len(kwargs_list)


@contextlib.contextmanager
def planted(bug: str) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        if bug == "gradient factor":
            patch.setattr(TokenRanks, "gradient_factor", lambda ranks, grad_reduce: 1.0)
        elif bug == "missing all-reduce":
            patch.setattr(rank_sums, "all_reduce_sum", lambda value, ranks=None: value)
        elif bug == "mean of means":
            patch.setattr(CELossContext, "calibrate", classmethod(mean_of_means))
        elif bug == "parts of a sequence count twice":
            patch.setattr(build, "TokenRanks", lambda ranks, counts: TokenRanks(ranks))
        elif bug == "hidden gradient of a part of the vocabulary":
            patch.setattr(runner, "begin_sum", lambda values, part: partials.Begun.done(values))
        elif bug == "nothing refused":
            patch.setattr(dispatch, "check_gradient_route", lambda *args, **kwargs: None)
        yield


BUGS = {
    "none": (LAYOUTS, []),
    "gradient factor": (LAYOUTS, ["ddp-no-sync", "fsdp2-root"]),
    "missing all-reduce": (LAYOUTS, ["ddp-no-sync", "fsdp2-root"]),
    "mean of means": (LAYOUTS, ["micro-batches", "ddp-no-sync", "fsdp2-root"]),
    "parts of a sequence count twice": ("ddp sp", ["sp"]),
    "hidden gradient of a part of the vocabulary": ("ddp tp", ["tp"]),
    "nothing refused": ("ddp around-ddp", ["around-ddp"]),
}
"""What is run with each, and what must fail."""


def worker(rank: int, folder: str, ports: list[int]) -> None:
    alone()
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "localhost"}
    for (bug, (layouts, _)), port in zip(BUGS.items(), ports, strict=True):
        os.environ["MASTER_PORT"] = str(port)
        with planted(bug):
            status, out = run(f"verify --layouts {layouts} --losses ce --json")
        Path(folder, f"{bug}-{rank}.json").write_text(json.dumps({"status": status, "out": out}))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    """What both processes of a world printed and returned, for each bug."""
    folder = tmp_path_factory.mktemp("ranks")
    with contextlib.ExitStack() as stack:
        free = [stack.enter_context(socket.socket()) for _ in BUGS]
        for s in free:
            s.bind(("localhost", 0))
        ports = [s.getsockname()[1] for s in free]
    run_processes(worker, str(folder), ports, nprocs=2)
    return {bug: [json.loads((folder / f"{bug}-{rank}.json").read_text()) for rank in range(2)] for bug in BUGS}


@pytest.mark.parametrize("bug", BUGS)
def test_planted_bugs_fail(ranks: dict[str, list[dict[str, Any]]], bug: str) -> None:
    failing = BUGS[bug][1]
    first, second = ranks[bug]
    assert first["status"] == second["status"] == bool(failing)
    assert second["out"] == ""  # the first rank speaks for all
    report = json.loads(first["out"])
    assert report["verdict"]["failed"] == failing
    assert all(name in report["verdict"]["line"] for name in failing)


@pytest.mark.parametrize(
    ("bug", "layout", "says"),
    [
        ("gradient factor", "ddp-no-sync", "2x too small: divided by the number of ranks once too often"),
        ("parts of a sequence count twice", "sp", "2x too small: divided by the number of ranks once too often"),
        ("hidden gradient of a part of the vocabulary", "tp", "and by no common factor"),
        ("nothing refused", "around-ddp", "and by no common factor"),
    ],
)
def test_planted_bugs_are_told(ranks: dict[str, list[dict[str, Any]]], bug: str, layout: str, says: str) -> None:
    assert says in " ".join(rows(json.loads(ranks[bug][0]["out"]))[layout]["failures"])
