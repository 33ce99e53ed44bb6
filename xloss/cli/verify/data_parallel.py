"""Layouts of data parallelism: DDP and FSDP2, with the head wherever people put it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from xloss import Lora, LoraWeight
from xloss.cli.verify.layouts import Site, Variants, dealt, layout
from xloss.cli.verify.problem import LORA_SCALE, Kind, SmallLM
from xloss.cli.verify.step import Setup

MICRO_BATCHES = 3


def my_cut(site: Site, micro_batches: int = MICRO_BATCHES) -> Any:
    return dealt(site, site.rank.world, site.rank.rank, micro_batches)


def ddp_of(site: Site, model: SmallLM) -> DistributedDataParallel:
    return DistributedDataParallel(model, device_ids=[site.rank.device] if site.rank.device.type == "cuda" else None)


def last_only(module: nn.Module) -> Callable[[int, int], None]:
    """Reduce gradients in the last micro-batch only: DDP's ``no_sync``, and what FSDP2 has for it."""

    def before(i: int, n: int) -> None:
        if isinstance(module, FSDPModule):
            module.set_requires_gradient_sync(i == n - 1)
        else:
            module.require_backward_grad_sync = i == n - 1  # type: ignore[assignment]

    return before


def shard(model: SmallLM, units: list[Any], **options: Any) -> SmallLM:
    """FSDP2: each block a unit, then ``units``, then what is left in the root."""
    for block in model.blocks:
        fully_shard(block, **options)
    for unit in units:
        fully_shard(unit, **options)
    fully_shard(model, **options)
    return model


@layout(
    "ddp",
    "DDP, gradients reduced in every micro-batch",
    ranks=1,
    hint="engines average gradients over the ranks: weights must hold ranks.gradient_factor(grad_reduce), and "
    "ranks.sum(...).divisor(), the denominator over all ranks.",
)
def ddp(site: Site) -> Variants:
    """The plainest engine."""
    yield "", Setup(ddp_of(site, site.model()), my_cut(site))


@layout("ddp-no-sync", "DDP, gradients reduced in the last micro-batch", ranks=1)
def ddp_no_sync(site: Site) -> Variants:
    """Gradient accumulation with ``no_sync``."""
    module = ddp_of(site, site.model())
    yield "", Setup(module, my_cut(site), before=last_only(module))


@layout("uneven-ranks", "DDP, rank r has r + 1 micro-batches", ranks=2)
def uneven_ranks(site: Site) -> Variants:
    """Ranks with different numbers of micro-batches."""
    module = ddp_of(site, site.model())
    most = site.batch.num_pairs // site.rank.world
    yield "", Setup(module, my_cut(site, min(site.rank.rank + 1, most)), before=last_only(module))


@layout("empty-rank", "FSDP2, the last rank has nothing but a prompt without labels", ranks=2)
def empty_rank(site: Site) -> Variants:
    """It takes part in every collective, and counts nowhere."""
    world, rank = site.rank.world, site.rank.rank
    last = site.batch.num_pairs - 1  # the prompt without labels
    mine = [last] if rank == world - 1 else list(range(last))[rank :: world - 1]
    cut = (tuple(i for pair in mine for i in (2 * pair, 2 * pair + 1)),)
    yield "", Setup(shard(site.model(), []), cut)


@layout("fsdp2-root", "FSDP2, the head in the root's unit", ranks=1)
def fsdp2_root(site: Site) -> Variants:
    """What a plain ``fully_shard(model)`` gives."""
    yield "", Setup(shard(site.model(), []), my_cut(site))


@layout("fsdp2-grouped", "FSDP2, the head in one unit with the norm", ranks=1)
def fsdp2_grouped(site: Site) -> Variants:
    """The layout of transformers' plans."""
    model = site.model()
    yield "", Setup(shard(model, [[model.norm, model.lm_head]]), my_cut(site))


@layout("fsdp2-own", "FSDP2, the head a unit of its own", ranks=1)
def fsdp2_own(site: Site) -> Variants:
    """Its forward, where FSDP2 would gather it, is never called."""
    for reshard in (True, False):
        model = site.model()
        module = shard(model, [model.lm_head], reshard_after_forward=reshard)
        yield f"reshard_after_forward={reshard}", Setup(module, my_cut(site))
        yield f"reshard_after_forward={reshard}, no sync", Setup(module, my_cut(site), before=last_only(module))


@layout("fsdp2-no-reshard", "FSDP2, weights kept gathered from forward to backward", ranks=1)
def fsdp2_no_reshard(site: Site) -> Variants:
    """``reshard_after_forward=False`` everywhere."""
    yield "head in the root", Setup(shard(site.model(), [], reshard_after_forward=False), my_cut(site))
    model = site.model()
    module = shard(model, [[model.norm, model.lm_head]], reshard_after_forward=False)
    yield "head with the norm", Setup(module, my_cut(site))


@layout("fsdp2-tied", "FSDP2, the head is the embedding", ranks=1, kind=Kind(tied=True))
def fsdp2_tied(site: Site) -> Variants:
    """One weight, two gradients that add."""
    yield "", Setup(shard(site.model(Kind(tied=True)), []), my_cut(site))


@layout("fsdp2-no-sync", "FSDP2, gradients reduced in the last micro-batch", ranks=1)
def fsdp2_no_sync(site: Site) -> Variants:
    """``set_requires_gradient_sync``."""
    module = shard(site.model(), [])
    yield "", Setup(module, my_cut(site), before=last_only(module))


class LoraLM(SmallLM):
    """Gives the adapter to the loss as it is: no dense product."""

    def adapted(self, weight: Any) -> Any:
        """The head's weight and its adapter."""
        assert self.lora_a is not None and self.lora_b is not None
        return LoraWeight(weight, (Lora(self.lora_a, self.lora_b, LORA_SCALE),))


@layout("lora-head", "LoRA on a frozen lm_head, under DDP and FSDP2", ranks=1, kind=Kind(lora=True))
def lora_head(site: Site) -> Variants:
    """Against the dense ``W + s B A``."""
    module = ddp_of(site, site.model(Kind(lora=True), cls=LoraLM))
    yield "DDP", Setup(module, my_cut(site), before=last_only(module))
    for own in (False, True):
        model = site.model(Kind(lora=True), cls=LoraLM)
        unit = "a unit of its own" if own else "the root's unit"
        yield f"FSDP2, head in {unit}", Setup(shard(model, [model.lm_head] * own), my_cut(site))


@layout("fsdp2-bf16", "FSDP2, computed in bfloat16, reduced in float32", ranks=1, compute=torch.bfloat16)
def fsdp2_bf16(site: Site) -> Variants:
    """``MixedPrecisionPolicy``; compared with one process that computes in bfloat16."""
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    yield "", Setup(shard(site.model(), [], mp_policy=policy), my_cut(site))
