"""Ways to reach the head that give a wrong gradient without an error elsewhere: xloss refuses them, or is right.

Each was measured to be wrong, or to crash, with a loss that reads ``lm_head.weight`` itself: see docs/head-access.md.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.distributed.tensor import DTensor, Partial

from xloss import LossInfo
from xloss.cli.verify.data_parallel import ddp_of, my_cut, shard
from xloss.cli.verify.layouts import Site, Variants, layout
from xloss.cli.verify.problem import SmallLM
from xloss.cli.verify.step import Setup

Loss = tuple[Tensor, LossInfo]


class ReturnsHidden(SmallLM):
    """Leaves the loss to whoever calls it."""

    def forward(self, ids: Tensor, loss_ctx: Any) -> Any:
        """Hidden states."""
        return self.hidden_states(ids)


class ReadsWeight(SmallLM):
    """Reads the head's weight as if it were a plain one."""

    def forward(self, ids: Tensor, loss_ctx: Any) -> Loss:
        """Loss of one micro-batch."""
        loss: Loss = loss_ctx(self.hidden_states(ids), self.lm_head.weight, self.lm_head.bias)
        return loss


class GathersWeight(SmallLM):
    """Gathers the head's shards itself, and its gradient stays that of the rank."""

    gradients: Any = None

    def forward(self, ids: Tensor, loss_ctx: Any) -> Loss:
        """Loss of one micro-batch."""
        weight = self.lm_head.weight
        whole = weight.full_tensor(grad_placements=self.gradients) if isinstance(weight, DTensor) else weight
        loss: Loss = loss_ctx(self.hidden_states(ids), whole)
        return loss


class SumsGradients(GathersWeight):
    """The same, with gradients that are added where the engine averages."""

    gradients = (Partial(),)


def _own_unit(site: Site, cls: type[SmallLM]) -> Variants:
    model = site.model(cls=cls)
    yield "", Setup(shard(model, [model.lm_head]), my_cut(site))


@layout("around-ddp", "DDP's forward is left out: ddp.module(...)", ranks=2, refused=True)
def around_ddp(site: Site) -> Variants:
    """Nobody reduces the gradients."""
    module = ddp_of(site, site.model())
    yield "", Setup(module, my_cut(site), call=module.module)


@layout("around-fsdp2", "the loss on what the sharded model returned", ranks=2, refused=True)
def around_fsdp2(site: Site) -> Variants:
    """The head is a shard again by then, unless the root has it."""
    for own in (True, False):
        model = site.model(cls=ReturnsHidden)
        module = shard(model, [model.lm_head] * own)

        def call(ids: Tensor, loss_ctx: Any, module: SmallLM = module) -> Loss:
            loss: Loss = loss_ctx(module(ids, None), module.lm_head.weight, module.lm_head.bias)
            return loss

        yield "head in a unit of its own" if own else "head in the root", Setup(module, my_cut(site), call=call)


@layout("own-unit-read", "FSDP2, lm_head.weight of a unit of its own", ranks=2, refused=True)
def own_unit_read(site: Site) -> Variants:
    """It is a shard."""
    yield from _own_unit(site, ReadsWeight)


@layout("own-unit-gather", "FSDP2, lm_head.weight.full_tensor()", ranks=2, refused=True)
def own_unit_gather(site: Site) -> Variants:
    """Its gradient is that of the rank."""
    yield from _own_unit(site, GathersWeight)


@layout("own-unit-sum", "FSDP2, full_tensor(grad_placements=[Partial()])", ranks=2, refused=True)
def own_unit_sum(site: Site) -> Variants:
    """Its gradient is too large by the number of ranks."""
    yield from _own_unit(site, SumsGradients)
