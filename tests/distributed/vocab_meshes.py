"""What each rank does in the tests of heads and hidden states that are DTensors, and of splits that cannot be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, SequenceParallel, parallelize_module

from xloss import (
    CELossConfig,
    CELossContext,
    CELossContextInputItem,
    DistillLossConfig,
    DistillLossContextInputItem,
    VocabShard,
    linear_logprobs,
)
from xloss.errors import XlossError

WORLD, TOKENS, H, V = 3, 13, 4, 7  # V: a rank holds one row fewer; 13 tokens: 5, 5 and 3
EMPTY_V = 4  # over 3 ranks: 2, 2 and none
HIDDEN = {"alone": None, "replicated": Replicate(), "sequence": Shard(1)}


def problem(vocab: int = V, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """The same in every process."""
    g = torch.Generator().manual_seed(3)
    x = {
        "hidden": torch.randn(1, TOKENS, H, generator=g, dtype=torch.float64),
        "weight": torch.randn(vocab, H, generator=g, dtype=torch.float64),
        "bias": torch.randn(vocab, generator=g, dtype=torch.float64),
    }
    labels = torch.randint(0, vocab, (1, TOKENS), generator=g)
    labels[0, :4] = torch.tensor([0, vocab - 1, -100, vocab // 2])
    return {n: t.to(dtype) for n, t in x.items()} | {"labels": labels}


def context(labels: Tensor, config: type[CELossConfig] = CELossConfig, **fields: Any) -> Any:
    cfg = config(**({"mode": "chunk", "chunk_size": 5, "label_smoothing": 0.1, "z_loss_coef": 0.1} | fields))
    (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([CELossContextInputItem(shifted_labels=labels)], cfg)
    return cfg.loss_ctx_cls(cfg, kwargs)


def whole(grad: Tensor | None) -> dict[str, Any]:
    """A gradient, put together, and how it was laid out."""
    assert grad is not None
    if not isinstance(grad, DTensor):
        return {"grad": grad, "placements": None}
    return {"grad": grad.full_tensor(), "placements": str(grad.placements)}


def placed(mesh: DeviceMesh, ctx: Any, hidden: Any, head: Any, vocab: int = V) -> dict[str, Any]:
    """Loss and gradients with the hidden states and the head on the mesh as asked; ``None``: plain."""
    x = problem(vocab)
    leaves = {
        name: (x[name].clone() if how is None else distribute_tensor(x[name], mesh, [how])).requires_grad_()
        for name, how in (("hidden", hidden), ("weight", head), ("bias", head))
    }
    loss, info = ctx.forward(*leaves.values())
    loss.backward()
    return {"loss": loss.detach(), "logprobs": info.logprobs, "plan": str(info.plan)} | {
        n: whole(t.grad) for n, t in leaves.items()
    }


def tensor_parallel(mesh: DeviceMesh, ctx: Any) -> dict[str, Any]:
    """torch's own tensor parallelism: a norm on a part of the sequence each, and a head of which each has some rows."""
    x = problem()
    model = nn.ModuleDict({"norm": nn.LayerNorm(H), "lm_head": nn.Linear(H, V)}).double()
    with torch.no_grad():
        model["lm_head"].weight.copy_(x["weight"])
        model["lm_head"].bias.copy_(x["bias"])
    parallelize_module(model, mesh, {"norm": SequenceParallel(use_local_output=False), "lm_head": ColwiseParallel()})
    inputs = distribute_tensor(x["hidden"], mesh, [Shard(1)]).requires_grad_()
    loss, _ = ctx.forward(model["norm"](inputs), model["lm_head"].weight, model["lm_head"].bias)
    loss.backward()
    found = {"hidden": inputs.grad, "weight": model["lm_head"].weight.grad, "bias": model["lm_head"].bias.grad}
    found["norm"] = model["norm"].weight.grad
    return {"loss": loss.detach()} | {n: whole(g) for n, g in found.items()}


def low(dtype: torch.dtype, rank: int) -> dict[str, Any]:
    """Log-probs and gradients of a split head in a working dtype."""
    x = problem(dtype=dtype)
    hidden = x["hidden"].requires_grad_()
    rows = slice(min(3 * rank, V), min(3 * rank + 3, V))
    weight = x["weight"][rows].clone().requires_grad_()
    head = VocabShard(weight, offset=rows.start, vocab_size=V, group=dist.group.WORLD)
    stats = linear_logprobs(hidden, head, x["labels"], return_entropy=True, mode="chunk", chunk_size=5)
    (stats.logprobs.sum() + 0.3 * stats.entropy.sum()).backward()
    return {"logprobs": stats.logprobs.detach(), "entropy": stats.entropy.detach(), "hidden": hidden.grad,
            "weight": weight.grad}  # fmt: skip


def into_main_grad(ctx: Any, rank: int) -> Tensor:
    x = problem()
    rows = slice(min(3 * rank, V), min(3 * rank + 3, V))
    weight = nn.Parameter(x["weight"][rows].clone())
    weight.main_grad = torch.ones_like(weight)
    bias = x["bias"][rows]
    head = VocabShard(weight, offset=rows.start, vocab_size=V, group=dist.group.WORLD, bias=bias)
    loss, _ = ctx.forward(x["hidden"], head)
    loss.backward()
    assert weight.grad is None
    return weight.main_grad.detach()


def messages(mesh: DeviceMesh, contexts: dict[str, Any], rank: int) -> dict[str, str]:
    """What is refused, and in which words."""
    x, said = problem(), {}
    ctx, world = contexts["plain"], dist.group.WORLD

    def sharded(t: Tensor, *how: Any) -> DTensor:
        return distribute_tensor(t, mesh, how)

    def rows(start: int, stop: int, size: int = V) -> VocabShard:
        return VocabShard(x["weight"][start:stop], offset=start, vocab_size=size, group=world)

    own = x["hidden"] if rank == 0 else x["hidden"].flip(1)
    linear = fully_shard(nn.Linear(H, V, bias=False).double(), mesh=mesh)
    tries: dict[str, Callable[[], Any]] = {
        "fsdp": lambda: contexts["other"].forward(x["hidden"], linear.weight),
        "tokens": lambda: contexts["other"].forward(x["hidden"], sharded(x["weight"], Shard(0))),
        "lengths": lambda: linear_logprobs(
            x["hidden"][:, rank:], sharded(x["weight"], Shard(0)), x["labels"][:, rank:]
        ),
        "hidden": lambda: ctx.forward(own, sharded(x["weight"], Shard(0))),
        "replicated": lambda: ctx.forward(own, sharded(x["weight"], Replicate())),
        "eager": lambda: contexts["eager"].forward(own, sharded(x["weight"], Shard(0))),
        "plan": lambda: contexts["by rank"].forward(x["hidden"], sharded(x["weight"], Shard(0))),
        "columns": lambda: ctx.forward(x["hidden"], sharded(x["weight"], Shard(1))),
        "partial": lambda: ctx.forward(x["hidden"], DTensor.from_local(x["weight"], mesh, [Partial()])),
        "features": lambda: ctx.forward(sharded(x["hidden"], Shard(2)), sharded(x["weight"], Shard(0))),
        "sequence alone": lambda: ctx.forward(sharded(x["hidden"], Shard(1)), x["weight"]),
        "bias": lambda: ctx.forward(x["hidden"], sharded(x["weight"], Shard(0)), x["bias"]),
        "bias beside": lambda: ctx.forward(x["hidden"], rows(*([(0, 3), (3, 6), (6, 7)][rank])), x["bias"]),
        "gap": lambda: rows(*([(0, 3), (4, 6), (6, 7)][rank])),
        "overlap": lambda: rows(*([(0, 3), (2, 6), (6, 7)][rank])),
        "short": lambda: rows(*([(0, 3), (3, 6), (6, 6)][rank])),
        "sizes": lambda: rows(*([(0, 3), (3, 6), (6, 7)][rank]), size=V + (rank == 1)),
        "shard of a shard": lambda: VocabShard(sharded(x["weight"], Shard(0)), offset=0, vocab_size=V, group=world),
        "loss_fn": lambda: contexts["own"].forward(x["hidden"], sharded(x["weight"], Shard(0))),
        "label": lambda: linear_logprobs(x["hidden"], sharded(x["weight"], Shard(0)), x["labels"] + V),
        "teacher": lambda: contexts["distill"].forward(
            x["hidden"],
            sharded(x["weight"], Shard(0)),
            teacher_head_weight=rows(*([(0, 1), (1, 6), (6, 7)][rank])),
        ),
        "eager teacher": lambda: contexts["distill eager"].forward(
            x["hidden"], sharded(x["weight"], Shard(0)), teacher_head_weight=x["weight"]
        ),
    }
    for name, attempt in tries.items():
        said[name] = "nothing"
        try:
            attempt()
        except XlossError as error:
            said[name] = f"{type(error).__name__}: {str(error).split('] ', 1)[1]}"
    return said


class OwnLoss(CELossConfig):
    """A custom ``loss_fn``."""

    @property
    def loss_ctx_cls(self) -> Any:
        return OwnContext


class OwnContext(CELossContext):
    def loss_fn(self, hidden_states: Tensor, head_weight: Tensor, head_bias: Tensor | None, loss_kwargs: Any) -> Any:
        return torch.nn.functional.linear(hidden_states, head_weight, head_bias).sum()


def job(rank: int) -> Callable[[], dict[str, Any]]:
    x, small = problem(), problem(EMPTY_V)
    labels = x["labels"]
    contexts = {
        "plain": context(labels),
        "two_pass": context(labels, plan="two_pass"),
        "eager": context(labels, mode="eager"),
        "by rank": context(labels, chunk_size=5 + (rank == 1)),
        "other": context(labels.roll(rank)),
        "own": context(labels, OwnLoss),
    }
    few = context(small["labels"])
    for name, mode in (("distill", "chunk"), ("distill eager", "eager")):
        cfg = DistillLossConfig(mode=mode)
        item = DistillLossContextInputItem(shifted_labels=labels, teacher_hidden_states=x["hidden"])
        (kwargs,) = cfg.loss_ctx_cls.build_batches_loss_kwargs([item], cfg)
        contexts[name] = cfg.loss_ctx_cls(cfg, kwargs)

    def run() -> dict[str, Any]:
        mesh = init_device_mesh("cpu", (WORLD,), mesh_dim_names=("tp",))
        found: dict[str, Any] = {}
        for mode in ("plain", "two_pass", "eager"):
            for name, hidden in HIDDEN.items():
                found[f"rows-{name}-{mode}"] = placed(mesh, contexts[mode], hidden, Shard(0))
        for name in ("replicated", "sequence"):
            found[f"whole-{name}-plain"] = placed(mesh, contexts["plain"], HIDDEN[name], Replicate())
        found["empty"] = placed(mesh, few, Shard(1), Shard(0), EMPTY_V)
        found["torch"] = tensor_parallel(mesh, contexts["plain"])
        found |= {f"low-{d}": low(d, rank) for d in (torch.float32, torch.bfloat16)}
        found |= {f"main_grad-{n}": into_main_grad(contexts[f"{n} main"], rank) for n in ("plain", "two_pass")}
        found["messages"] = messages(mesh, contexts, rank)
        return found

    for n in ("plain", "two_pass"):
        plan = {"plan": "two_pass"} if n == "two_pass" else {}
        contexts[f"{n} main"] = context(labels, accumulate_into_main_grad=True, **plan)
    return run
