"""One rank's failure, seen by all of three processes (gloo).

Contract: where batches are built, a rank that raises is named on every rank with what it raised, wherever in the
build that is; ranks that differ in config, fields, mesh or collectives all raise and say who has what; none hangs, and
the group works afterwards. A rank without a live token takes part in the same collectives as the others.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh

from tests.distributed import failing
from tests.distributed.pages import DOCS, shown_and_printed
from tests.distributed.ranks import spawn
from xloss import (
    CELossConfig,
    CELossContextInputItem,
    GRPOLossConfig,
    LogProbConfig,
    LogProbKwargs,
    RLLossContextInputItem,
    finalize_metrics,
)
from xloss.distributed import agree

pytestmark = pytest.mark.distributed
WORLD = 3
LABELS = torch.tensor([[1, 2, -100, 4, 5]])
BOUNDS = torch.tensor([0, 2, 5])
POLICY = {"loss_type": "vanilla", "cliprange_low": 0.2, "cliprange_high": 0.2}
KL = {"use_kl_loss": True, "kl_loss_coef": 0.1, "kl_loss_type": "k3"}


def ce(labels: torch.Tensor = LABELS, **fields: Any) -> CELossContextInputItem:
    return CELossContextInputItem(shifted_labels=labels, **fields)


def rl(labels: torch.Tensor = LABELS, **fields: Any) -> RLLossContextInputItem:
    numbers = {name: torch.full(labels.shape, -1.0) for name in ("advantages", "old_logprobs")}
    return RLLossContextInputItem(shifted_labels=labels, **(numbers | fields))


def build(item: Any, cfg: Any, bounds: torch.Tensor | None = BOUNDS, mesh: Any = None) -> Any:
    cu_seq_lens_list = None if bounds is None else [bounds]
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg, cu_seq_lens_list, mesh)
    return cfg.loss_ctx_cls(cfg, kwargs)


def weighted() -> CELossContextInputItem:
    return ce(token_weight=torch.ones(LABELS.shape))


def set_since(item: CELossContextInputItem, odd: bool) -> CELossContextInputItem:
    """With weights that were set once more after the split, on this rank or not."""
    if odd:
        item.token_weight = torch.ones(item.shifted_labels.shape)
    return item


def jobs(rank: int, mesh: Any) -> dict[str, Callable[[], object]]:
    """What goes wrong, on rank 1 unless its name says otherwise; the same order on all ranks."""
    odd = rank == 1
    grpo = GRPOLossConfig(policy_loss_cfg=POLICY, **KL)
    ref = torch.full(LABELS.shape, -1.0)
    custom = failing.Config
    return {
        "option": lambda: build(ce(), CELossConfig(loss_reduction="sample" if odd else "token")),
        "nested-option": lambda: build(
            rl(), GRPOLossConfig(policy_loss_cfg=POLICY | {"cliprange_low": 0.1 if odd else 0.2})
        ),
        "loss": lambda: build(rl(), GRPOLossConfig(policy_loss_cfg=POLICY)) if odd else build(ce(), CELossConfig()),
        "field": lambda: build(ce(token_weight=None if odd else torch.ones(LABELS.shape)), CELossConfig()),
        "missing-field": lambda: build(rl(ref_logprobs=None if odd else ref), grpo),
        "shape": lambda: build(ce(), CELossConfig(), BOUNDS[:2] if odd else BOUNDS),
        "two-raise": lambda: build(ce(), CELossConfig(), BOUNDS[:2] if rank else BOUNDS),
        "not-a-field": lambda: build(failing.Item(shifted_labels=LABELS, steps="no"), custom()),
        "before": lambda: build(failing.item(LABELS, ["sum", "sum"], raises_at=0 if odd else None), custom()),
        "between": lambda: build(failing.item(LABELS, ["sum", "sum"], raises_at=1 if odd else None), custom()),
        "after": lambda: build(failing.item(LABELS, ["sum", "sum"], raises_at=2 if odd else None), custom()),
        "rows": lambda: build(failing.item(LABELS, ["sum"], rows=not odd), custom()),
        "collective": lambda: build(failing.item(LABELS, ["sum"] if odd else ["max"]), custom()),
        "one-more": lambda: build(failing.item(LABELS, ["sum"] * (2 if odd else 1)), custom()),
        "mesh": lambda: (
            build(ce().sp_split(mesh), CELossConfig(), BOUNDS, mesh) if odd else build(ce(), CELossConfig())
        ),
        "sequences": lambda: build(ce(LABELS + odd).sp_split(mesh), CELossConfig(), BOUNDS, mesh),
        "sequence-orders": lambda: build(
            ce().sp_split(mesh, "head_tail" if odd else "contiguous"), CELossConfig(), BOUNDS, mesh
        ),
        "set-since": lambda: build(set_since(weighted().sp_split(mesh), odd), CELossConfig(), BOUNDS, mesh),
        "parts": lambda: ce(LABELS[:, :4] if odd else LABELS).sp_parts(mesh),
        "part-fields": lambda: ce(token_weight=None if odd else torch.ones(LABELS.shape)).sp_parts(mesh),
        "no-part": lambda: ce(token_weight=torch.ones(LABELS.shape)[:, odd:]).sp_parts(mesh),
        "no-micro-batch": lambda: CELossConfig().loss_ctx_cls.build_batches_loss_kwargs(
            [] if odd else [weighted()], CELossConfig()
        ),
        "contexts": lambda: failing.build_contexts(
            [CELossConfig(), CELossConfig(softcap=3.0) if odd else CELossConfig()], LABELS, BOUNDS
        ),
        "forward": lambda: (
            odd
            and LogProbConfig()
            .loss_ctx_cls(LogProbConfig(), LogProbKwargs(shifted_labels=LABELS))
            .forward(torch.zeros(1, 4, 3), torch.zeros(7, 3))
        ),
        "none": lambda: build(ce(), CELossConfig(loss_reduction="sample")),
    }


def _call(name: str, real: Callable[..., Any], seen: list[str], *args: Any, **kwargs: Any) -> Any:
    tensors = [[list(t.shape), t.dtype] for t in args if isinstance(t, torch.Tensor)]
    seen.append(f"{name} {tensors} {kwargs.get('op')}")
    return real(*args, **kwargs)


@contextmanager
def recorded() -> Iterator[list[str]]:
    """Every collective of ``torch.distributed`` that is called, with shapes and dtypes."""
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for name in ("all_reduce", "all_gather", "all_gather_object", "broadcast", "reduce_scatter", "all_to_all"):
            patch.setattr(dist, name, functools.partial(_call, name, getattr(dist, name), seen))
        yield seen


def steps(rank: int) -> dict[str, list[str]]:
    """The collectives of whole steps of several losses; all labels of rank 1 are ignored, and it has fewer batches."""
    labels = LABELS if rank != 1 else torch.full_like(LABELS, -100)
    ids = torch.tensor([[0, 0, 1, 1, 1]]) + 2 * rank
    rows = {"group_ids": ids, "ref_logprobs": torch.full(labels.shape, -1.0)}
    todo: dict[str, tuple[Any, Any]] = {
        f"ce-{reduction}": (ce(labels), CELossConfig(loss_reduction=reduction))
        for reduction in ("token", "sample", "square", "sample_sum", "sum")
    }
    todo["class"] = ce(labels, class_weight=torch.rand(7)), CELossConfig(z_loss_coef=0.1)
    for reduction in ("token", "sample", "prompt"):
        cfg = GRPOLossConfig(policy_loss_cfg=POLICY, loss_reduction=reduction, positive_nll_coef=0.2, **KL)
        todo[f"grpo-{reduction}"] = rl(labels, **rows), cfg
    correction = {"level": "token", "high": 2.0, "batch_normalize": True}
    cfg = GRPOLossConfig(policy_loss_cfg=POLICY, rollout_correction=correction, entropy_coef=0.1)
    todo["correction"] = rl(labels, rollout_logprobs=torch.full(labels.shape, -1.5)), cfg
    found = {}
    for name, (item, cfg) in todo.items():
        with recorded() as seen:
            many = 1 if rank == 1 else 2
            ctx_cls = cfg.loss_ctx_cls
            built = ctx_cls.build_batches_loss_kwargs([item] * many, cfg, [BOUNDS] * many)
            weight = torch.ones(7, 3, requires_grad=True)
            outs = [ctx_cls(cfg, kwargs).forward(torch.ones(1, 5, 3), weight) for kwargs in built]
            torch.stack([loss for loss, _ in outs]).sum().backward()
            finalize_metrics([info.metrics for _, info in outs])
        found[name] = seen
    return found


def all_jobs(rank: int) -> dict[str, Any]:
    mesh, found = init_device_mesh("cpu", (WORLD,)), {}
    for name, job in jobs(rank, mesh).items():
        try:
            job()
            found[name] = ("", "", "")
        except Exception as error:
            notes = "\n".join(getattr(error, "__notes__", []))
            found[name] = (type(error).__name__, str(error), notes)
    return {"errors": found, "steps": steps(rank)}


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What every rank raised, job by job."""
    folder = tmp_path_factory.mktemp("ranks")
    return spawn(WORLD, all_jobs, folder, seconds=150, within=120)  # a hang fails, before the group's timeout ends it


ONE_RAISES = {  # what rank 1 raises, and what the others hear of it
    "missing-field": ("MissingFieldError", "ref_logprobs is None in GRPOLossKwargs"),
    "shape": ("ShapeError", "cu_seq_lens"),
    "before": ("ValueError", "step 0"),
    "between": ("ValueError", "step 1"),
    "after": ("ValueError", "step 2"),
    "rows": ("ValueError", "no rows"),
    "no-part": ("ShapeError", "token_weight"),
    "contexts": ("OptionError", "contexts of different configs"),
}


@pytest.mark.parametrize("name", ONE_RAISES)
def test_rank_that_raises_is_named_on_all(ranks: list[dict[str, Any]], name: str) -> None:
    kind, words = ONE_RAISES[name]
    doing = "joining parts of sequences" if name == "no-part" else "building batches"
    for rank, (raised, text, notes) in enumerate(r["errors"][name] for r in ranks):
        if rank == 1:
            assert raised == kind and words in text
            assert f"raised on rank 1 of 3 while {doing}" in notes
        else:
            assert raised == "RankError"
            assert text.startswith(f"[rank] while {doing}, rank 1 raised {kind}: ") and words in text


def test_failure_comes_with_the_difference_behind_it(ranks: list[dict[str, Any]]) -> None:
    told = "ref_logprobs is given on ranks 0, 2 and None on rank 1"
    errors = [r["errors"]["missing-field"] for r in ranks]
    assert told in errors[0][1] and told in errors[1][2] and told in errors[2][1]


def test_all_that_raise_are_named(ranks: list[dict[str, Any]]) -> None:
    errors = [r["errors"]["two-raise"] for r in ranks]
    assert [e[0] for e in errors] == ["RankError", "ShapeError", "ShapeError"]
    assert "ranks 1, 2 raised ShapeError" in errors[0][1]


def test_all_ranks_raise_their_own(ranks: list[dict[str, Any]]) -> None:
    errors = [r["errors"]["not-a-field"] for r in ranks]
    assert [e[0] for e in errors] == ["ValidationError"] * WORLD


DIFFER = {
    "option": ("OptionError", ["loss_reduction is 'token' on ranks 0, 2 and 'sample' on rank 1"]),
    "nested-option": ("OptionError", ["policy_loss_cfg.cliprange_low is 0.2 on ranks 0, 2 and 0.1 on rank 1"]),
    "loss": ("OptionError", ["loss_cfg is CELossConfig on ranks 0, 2 and GRPOLossConfig on rank 1"]),
    "field": ("MissingFieldError", ["token_weight is given on ranks 0, 2 and None on rank 1"]),
    "collective": ("RankError", ["all_reduce_max of [] int64 on ranks 0, 2 and all_reduce_sum of [1] float32 on rank"]),
    "one-more": ("RankError", ["nothing more on ranks 0, 2 and all_reduce_sum of [1] float32 on rank 1"]),
    "sequences": ("OptionError", ["the whole shifted_labels of micro-batch 0 is [1, 5] of hash"]),
    "sequence-orders": ("OptionError", ["the order of the parts of micro-batch 0 is [3, 2] of hash"]),
    "set-since": (
        "OptionError",
        ["what was set since the split of micro-batch 0 is [] on ranks 0, 2 and ['token_weight'] on rank 1"],
    ),
    "parts": ("OptionError", ["the part of shifted_labels is [1, 5] on ranks 0, 2 and [1, 4] on rank 1"]),
    "part-fields": ("OptionError", ["the part of token_weight is [1, 5] on ranks 0, 2 and not there on rank 1"]),
    "mesh": ("OptionError", ["sp_mesh is None on ranks 0, 2 and of 3 ranks on rank 1"]),
}


@pytest.mark.parametrize("name", DIFFER)
def test_difference_is_named_on_all(ranks: list[dict[str, Any]], name: str) -> None:
    kind, words = DIFFER[name]
    for raised, text, _ in (r["errors"][name] for r in ranks):
        assert raised == kind
        assert all(w in text for w in words), text


def test_forward_names_its_rank(ranks: list[dict[str, Any]]) -> None:
    kind, _, notes = ranks[1]["errors"]["forward"]
    assert kind == "ShapeError" and notes == "raised on rank 1 of 3"


def test_group_works_afterwards(ranks: list[dict[str, Any]]) -> None:
    for name in ("no-micro-batch", "none"):
        assert [r["errors"][name][:2] for r in ranks] == [("", "")] * WORLD


def test_empty_rank_takes_part_in_the_same_collectives(ranks: list[dict[str, Any]]) -> None:
    first, *others = [r["steps"] for r in ranks]
    assert all(calls for calls in first.values())
    assert not any("all_gather_object" in call for calls in first.values() for call in calls)
    for other in others:
        assert other == first


def test_one_process_meets_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist, "all_reduce", None)
    with agree.together("building batches", lambda: pytest.fail("asked for its terms")):
        pass
    with pytest.raises(ValueError, match="own") as error, agree.rank_named():
        raise ValueError("own")
    assert not hasattr(error.value, "__notes__")


@pytest.mark.parametrize(
    ("ranks", "text"), [([3], "rank 3"), ([2, 0], "ranks 0, 2"), ([0, 1, 2, 5, 7, 8], "ranks 0 to 2, 5, 7, 8")]
)
def test_ranks_text(ranks: list[int], text: str) -> None:
    assert agree.ranks_text(ranks) == text


def test_page_shows_what_two_ranks_print(tmp_path: Path) -> None:
    page, printed = shown_and_printed("failures.md", "tests/distributed/test_failures.py", tmp_path)
    assert f"```text\n{printed}```" in page, printed
    (section,) = re.findall(r"^## `rank`.*\Z", (DOCS / "errors.md").read_text(), re.MULTILINE | re.DOTALL)
    assert printed.splitlines()[0].removeprefix("rank 0: ") in section
