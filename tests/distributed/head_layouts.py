"""A small model whose loss runs in its forward, and the ways to lay it over ranks. Run by both sides of a test."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import xloss
from xloss import CELossConfig, CELossContextInputItem, GRPOLossConfig, RLLossContextInputItem

WORLD, H, V, T, STEPS, MICRO = 2, 16, 37, 10, 3, 2
BOUNDS = torch.tensor([0, 4, 10])
GSPO = {"loss_type": "gspo", "cliprange_low": 0.2, "cliprange_high": 0.28}


class LoraHead(nn.Module):
    """A head in a LoRA layer with what PEFT's has, one adapter of rank 3 and scale 1.5, the base frozen."""

    disable_adapters = merged = False
    active_adapters = ("default",)

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base.requires_grad_(False)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(H, 3, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(3, V, bias=False)})
        self.lora_dropout = nn.ModuleDict({"default": nn.Identity()})
        self.scaling = {"default": 1.5}

    def get_base_layer(self) -> nn.Module:
        return self.base_layer


class Model(nn.Module):
    """Embedding, two blocks, a norm and a head; `run` is what it does with hidden states and a context."""

    lm_head: Any

    def __init__(self, *, tied: bool = False, bias: bool = False, lora: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(V, H)
        self.blocks = nn.ModuleList(nn.Linear(H, H) for _ in range(2))
        self.norm = nn.LayerNorm(H)
        self.lm_head = nn.Linear(H, V, bias=bias)
        if tied:
            self.lm_head.weight = self.embed.weight
        if lora:
            self.lm_head = LoraHead(self.lm_head)
        self.checkpointed = False
        self.head_of: Callable[[Model], AbstractContextManager[Any]] = lambda m: xloss.head_weight(m.lm_head)

    def hidden(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        out: Tensor = self.norm(x)
        return out

    def dense_head(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias as one whole, for an oracle."""
        if not isinstance(self.lm_head, LoraHead):
            return self.lm_head.weight, self.lm_head.bias
        a, b = (x["default"].weight for x in (self.lm_head.lora_A, self.lm_head.lora_B))
        return self.lm_head.base_layer.weight + 1.5 * b @ a, None

    def loss(self, hidden: Tensor, ctx: Any) -> Tensor:
        with self.head_of(self) as head:
            loss: Tensor = ctx.forward(hidden, *head)[0]
        return loss

    def forward(self, ids: Tensor, ctx: Any = None) -> Tensor:
        hidden = self.hidden(ids)
        if ctx is None:
            return hidden
        if self.checkpointed:
            return checkpoint(self.loss, hidden, ctx, use_reentrant=False)  # type: ignore[no-any-return]
        return self.loss(hidden, ctx)


@dataclass(frozen=True)
class Layout:
    """What `fully_shard` is called on beside blocks and root (names of modules), or `ddp`; and the model's options."""

    unit: tuple[str, ...] = ()
    reshard: bool | None = None
    root_reshard: bool | None = None
    ddp: bool = False
    fsdp1: bool = False
    tied: bool = False
    bias: bool = False
    frozen: bool = False
    checkpointed: bool = False
    lora: bool = False
    head_dtype: torch.dtype | None = None

    def model(self, dtype: torch.dtype = torch.float32) -> Model:
        """The same on every rank, not yet laid out."""
        torch.manual_seed(7)
        model = Model(tied=self.tied, bias=self.bias, lora=self.lora).to(dtype)
        if self.frozen:
            model.lm_head.requires_grad_(False)
        model.checkpointed = self.checkpointed
        return model

    def wrap(self, model: Model) -> nn.Module:
        mesh = init_device_mesh("cpu", (WORLD,))
        if self.ddp:
            return DistributedDataParallel(model)
        if self.fsdp1:
            return self.wrap_fsdp1(model)
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        if self.unit:
            modules = [model.get_submodule(name) for name in self.unit]
            policy = MixedPrecisionPolicy(param_dtype=self.head_dtype)
            fully_shard(modules if len(modules) > 1 else modules[0], mesh=mesh, mp_policy=policy,
                        reshard_after_forward=self.reshard)  # fmt: skip
        fully_shard(model, mesh=mesh, reshard_after_forward=self.root_reshard)
        return model

    def wrap_fsdp1(self, model: Model) -> nn.Module:
        """The same with ``FullyShardedDataParallel``."""
        for name in ("blocks.0", "blocks.1", *self.unit):
            parent, _, child = name.rpartition(".")
            unit = FullyShardedDataParallel(model.get_submodule(name), **FSDP1)
            setattr(model.get_submodule(parent), child, unit)
        return FullyShardedDataParallel(model, **FSDP1)


FSDP1: dict[str, Any] = {"use_orig_params": True, "device_id": torch.device("cpu")}
OWN, NORM, TIED = ("lm_head",), ("norm", "lm_head"), ("embed", "lm_head")
LAYOUTS = {
    "ddp": Layout(ddp=True),
    "ddp-tied-bias": Layout(ddp=True, tied=True, bias=True),
    "ddp-checkpoint": Layout(ddp=True, checkpointed=True),
    "fsdp1": Layout(fsdp1=True),
    "root": Layout(),
    "root-reshard": Layout(root_reshard=True),
    "root-keep": Layout(root_reshard=False),
    "root-tied": Layout(tied=True),
    "norm-reshard": Layout(NORM, reshard=True),
    "norm-keep": Layout(NORM, reshard=False),
    "own-reshard": Layout(OWN, reshard=True),
    "own-keep": Layout(OWN, reshard=False),
    "own-bias": Layout(OWN, reshard=True, bias=True),
    "own-frozen": Layout(OWN, reshard=True, frozen=True),
    "own-checkpoint": Layout(OWN, reshard=True, checkpointed=True),
    "tied-reshard": Layout(TIED, reshard=True, tied=True),
    "tied-keep": Layout(TIED, reshard=False, tied=True),
    "tied-norm": Layout(("embed", *NORM), reshard=True, tied=True),
    "ddp-lora": Layout(ddp=True, lora=True),
    "root-lora": Layout(lora=True, root_reshard=True),
    "norm-lora": Layout(NORM, reshard=True, lora=True),
    "own-lora": Layout(OWN, reshard=True, lora=True),
}
LOSSES = ("ce", "gspo")


@dataclass
class Data:
    """One micro-batch, `[1, T]` each; packed as `BOUNDS` says."""

    ids: Tensor
    labels: Tensor
    advantages: Tensor
    old: Tensor


def batches(rank: int, step: int) -> list[Data]:
    """Micro-batches of one rank and step; the last rank's first one has no live token."""
    g = torch.Generator().manual_seed(100 * step + rank)
    out = []
    for i in range(MICRO):
        ids, labels = (torch.randint(0, V, (1, T), generator=g) for _ in range(2))
        labels[torch.rand(1, T, generator=g) < 0.3] = -100
        if rank == WORLD - 1 and i == 0:
            labels.fill_(-100)
        out.append(Data(ids, labels, torch.randn(1, T, generator=g), torch.randn(1, T, generator=g) - 3.5))
    return out


def contexts(loss: str, data: list[Data]) -> list[Any]:
    """Calibrated contexts of a step's micro-batches."""
    cfg: Any
    items: list[Any]
    if loss == "gspo":
        cfg = GRPOLossConfig(policy_loss_cfg=GSPO, mode="chunk", chunk_size=4, logits_budget=4 * V * 4)
        items = [
            RLLossContextInputItem(shifted_labels=d.labels, advantages=d.advantages, old_logprobs=d.old) for d in data
        ]
    else:
        cfg = CELossConfig(mode="chunk", chunk_size=4)
        items = [CELossContextInputItem(shifted_labels=d.labels) for d in data]
    ctx_cls = cfg.loss_ctx_cls
    return [ctx_cls(cfg, k) for k in ctx_cls.build_batches_loss_kwargs(items, cfg, [BOUNDS] * len(items))]


def whole(x: Tensor | None) -> Tensor | None:
    """A parameter's gradient, gathered where it is sharded."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x  # type: ignore[union-attr]


def gradients(model: nn.Module, inner: Model) -> dict[str, Tensor | None]:
    """Whole gradients of every parameter, under the names of the model without wrappers."""
    if not isinstance(model, FullyShardedDataParallel):
        return {name: whole(p.grad) for name, p in inner.named_parameters()}
    with FullyShardedDataParallel.summon_full_params(model, with_grads=True):
        named = inner.named_parameters()
        return {n.replace("_fsdp_wrapped_module.", ""): p.grad.clone() for n, p in named if p.grad is not None}


def without_sync(model: nn.Module, sync: bool) -> AbstractContextManager[Any]:
    """Gradient accumulation as each engine spells it."""
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(sync)
        return nullcontext()
    wrapped = isinstance(model, (DistributedDataParallel, FullyShardedDataParallel))
    return model.no_sync() if wrapped and not sync else nullcontext()


def train(layout: Layout, loss: str, rank: int) -> list[dict[str, Tensor | None]]:
    """Gradients of every parameter at every step of AdamW, two micro-batches a step."""
    inner = layout.model()
    model = layout.wrap(inner)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    seen = []
    for step in range(STEPS):
        data = batches(rank, step)
        for i, (d, ctx) in enumerate(zip(data, contexts(loss, data), strict=True)):
            with without_sync(model, i == MICRO - 1):
                model(d.ids, ctx).backward()
        seen.append(gradients(model, inner))
        optimizer.step()
        optimizer.zero_grad()
    return seen
