"""An attached model laid over processes: what each rank of ``test_hf_sharded`` does, and the same on one process."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from tests.integrations.models import batch, build
from xloss import (
    CELossConfig,
    CELossContext,
    CELossContextInputItem,
    GRPOLossConfig,
    GRPOLossContext,
    RLLossContextInputItem,
    shift_labels,
)
from xloss.cli.spawn import Rank
from xloss.hf import attach

WORLD, MICRO = 2, 2
LOSSES = ("labels", "ce", "gspo")


@dataclass(frozen=True)
class Layout:
    """What `fully_shard` is called on beside the layers and the root; or DDP."""

    units: tuple[tuple[str, ...], ...] = ()
    architecture: str = "llama"
    ddp: bool = False
    checkpointing: bool = False
    peft: tuple[str, ...] = ()


LAYOUTS = {
    "ddp": Layout(ddp=True),
    "ddp, tied, softcap": Layout(ddp=True, architecture="gemma 3 (tied)"),
    "root": Layout(),
    "root, tied, softcap": Layout(architecture="gemma 3 (tied)"),
    "root, checkpointing": Layout(checkpointing=True),
    "head of its own": Layout((("lm_head",),)),
    "norm and head": Layout((("model.norm", "lm_head"),)),
    "embedding and head tied": Layout((("model.embed_tokens", "lm_head"),), architecture="llama, tied"),
    "lora on the head": Layout(peft=("q_proj", "lm_head")),
    "lora on a head of its own": Layout((("base_model.model.lm_head",),), peft=("lm_head",)),
}


def model_of(layout: Layout) -> nn.Module:
    model = build(layout.architecture, torch.float32)
    if layout.checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if layout.peft:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(3)
        config = LoraConfig(r=2, target_modules=list(layout.peft), init_lora_weights=False)
        model = get_peft_model(model, config)
    return attach(model).train()


def wrap(layout: Layout, model: nn.Module) -> nn.Module:
    if layout.ddp:
        return DistributedDataParallel(model)
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    prefix = "base_model.model." if layout.peft else ""
    for block in model.get_submodule(f"{prefix}model.layers"):  # type: ignore[union-attr]
        fully_shard(block, mesh=mesh)
    for names in layout.units:
        modules = [model.get_submodule(name) for name in names]
        fully_shard(modules if len(modules) > 1 else modules[0], mesh=mesh)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy())
    return model


def micro_batches(rank: int) -> list[dict[str, Tensor]]:
    """Uneven ones; the last rank's first one has no label."""
    found = [batch(rows=2 + rank, length=8 + 2 * i, seed=10 * rank + i) for i in range(MICRO)]
    if rank == WORLD - 1:
        found[0]["labels"].fill_(-100)
    return found


def contexts(loss: str, data: list[dict[str, Tensor]]) -> list[Any]:
    """Calibrated over all of them, and over the ranks of the process group if there is one."""
    labels = [shift_labels(d["labels"]) for d in data]
    if loss == "ce":
        cfg = CELossConfig()
        items = [CELossContextInputItem(shifted_labels=x) for x in labels]
        return [CELossContext(cfg, kw) for kw in CELossContext.build_batches_loss_kwargs(items, cfg)]
    policy = GRPOLossConfig(policy_loss_cfg={"loss_type": "gspo"}, loss_reduction="sample")
    rl = [
        RLLossContextInputItem(
            shifted_labels=x,
            advantages=torch.linspace(-1, 1, x.numel()).view_as(x),
            old_logprobs=torch.full(x.shape, -5.0),
        )
        for x in labels
    ]
    return [GRPOLossContext(policy, kw) for kw in GRPOLossContext.build_batches_loss_kwargs(rl, policy)]


def run_micro_batches(model: nn.Module, data: list[dict[str, Tensor]], loss: str, items: int, factor: int) -> None:
    """Forward and backward of each. ``factor``: ranks whose gradients are averaged, as the Trainer has it."""
    ctxs = contexts(loss, data) if loss != "labels" else [None] * len(data)
    for d, ctx in zip(data, ctxs, strict=True):
        inputs = {name: d[name] for name in ("input_ids", "attention_mask")}
        if ctx is None:
            value = model(**inputs, labels=d["labels"], num_items_in_batch=items).loss * factor
        else:
            value = model(**inputs, loss_ctx=ctx).loss
        value.backward()


def num_items() -> int:
    return sum(int((d["labels"][:, 1:] != -100).sum()) for rank in range(WORLD) for d in micro_batches(rank))


def whole(parameter: Tensor) -> Tensor:
    return parameter.full_tensor() if isinstance(parameter, DTensor) else parameter


def on_ranks(rank: Rank) -> dict[str, dict[str, dict[str, Tensor]]]:
    """Gradients by layout and loss, whole, under the names of the unwrapped model."""
    return {name: _on_rank(rank, layout) for name, layout in LAYOUTS.items()}


def _on_rank(rank: Rank, layout: Layout) -> dict[str, dict[str, Tensor]]:
    model = wrap(layout, model_of(layout))
    found = {}
    for loss in LOSSES:
        run_micro_batches(model, micro_batches(rank.rank), loss, num_items(), rank.world)
        grads = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        found[loss] = {n.removeprefix("module."): g for n, g in grads.items()}
        model.zero_grad(set_to_none=True)
    return found


def on_one(layout: Layout, loss: str) -> dict[str, Tensor]:
    """The same from one process that has every rank's micro-batches."""
    model = model_of(layout)
    data = [d for rank in range(WORLD) for d in micro_batches(rank)]
    run_micro_batches(model, data, loss, num_items(), 1)
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
