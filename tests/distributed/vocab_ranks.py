"""What each rank does in the tests of vocabulary parallelism, and the processes that do it.

Batches are built before ranks know of each other: ranks that share a vocabulary have one batch between them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from tests.distributed import ranks
from tests.property.registry import PLAIN
from tests.property.world import VOCAB, WORLD, Case, Result
from xloss import CELossConfig, CELossContextInputItem, VocabShard, linear_logprobs

SPLITS: dict[str, tuple[tuple[int, int], ...]] = {
    "two": ((0, 7), (7, 11)),
    "empty-middle": ((4, 11), (4, 4), (0, 4)),  # one rank has no row, and ranks are not in the order of the rows
}
RUNS: dict[str, dict[str, Any]] = {
    "auto": {"mode": "chunk", "chunk_size": 5},
    "two_pass": {"mode": "chunk", "chunk_size": 5, "plan": "two_pass"},
    "again": {"mode": "chunk", "chunk_size": 5, "plan": "two_pass", "logits_budget": 1},
    "eager": {"mode": "eager"},
}
SOME = (
    "policy-vanilla",
    "policy-gspo",
    "policy-kl_cov",
    "preference-sigmoid",
    "ce",
    "soft",
    "logprob",
    "distill-jsd",
    "distill-lk_hybrid",
    "distill-cosine",
    "distill-topk",
    "step-everything",
    "step-full-kl",
)
"""One of each kind of call of the head: what it asks for, of whom, and in which plan."""

Job = Callable[[int], Callable[[], Any]]
"""Made before there is a group (from the rank), run when there is one."""


def pairs(split: str) -> list[tuple[str, str]]:
    """Cases and runs: every loss once, and some in every run, except where no mode gathers a teacher."""
    teachers = ("teacher_hidden_states", "teacher_logits", "ref_hidden_states")
    found = [(n, "auto") for n in PLAIN if split == "two" and n not in SOME]
    return found + [
        (n, run) for n in SOME for run in RUNS if run != "eager" or not set(teachers) & set(PLAIN[n].fields)
    ]


STATISTICS: dict[str, tuple[int, dict[str, Any]]] = {
    "plain": (0, {}),
    "several labels": (3, {"softcap": 3.0, "logit_scale": 1.3, "temperature": torch.linspace(0.6, 2.0, 9)}),
}
"""Labels a token (0: an axis less), and what stands between hidden states and logits."""
WAYS: dict[str, dict[str, Any]] = {"kept": {"chunk_size": 4}, "again": {"chunk_size": 4, "logits_budget": 1}}


def primitive(several: int) -> dict[str, Tensor]:
    """Hidden states, head, labels, and an upstream gradient for each number of each statistic."""
    g = torch.Generator().manual_seed(8)
    shape = (9, several) if several else (9,)
    x = {n: torch.randn(*s, generator=g, dtype=torch.float64)
         for n, s in {"hidden": (9, 5), "weight": (VOCAB, 5), "bias": (VOCAB,), "logprobs": shape, "lse": (9,),
                      "entropy": (9,), "mean_logit": (9,), "sum_p2": (9,)}.items()}  # fmt: skip
    labels = torch.randint(0, VOCAB, shape, generator=g)
    labels[2], labels[4], labels[5] = -100, 0, VOCAB - 1
    if several:
        labels[6, 1], labels[7] = -100, labels[7, 0]
    return x | {"labels": labels}


def statistics(bounds: tuple[tuple[int, int], ...], rank: int, kind: str, **how: Any) -> dict[str, Tensor]:
    """All statistics of ``linear_logprobs``, and gradients of hidden states and of this rank's rows."""
    several, between = STATISTICS[kind]
    x = primitive(several)
    hidden = x["hidden"].requires_grad_()
    head = shard({n: x[n].requires_grad_() for n in ("weight", "bias")}, bounds, rank)
    asked = {f"return_{n}": True for n in ("entropy", "mean_logit", "sum_p2", "top1")}
    stats = linear_logprobs(hidden, head, x["labels"], **between, **asked, mode="chunk", **how)
    total = torch.stack([(x[n] * v).sum() for n, v in stats.differentiable()]).sum()
    leaves = {"hidden": hidden, "weight": head.weight, "bias": head.bias}
    grads = torch.autograd.grad(total, [t for t in leaves.values() if t is not None])
    found = {n: v.detach() for n, v in stats.differentiable()} | {
        f"d {n}": g for n, g in zip(leaves, grads, strict=True)
    }
    assert stats.top1 is not None
    return found | {"top1": stats.top1}


def primitives(split: str, rank: int) -> Callable[[], dict[tuple[str, str], Any]]:
    return lambda: {(kind, way): statistics(SPLITS[split], rank, kind, **how)
                    for kind in STATISTICS for way, how in WAYS.items()}  # fmt: skip


def dead(split: str, rank: int) -> Callable[[], list[dict[str, Tensor]]]:
    """Batches without a token of the loss: none at all, and ignored ones whose hidden states are NaN."""
    built = []
    for tokens in (0, 5):
        for run in RUNS.values():
            cfg = CELossConfig(label_smoothing=0.1, z_loss_coef=0.1, grad_reduce="sum", **run)
            item = CELossContextInputItem(shifted_labels=torch.full((1, tokens), -100))
            (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
            built.append(cfg.loss_ctx_cls(cfg, kwargs))

    def run_all() -> list[dict[str, Tensor]]:
        found = []
        for ctx in built:
            hidden = torch.full((1, ctx.loss_kwargs.shifted_labels.shape[1], 5), torch.nan, dtype=torch.float64)
            x = {n: primitive(0)[n].requires_grad_() for n in ("weight", "bias")}
            head = shard(x, SPLITS[split], rank)
            loss, _ = ctx.forward(hidden.requires_grad_(), head)
            grads = torch.autograd.grad(loss, [hidden, head.weight])
            found.append({"loss": loss.detach(), "hidden": grads[0], "weight": grads[1]})
        return found

    return run_all


def losses(split: str, rank: int) -> Callable[[], dict[tuple[str, str], Any]]:
    """Losses over a split head, in float64."""
    built = {(name, run): WORLD.build(PLAIN[name], grad_reduce="sum", **RUNS[run]) for name, run in pairs(split)}
    return lambda: {key: step(PLAIN[key[0]], contexts, SPLITS[split], rank) for key, contexts in built.items()}


def shard(x: dict[str, Tensor], bounds: tuple[tuple[int, int], ...], rank: int) -> VocabShard:
    """This rank's rows of a head, leaves of their own."""
    rows = slice(*bounds[rank])
    weight, bias = (x[n][rows].detach().clone().requires_grad_(x[n].requires_grad) for n in ("weight", "bias"))
    return VocabShard(weight, offset=rows.start, vocab_size=VOCAB, group=dist.group.WORLD, bias=bias)


def step(
    case: Case,
    contexts: list[Any],
    bounds: tuple[tuple[int, int], ...],
    rank: int,
    dtype: torch.dtype = torch.float64,
) -> dict[str, Any]:
    """Loss, gradients and what was seen of one rank; the whole batch is one micro-batch."""
    (args,), (more,), leaves = WORLD.inputs(case, dtype=dtype)
    head = shard({n: leaves[n][0] for n in ("weight", "bias")}, bounds, rank)
    for kind in ("ref", "teacher"):  # split as the student's, where the case has one
        if f"{kind}_head_weight" in more:
            given = {n: more.pop(f"{kind}_head_{n}") for n in ("weight", "bias")}
            more[f"{kind}_head_weight"] = shard(given, bounds, rank)
    return differentiate(contexts[0].forward(args[0], head, **more), args[0], head.weight, head.bias, more)


def differentiate(
    out: tuple[Tensor, Any], hidden: Tensor, weight: Tensor, bias: Tensor | None, more: dict[str, Any]
) -> dict[str, Any]:
    loss, info = out
    if loss.ndim:
        upstream = WORLD.lay_out("upstream", range(10), True, loss.dtype, None, WORLD.live).nan_to_num(0.0)
        loss = (loss * upstream).sum()
    leaves = {"weight": weight, "bias": bias, "hidden": hidden}
    if "values" in more:
        leaves["values"] = more["values"]
    found = torch.autograd.grad(1.7 * loss, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return {"loss": loss.detach(), "grads": dict(zip(leaves, found, strict=True)), "info": info}


def as_result(seen: Sequence[dict[str, Any]], bounds: tuple[tuple[int, int], ...]) -> Result:
    """What all ranks saw as the result of one process: rows of the head side by side."""
    order = sorted(range(len(bounds)), key=lambda r: bounds[r])
    grads = dict(seen[0]["grads"])
    for name in ("weight", "bias"):
        grads[name] = torch.cat([seen[r]["grads"][name] for r in order])
    for name in grads.keys() - {"weight", "bias"}:
        grads[name] = grads[name].squeeze(0)
    info = seen[0]["info"]
    return Result(seen[0]["loss"], grads, [], [info], [])


def _worker(rank: int, size: int, folder: str, makers: dict[str, Job]) -> None:
    ranks.alone()
    jobs = {name: make(rank) for name, make in makers.items()}
    with ranks.group(folder, rank, size):
        torch.save({name: job() for name, job in jobs.items()}, f"{folder}/{rank}.pt")


def spawn(folder: Path, size: int, makers: dict[str, Job]) -> list[dict[str, Any]]:
    """What each of ``size`` ranks found, by job."""
    ranks.run_processes(_worker, size, str(folder), makers, nprocs=size)
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(size)]
